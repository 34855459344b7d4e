"""Adding a merged update to the base block by block: beside inputs and result no tensor lies in memory as a whole."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from merging_core.methods.base import add_update
from merging_core.sparsity import SparseUpdate, Walk, flat_blocks


def merge_blocks(base: Tensor, updates: Iterable[Tensor], scale: float, walk: Walk = flat_blocks) -> Tensor:
    """``base + scale * update``, the update given block by block.

    Args:
        base: any shape.
        updates: blocks of the merged update, in the order of ``walk``; not touched if the scale is 0.
        scale: factor on the update.
        walk: how the base is divided into blocks.

    Returns:
        A new tensor like the base; with ``scale = 0`` its copy, bit for bit.
    """
    if scale == 0:
        return base.clone()
    merged = torch.empty_like(base, memory_format=torch.contiguous_format)
    for target, origin, update in zip(walk(merged), walk(base), updates, strict=True):
        target.copy_(add_update(origin, update.mul_(scale)))
    return merged


def merge_sparse(
    base: Tensor, updates: Sequence[SparseUpdate], combine: Callable[[Sequence[Tensor]], Tensor], scale: float
) -> Tensor:
    """``base + scale * combine(updates)``, block by block; see :func:`merge_blocks`."""
    blocks = (combine(parts) for parts in zip(*(update.blocks() for update in updates), strict=True))
    return merge_blocks(base, blocks, scale, updates[0].walk)
