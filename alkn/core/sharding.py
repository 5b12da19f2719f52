"""Weights split over processes by FSDP2, in a model whose methods read its logits at labelled positions only."""

from __future__ import annotations

from types import MethodType

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from alkn.core.blocks import decoder_blocks
from alkn.core.distributed import processes
from alkn.core.labelled import LABELLED, has_plain_head, labelled


def split_(model: nn.Module, *, device: torch.device) -> nn.Module:
    """Split the weights of a model over all processes, in place; its parameters become ``DTensor``.

    A decoder block is gathered when it is run and let go afterwards, embeddings, norm and head together.
    All are let go after every pass, or a change of weights between two passes would not be seen.

    Args:
        model: a transformers causal language model with the same weights in every process, in memory of any kind.
        device: where the parts go.

    Returns:
        The same model.

    Source: FSDP2, ``torch.distributed.fsdp.fully_shard``.
    """
    has_plain_head(model)  # asks once, by running parts of the model, which a split one does not allow
    mesh = init_device_mesh(device.type, (processes(),))
    for block in decoder_blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    setattr(model, LABELLED, MethodType(labelled, model))
    register_fsdp_forward_method(model, LABELLED)
    return model
