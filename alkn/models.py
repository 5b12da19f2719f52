"""Models and tokenizers on disk: load, save, build from scratch, train a tokenizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from alkn.core.limits import longest_input
from alkn.errors import InputError
from alkn.registry import Params

# Our own bars tell what goes on; these would flicker between them.
disable_progress_bar()

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"


class Architecture(Params):
    """A Llama-architecture model trained from scratch.

    Attributes:
        hidden_size, intermediate_size, layers, heads: the usual Llama dimensions.
        vocab_size: entries of the byte-level BPE vocabulary, at least 300.
        context: longest record in tokens.
    """

    hidden_size: int = Field(128, ge=1)
    intermediate_size: int = Field(320, ge=1)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    vocab_size: int = Field(2048, ge=300)
    context: int = Field(512, ge=8)

    @model_validator(mode="after")
    def _heads_fit(self) -> Architecture:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size must be a multiple of 2 * heads, {2 * self.heads}")
        return self


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with one special token, end of text.

    Train it on retain and generic text only: a vocabulary remembers names.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def new_model(architecture: Architecture, *, vocab_size: int, eos_token_id: int, seed: int) -> nn.Module:
    """A randomly initialised Llama-architecture causal language model in float32, tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.heads,
        max_position_embeddings=architecture.context,
        tie_word_embeddings=True,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def check_model_folder(path: Path) -> None:
    """Refuse a folder that is no transformers model with safetensors weights.

    Raises:
        InputError: naming the folder and what is missing.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such model folder")
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: not a transformers model folder, config.json is missing")
    if not any(path.glob("*.safetensors")):
        pickled = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt"))
        hint = f" ({pickled[0]} is a pickle, which is never read: convert it)" if pickled else ""
        raise InputError(f"{path}: the model folder holds no weights in *.safetensors{hint}")


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model folder.

    Raises:
        InputError: if it cannot be read or has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: its tokenizer cannot be read ({type(error).__name__})") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: its tokenizer has no end-of-sequence token")
    return tokenizer


def context_length(path: Path, *, trust_remote_code: bool = False) -> int:
    """The longest input of a local model, in tokens."""
    config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=trust_remote_code)
    return longest_input(config) or 2048


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | Literal["auto"] = "auto",
    trust_remote_code: bool = False,
) -> nn.Module:
    """A local causal language model in evaluation mode.

    Args:
        path: folder with config.json and safetensors weights.
        device: where to put it.
        dtype: ``"auto"``: the stored precision.
        trust_remote_code: run the folder's own Python; off unless the user says so by name.

    Raises:
        InputError: if the folder is not such a model.
    """
    check_model_folder(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: the model cannot be loaded ({type(error).__name__}: {error})") from error
    placed: nn.Module = model.to(device).eval()  # type: ignore[arg-type]
    return placed


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write model and tokenizer as a transformers folder that holds no time, path or host."""
    causal_lm: Any = model
    path.mkdir(parents=True)
    causal_lm.config._name_or_path = ""
    causal_lm.save_pretrained(str(path))
    tokenizer.save_pretrained(str(path))
    for junk in path.glob("README.md"):
        os.unlink(junk)
