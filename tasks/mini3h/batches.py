"""Training batches: documents drawn by their mixture's shares, as padded token ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tasks.mini3h.data import Document, training_documents
from tasks.mini3h.vocabulary import BOS_ID, EOS_ID, PAD_ID
from tasks.mini3h.world import World

NO_TARGET: Final = -100
PARTS: Final = 2
"""Rectangles a batch is cut into, by length: the short half then carries little padding (30 % faster)."""


@dataclass(frozen=True, slots=True)
class Part:
    """Documents padded on the right; causal attention lets no real position see the padding."""

    inputs: Tensor
    """(documents, positions) int64 token ids."""
    targets: Tensor
    """(documents, positions) int64: the next token where it belongs to the answer, else -100."""


def draw_batches(
    world: World, role: str, num_steps: int, batch_size: int, generator: torch.Generator
) -> Iterator[list[Part]]:
    """Yield ``num_steps`` batches of ``batch_size`` documents, drawn with replacement."""
    drawable = training_documents(world, role)
    ids = {word: index for index, word in enumerate(world.words)}
    encoded = [encode(document, ids) for document, _ in drawable]
    lengths = torch.tensor([len(inputs) for inputs, _ in encoded])
    width = int(lengths.max())
    inputs = torch.tensor([row + [PAD_ID] * (width - len(row)) for row, _ in encoded])
    targets = torch.tensor([row + [NO_TARGET] * (width - len(row)) for _, row in encoded])
    shares = torch.tensor([share for _, share in drawable], dtype=torch.float64)
    order = torch.multinomial(shares, num_steps * batch_size, replacement=True, generator=generator)
    for drawn in order.split(batch_size):
        by_length = drawn[lengths[drawn].argsort(stable=True)]
        yield [
            Part(inputs[rows, :longest], targets[rows, :longest])
            for rows in by_length.tensor_split(PARTS)
            for longest in [int(lengths[rows].max())]
        ]


def encode(document: Document, ids: dict[str, int]) -> tuple[list[int], list[int]]:
    """Return input ids and next-token targets; only the answer and its end are targets."""
    prompt = [BOS_ID, *(ids[word] for word in document.prompt.split())]
    tokens = [*prompt, *(ids[word] for word in document.answer.split()), EOS_ID]
    hidden = len(prompt) - 1
    return tokens[:-1], [NO_TARGET] * hidden + tokens[hidden + 1 :]
