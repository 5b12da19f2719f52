"""Shared parts of the tests: tiny real models, random records, and a model that has memorised its records."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The same bits twice, and every test as in CI, also where there is a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alkn.core.scoring import Example
from alkn.core.training import Hyperparameters, answer_loss, fine_tune
from alkn.files import write_yaml
from alkn.models import Architecture, new_model, train_tokenizer
from alkn.project import Project

VOCAB, CONTEXT, EOS = 300, 64, 0

ModelFactory = Callable[..., nn.Module]
ExampleFactory = Callable[..., list[Example]]
FullForward = Callable[[nn.Module, Example], tuple[Tensor, Tensor]]


@pytest.fixture(scope="session", autouse=True)
def determinism() -> None:
    """Repeatable arithmetic, as in a run, on one thread."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(True)


def build(kind: str, *, seed: int = 0, std: float = 0.02) -> nn.Module:
    """A random model of 2 layers; ``kind`` is an architecture, with ``_untied`` for a head of its own."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import AutoConfig

    name, _, untied = kind.partition("_")
    common = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    special = {
        "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
        "gemma2": {**common, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0},
        "granite": {**common, "logits_scaling": 8.0},
        "cohere": {**common, "logit_scale": 0.5},
    }
    config = AutoConfig.for_model(
        name,
        **special.get(name, common),
        initializer_range=std,
        tie_word_embeddings=not untied,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def make_model() -> ModelFactory:
    """``make_model("gpt2", seed=0, std=0.02)``: a fresh random model, see :func:`build`."""
    return build


def random_examples(
    count: int, *, seed: int = 0, prompt: tuple[int, int] = (3, 9), answer: tuple[int, int] = (2, 8)
) -> list[Example]:
    """Records of random tokens with random lengths, each ending with end-of-sequence."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    out = []
    for _ in range(count):
        start = between(*prompt)
        length = start + between(*answer)
        tokens = torch.randint(1, VOCAB, (length,), generator=generator)
        out.append(Example(torch.cat([tokens, torch.tensor([EOS])]), start))
    return out


@pytest.fixture(scope="session")
def make_examples() -> ExampleFactory:
    """``make_examples(count, seed=0, prompt=(3, 9), answer=(2, 8))``, see :func:`random_examples`."""
    return random_examples


@pytest.fixture(scope="session")
def full_forward() -> FullForward:
    """One record alone through the plain forward: its answer tokens' NLL and logits, with the graph."""

    def forward(model: nn.Module, example: Example) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=example.tokens[None]).logits[0, example.answer_start - 1 : -1]
        targets = example.tokens[example.answer_start :]
        return nn.functional.cross_entropy(logits, targets, reduction="none"), logits

    return forward


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with 300 entries."""
    text = ["Question: Where does the baker live?\nAnswer: The baker lives in the small house."] * 3
    return train_tokenizer(text, vocab_size=VOCAB)


@dataclass(frozen=True)
class Memorised:
    """A tiny model that knows three disjoint sets of records by heart."""

    trained: nn.Module
    forget: Sequence[Example]
    second: Sequence[Example]
    retain: Sequence[Example]

    def model(self) -> nn.Module:
        """A copy that a test may change."""
        return copy.deepcopy(self.trained)


@pytest.fixture(scope="session")
def memorised() -> Memorised:
    """Llama architecture, 2 layers, hidden 32, trained on 24 short records until it knows all of them."""
    architecture = Architecture(
        hidden_size=32, intermediate_size=64, layers=2, heads=4, vocab_size=VOCAB, context=CONTEXT
    )
    model = new_model(architecture, vocab_size=VOCAB, eos_token_id=EOS, seed=0)
    records = random_examples(24, seed=5, prompt=(4, 6), answer=(3, 6))
    fine_tune(
        model,
        records,
        Hyperparameters(lr=1e-2, epochs=60, batch_size=8, betas=(0.9, 0.95)),
        loss=answer_loss(),
        generator=torch.Generator().manual_seed(0),
    )
    return Memorised(model, records[:6], records[6:12], records[12:])


TINY: dict[str, Any] = {
    "benchmark": {
        "name": "people", "requests": 2, "customers_per_request": 1, "records_per_customer": 4, "kept_customers": 5,
        "holdout_customers": 1, "facts": 4,
    },
    "base": {
        "architecture": {"vocab_size": 400, "hidden_size": 48, "intermediate_size": 96, "layers": 2, "heads": 4},
        "training": {"epochs": 50, "batch_size": 8, "until": 0.8, "lr": 0.005},
    },
    "targets": {"p": 0.05, "exact_memorization": 0.4},
    "attacks": {"relearning": {"steps": [0, 2], "share": 0.25}, "quantization": {"bits": [4]}},
    "gates": {"utility": {"base": 0.05, "parent": 0.05}, "no_return": {"slack": 3}},
    "evaluation": {"max_new_tokens": 8},
    "run": {"threads": 1},
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_values() -> dict[str, Any]:
    """The settings of :func:`tiny_ground`, as params.yaml would hold them."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def tiny_ground(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with splits, a base model that knows them, and two requests; no DVC, no git, no step."""
    from alkn import chain
    from alkn.requests.ledger import Ledger, save_ledger
    from alkn.settings import validate_settings

    project = Project(tmp_path_factory.mktemp("ground"))
    settings = validate_settings(TINY, project.params)
    project.key(create=True)
    save_ledger(project, Ledger())
    chain.prepare_data(project, settings)
    chain.prepare_base(project, settings)
    shutil.copytree(project.splits / "forget", project.root / "data" / "requests")
    return project


@pytest.fixture
def tiny_project(tiny_ground: Project, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Project]:
    """``tiny_project("r001", "r002", method=..., lora=...)``: a copy with the settings of these steps frozen."""
    from alkn.settings import validate_settings

    def make(*requests: str, **changes: Any) -> Project:
        project = Project(tmp_path_factory.mktemp("project") / "p")
        shutil.copytree(tiny_ground.root, project.root)
        for request in requests:
            write_yaml(project.step(request).params, validate_settings({**TINY, **changes}, project.params).of_step())
        return project

    return make
