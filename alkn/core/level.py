"""The level: how likely each token of a record would be to a model that never saw it, and as sure as this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alkn.core.background import BackgroundModel
from alkn.core.scoring import Example, read_labels
from alkn.core.training import log_odds
from alkn.core.unlearning import Forgetting, StopRule

SAMPLE = 512
"""Records that are enough to see how sure a model is."""


@dataclass(frozen=True)
class Sureness:
    """How sure a model is of words, beside a background model of the same words.

    Attributes:
        scale: κ: the model's mean log-odds of a word that is drawn at random from the answers, over the background
            model's, at the same places; at least 1. On records that a model never saw, its log-odds spread κ times as
            far as the background model's, too.
        highest: the model's mean log-odds of the words that do stand there.
    """

    scale: float
    highest: float

    @classmethod
    def of(cls, model: nn.Module, examples: Sequence[Example], background: BackgroundModel) -> Sureness:
        """Measure both on the answers of records that the model knows.

        Args:
            model: a causal language model on its device.
            examples: at least one; of more than :data:`SAMPLE` every so many-th.
            background: over the model's vocabulary.

        Source: own.
        """
        examples = examples[:: -(-len(examples) // SAMPLE)]
        answers = torch.cat([example.tokens[example.answer_start :] for example in examples])
        shares = torch.bincount(answers, minlength=background.vocab_size) / len(answers)

        def read(logits: Tensor, targets: Tensor) -> Tensor:
            log_p = torch.log_softmax(logits, -1)
            # At most log 1e9: one word of a place may be all but certain.
            drawn = (log_p - torch.log((-torch.expm1(log_p)).clamp(min=1e-9))) @ shares.to(log_p)
            return torch.stack([log_odds(logits, targets), drawn])

        # Three times [labels, V] at once: a quarter of the tokens that are scored at once.
        values = read_labels(model, examples, read, columns=2, max_tokens=2048)
        own, drawn = torch.cat(values, dim=1).double().mean(1).tolist()
        before = torch.cat([example.tokens[example.answer_start - 1 : -1] for example in examples])
        places = torch.bincount(before, minlength=background.vocab_size)
        expected = sum(
            int(places[v]) * float(torch.logit(background.probabilities(v)) @ shares.double())
            for v in torch.nonzero(places).flatten().tolist()
        )
        return cls(max(1.0, drawn / (expected / len(before))), own)


class Level:
    """The log-odds that every answer token of some records shall have: κ · (logit P(background) + shift), bounded.

    Those below even odds lie κ · ``gap`` lower: a model that memorised the records finds rare words of them easily.

    Args:
        background: what a reader knows who saw none of the records.
        examples: the records.
        sureness: κ, and the upper bound.
        shift: what a trained model guesses better than word order alone lets one guess, in nats before κ.
        gap: nats before κ, at least 0.

    Attributes:
        odds: per record, ``[answer_length]``; lowered in place.
        scale: κ.
    """

    def __init__(
        self,
        background: BackgroundModel,
        examples: Sequence[Example],
        sureness: Sureness,
        *,
        shift: float,
        gap: float = 0.0,
    ) -> None:
        self.scale = sureness.scale
        self.odds = [
            (self.scale * (torch.logit(background.answer(e)) + shift)).clamp(max=sureness.highest) for e in examples
        ]
        for z in self.odds:
            z.sub_(self.scale * gap * (z < 0))

    def said(self) -> Forgetting:
        """The two numbers of a model that gives each token just these log-odds, and one other token the rest."""
        p = torch.stack([torch.exp(nn.functional.logsigmoid(z).mean()) for z in self.odds])
        guessed = torch.stack([(z > 0).float().mean() for z in self.odds])
        return Forgetting(float(p.mean()), float(guessed.mean()))

    def lower(self, now: Forgetting, stop: StopRule, *, by: float) -> bool:
        """Expect less if the target is missed, of all tokens or only of those that nobody would guess.

        Of all if too much is guessed right, or if records whose every token is guessed hold P above the target by
        themselves: short answers that many records share.

        Args:
            now: what was measured.
            stop: the target.
            by: nats.

        Returns:
            Whether it was missed.
        """
        certain = sum(float(torch.exp(nn.functional.logsigmoid(z).mean())) for z in self.odds if bool((z >= 0).all()))
        guessed = now.exact_memorization > stop.exact_memorization or certain / len(self.odds) > stop.p
        missed = guessed or now.p > stop.p
        for z in self.odds if missed else ():
            z.sub_(by * ((z < 0) | guessed))
        return missed
