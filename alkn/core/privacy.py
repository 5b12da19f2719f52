"""Membership inference: scores of how much a record looks like training data, and what they tell members from others.

Every score is higher for what looks more like a member.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from alkn.core.distributed import refuse_split
from alkn.core.measured import Measured
from alkn.core.probe import Probe
from alkn.core.scoring import Example, mean_gradient, read_labels

BLOCK = 4_000_000
"""Pairs of a member and another record that are compared at a time."""
ATTACKED = ("forget", "earlier", "known", "holdout")
"""The kinds of sets that attacks are tried on; the holdout's records are those that were never members."""
NO_HOLDOUT = "there is no holdout: nothing to tell the records from"


def zlib_score(log_probs: Tensor, text: str) -> float:
    """−(total NLL of the answer) / (bytes of its text compressed by zlib), nats a byte.

    Args:
        log_probs: of each answer token, ``[answer_length]``, nats.
        text: the answer.

    Source: Carlini et al. 2021, section 5.1, the ratio of log perplexity and zlib entropy. Theirs has the mean NLL;
    the total has the unit of the compressed size, and does not favour long answers.
    """
    return float(log_probs.double().sum()) / len(zlib.compress(text.encode()))


def lowest_share(values: Tensor, share: float) -> float:
    """Mean of the lowest ``share`` of the values, at least one of them.

    Args:
        values: one a token, ``[answer_length]``: log-probabilities for Min-K %, standardized ones for Min-K %++.
        share: in (0, 1].

    Source: Shi et al. 2024, equation 1.
    """
    count = max(1, int(values.numel() * share))
    return float(values.double().sort().values[:count].mean())


@torch.no_grad()
def standardized_log_probs(model: nn.Module, examples: Sequence[Example], *, max_tokens: int = 8192) -> list[Tensor]:
    """(log π(token) − μ) / σ of every answer token, μ and σ over the model's own next-token distribution.

    μ = Σ_v π_v log π_v and σ² = Σ_v π_v (log π_v)² − μ², position by position; σ² is at least 1e-6. The logits of a
    batch are reduced at once and not kept.

    Args:
        model: a causal language model on its device.
        examples: encoded records, at least one.
        max_tokens: padded tokens a batch at the most.

    Returns:
        One tensor a record, ``[answer_length]``, on the CPU.

    Source: Zhang et al. 2024 (Min-K %++), equation 3.
    """

    def standardized(logits: Tensor, targets: Tensor) -> Tensor:
        logs = torch.log_softmax(logits, dim=-1)
        found = logs.gather(1, targets.unsqueeze(1)).squeeze(1)
        probs = logs.exp()
        # 0 · (−∞)² is 0 here: a token that cannot come adds nothing.
        weighted = torch.where(probs > 0, probs * logs, 0)
        mean = weighted.sum(-1)
        variance = torch.where(probs > 0, weighted * logs, 0).sum(-1) - mean.square()
        return ((found - mean) / variance.clamp(min=1e-6).sqrt()).unsqueeze(0)

    return [values[0] for values in read_labels(model, examples, standardized, columns=1, max_tokens=max_tokens)]


