"""Truth ratios by hand, and through a model against a plain forward."""

from __future__ import annotations

import math

import pytest
import torch

from alkn.core.probe import RecordSet
from alkn.core.truth_ratio import ratio_of_nll, truth_ratios


def test_by_hand() -> None:
    """Right 1/2; wrong 1/4 and 1/16: geometric mean 1/8, arithmetic 5/32."""
    right = torch.tensor([0.5]).log().neg()
    wrong = [torch.tensor([0.25, 0.0625]).log().neg()]
    assert float(ratio_of_nll(right, wrong)) == pytest.approx(0.25)
    assert float(ratio_of_nll(right, wrong, form="bounded")) == pytest.approx(0.8)  # 1/2 / (1/2 + 1/8)
    assert float(ratio_of_nll(right, wrong, mean="arithmetic")) == pytest.approx(5 / 16)
    assert float(ratio_of_nll(right, wrong, mean="arithmetic", form="bounded")) == pytest.approx(16 / 21)


def test_the_bounded_form_keeps_what_the_ratio_loses() -> None:
    """Far beyond what exp can hold, the bounded form is still a number in [0, 1]."""
    right, wrong = torch.tensor([2000.0, 0.0]), [torch.tensor([1.0]), torch.tensor([2000.0])]
    assert ratio_of_nll(right, wrong, form="bounded").tolist() == [0.0, 1.0]


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_through_a_model(mean, make_model, make_examples, full_forward) -> None:
    model = make_model("llama", std=0.5)
    right, wrong = make_examples(3, seed=1), make_examples(6, seed=2)
    groups = [wrong[:1], wrong[1:3], wrong[3:]]
    found = truth_ratios(model, RecordSet("forget", [4, 7, 9], right, ["", "", ""], right, groups), mean=mean)
    for number, paraphrase, others in zip((4, 7, 9), right, groups, strict=True):
        p = math.exp(-float(full_forward(model, paraphrase)[0].detach().mean()))
        q = [math.exp(-float(full_forward(model, other)[0].detach().mean())) for other in others]
        middle = sum(q) / len(q) if mean == "arithmetic" else math.prod(q) ** (1 / len(q))
        assert found.per_record[number] == pytest.approx(middle / p, rel=1e-4)
    assert found.values == list(found.per_record.values()) and not found.left_out


def test_what_a_record_lacks_is_said(make_model, make_examples) -> None:
    model, e = make_model("llama"), make_examples(3)
    records = RecordSet("forget", [0, 1, 2], e, ["", "", ""], [e[0], None, e[2]], [[e[1]], [e[1]], []])
    found = truth_ratios(model, records)
    assert set(found.per_record) == {0}
    assert found.left_out == {1: "no paraphrased_answer", 2: "no perturbed_answer"}
    assert truth_ratios(model, RecordSet("forget", [1], e[1:2], [""], [None], [[]])).values == []
