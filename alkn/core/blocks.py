"""The decoder blocks of a causal language model, found without knowing the names of its modules."""

from __future__ import annotations

from torch import Tensor, nn

from alkn.errors import InputError


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of modules that holds most parameters: in every decoder, its blocks in order.

    By parameters and not by length: a mixture of experts has lists of experts inside its blocks.

    Raises:
        InputError: if the model has no list of modules.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of decoder blocks")
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def down_projection(block: nn.Module, width: int) -> nn.Parameter:
    """The matrix with which a block's MLP writes into the residual stream.

    It is the last matrix that the block registers: ``down_proj`` of Llama and Qwen2, ``c_proj`` of
    GPT-2 (whose matrices are transposed), ``fc2``, ``dense_4h_to_h`` of others.

    Args:
        block: a decoder block.
        width: size of the residual stream.

    Raises:
        InputError: if that matrix does not have the stream's width on one side.
    """
    matrices = [p for p in block.parameters() if p.dim() == 2]
    if not matrices or width not in matrices[-1].shape:
        raise InputError(f"{type(block).__name__}: its last matrix is no projection into a stream of width {width}")
    return matrices[-1]


class Hidden:
    """The output of one block, caught in the forward pass.

    Args:
        block: which.

    Attributes:
        value: hidden states of the latest forward pass, ``[batch, seq, hidden]``, with their graph.
    """

    def __init__(self, block: nn.Module) -> None:
        self.value: Tensor
        self._hook = block.register_forward_hook(self._catch)

    def close(self) -> None:
        """Leave the block as it was."""
        self._hook.remove()

    def _catch(self, _module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self.value = output if isinstance(output, Tensor) else output[0]