def gradient_norms(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """−‖∇θ mean NLL‖₂ of each record by itself, ``[records]``: a model at rest on a record has a small gradient.

    Args:
        model: a causal language model on its device, not split over processes; its ``grad`` is left ``None``.
        examples: encoded records; each costs a forward and a backward pass of its own.

    Raises:
        InputError: if the weights are split over processes.

    Source: Wang et al. 2024 (Pandora's white-box), as in OpenUnlearning's ``gradnorm``.
    """
    refuse_split(model, "gradient_norm: gradients of single records")
    norms = []
    for i in range(len(examples)):
        gradient = mean_gradient(model, examples, [i])
        norms.append(-torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt())
    return torch.stack(norms).cpu()


@dataclass(frozen=True)
class Separation:
    """How well a score tells members from others.

    Attributes:
        auc: share of (member, other) pairs in which the member scores higher, ties half; 0.5 is chance.
        low, high: ends of the bootstrap interval.
    """

    auc: float
    low: float
    high: float


def log_likelihoods(probe: Probe) -> dict[int, tuple[float, int]]:
    """Record number -> log-probability of its whole answer, nats, and its number of tokens."""
    found: dict[int, tuple[float, int]] = {}
    for number, logs in zip(probe.records.ids, probe.scores.token_log_probs, strict=True):
        total, tokens = found.get(number, (0.0, 0))
        found[number] = (total + float(logs.double().sum()), tokens + logs.numel())
    return found


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Area under the ROC curve, by ranks: P(member > other) + ½ P(member = other), in [0, 1].

    Args:
        members: scores, at least one.
        others: scores, at least one.
    """
    ordered = torch.tensor(others, dtype=torch.float64).sort().values
    wanted = torch.tensor(members, dtype=torch.float64)
    below, not_above = (torch.searchsorted(ordered, wanted, right=right) for right in (False, True))
    return float((below + not_above).double().mean()) / (2 * len(others))


def separation(
    members: Mapping[int, float],
    others: Mapping[int, float],
    *,
    seed: int = 0,
    samples: int = 1000,
    confidence: float = 0.95,
) -> Separation:
    """AUC with a percentile bootstrap interval; members and others are drawn again each by themselves.

    Args:
        members: record number -> score, at least one.
        others: record number -> score, at least one.
        seed: of the draws.
        samples: bootstrap samples.
        confidence: share of the samples inside the interval.

    Source: Efron and Tibshirani 1993, section 13.3.
    """
    a = torch.tensor(list(members.values()), dtype=torch.float64)
    b = torch.tensor(list(others.values()), dtype=torch.float64)
    generator = Generator().manual_seed(seed)
    drawn_a, drawn_b = _counts(a.numel(), samples, generator), _counts(b.numel(), samples, generator)
    found = torch.zeros(samples, dtype=torch.float64)
    step = max(1, BLOCK // b.numel())
    for begin in range(0, a.numel(), step):
        part = a[begin : begin + step].unsqueeze(1)
        wins = (part > b).double() + 0.5 * (part == b).double()
        found += ((drawn_a[:, begin : begin + step] @ wins) * drawn_b).sum(1)
    found /= a.numel() * b.numel()
    tail = (1 - confidence) / 2
    low, high = torch.quantile(found, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Separation(auc(a.tolist(), b.tolist()), low, high)


def attacked(
    probe: Probe, name: str, score: Callable[[Probe], Measured], *, samples: int, confidence: float, seed: int
) -> Measured:
    """A set's scores, and how well they tell its records from the holdout's.

    Args:
        probe: the set.
        name: under which the scores are kept, parameters included.
        score: gives the records' scores.
        samples: see :func:`separation`.
        confidence: see :func:`separation`.
        seed: see :func:`separation`.

    Returns:
        The mean score with the records' scores; the parts ``auc``, ``auc_low`` and ``auc_high``, or why there are none.
    """
    own = probe.once(name, lambda: score(probe))
    if own.value is None or probe.records.name == "holdout":
        return own
    if probe.holdout is None:
        return own.with_parts(auc=Measured.missing(NO_HOLDOUT))
    holdout = probe.holdout
    others = holdout.once(name, lambda: score(holdout))
    if others.value is None:
        return own.with_parts(auc=Measured.missing(f"holdout: {others.reason}"))
    found = separation(own.per_record, others.per_record, seed=seed, samples=samples, confidence=confidence)
    return own.with_parts(auc=found.auc, auc_low=found.low, auc_high=found.high)


def _counts(size: int, samples: int, generator: Generator) -> Tensor:
    """How often each of ``size`` items is drawn in each sample, ``[samples, size]``."""
    drawn = torch.randint(size, (samples, size), generator=generator)
    return torch.zeros(samples, size, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1, dtype=torch.float64).expand(samples, size)
    )
