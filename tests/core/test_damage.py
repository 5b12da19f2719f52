"""Damaged answers: what is replaced, how much of it, by what, and that labels and caller's batch stay."""

from __future__ import annotations

import pytest
import torch
from randomness import seeded
from scipy.stats import binom
from torch import Tensor, nn

from alkn.core.damage import damaged, through_damage
from alkn.core.scoring import Batch, Example, collate

CPU = torch.device("cpu")


def numbered(records: int, prompt: int, answer: int) -> Batch:
    """Records whose tokens are all different, so that every token tells where it stood; longer and longer answers."""
    examples, first = [], 0
    for extra in range(records):
        length = prompt + answer + extra
        examples.append(Example(torch.arange(first, first + length) + 1, prompt))
        first += length
    return collate(examples, range(records), device=CPU)


def changed(before: Batch, after: Batch) -> Tensor:
    return before.input_ids != after.input_ids


def test_only_inputs_that_a_label_is_predicted_from_are_replaced_by_others_of_them() -> None:
    batch = numbered(6, prompt=5, answer=4)
    given = batch.input_ids.clone()
    after = damaged(batch, 0.9, seeded())
    assert torch.equal(batch.input_ids, given)
    assert after.records == batch.records and all(
        torch.equal(getattr(after, name), getattr(batch, name)) for name in ("positions", "targets", "rows")
    )
    hit = changed(batch, after).flatten()
    read = torch.zeros_like(hit)
    read[batch.positions] = True
    assert hit.any() and not (hit & ~read).any()
    sources = set(batch.input_ids.flatten()[batch.positions].tolist())
    assert set(after.input_ids.flatten()[hit].tolist()) <= sources
    assert torch.equal(after.input_ids, damaged(batch, 0.9, seeded()).input_ids)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_half_of_the_records_and_the_share_of_their_tokens(share: float) -> None:
    """Inside the 99.99 % interval of a binomial distribution; a token that replaces itself does not show."""
    batch = numbered(400, prompt=3, answer=30)
    inputs = torch.bincount(batch.rows)
    hits = changed(batch, damaged(batch, share, seeded(1))).sum(1)
    drawn = hits > 0
    low, high = binom.interval(0.9999, 400, 0.5)
    assert low <= int(drawn.sum()) <= high
    low, high = binom.interval(0.9999, int(inputs[drawn].sum()), share)
    assert low <= int(hits[drawn].sum()) <= high


def test_a_loss_sees_other_damage_each_time_and_none_with_a_share_of_zero() -> None:
    batch, seen = numbered(8, prompt=2, answer=9), []

    def loss(_: nn.Module, given: Batch) -> Tensor:
        seen.append(given.input_ids)
        return torch.zeros(())

    assert through_damage(loss, 0.0, seeded()) is loss
    through = through_damage(loss, 0.5, seeded())
    for _ in range(2):
        through(nn.Identity(), batch)
    assert not torch.equal(seen[0], seen[1])
    assert all(not torch.equal(one, batch.input_ids) for one in seen)
