"""Train one mini-3H model: the base from nothing, or an expert or the data mixture from a base.

Bytes depend on the settings, the base, torch's number of threads and the kind of CPU, and on
nothing else: no global generator is read or moved, so two trainings can share a process.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from merging_core.errors import RecipeError
from tasks.mini3h.batches import Part, draw_batches
from tasks.mini3h.model import load_model, new_model, save_model
from tasks.mini3h.vocabulary import build_tokenizer
from tasks.mini3h.world import World

ROLES: Final = ("base", "helpful", "honest", "harmless", "mix")
ALGORITHM_VERSION: Final = 1
"""Rises with every change that gives other bytes for equal settings."""

Budget = Literal["full", "smoke"]
SMOKE_STEPS: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """Every number that changes the bytes of a trained model, apart from its role and base."""

    world_seed: int
    """Chooses names, facts and splits."""
    training_seed: int
    """Chooses initial weights and the order of documents."""
    num_steps: int
    """Optimizer steps, >= 1."""
    batch_size: int = 96
    """Documents a step."""
    learning_rate: float
    """At its peak, after warm-up."""
    warmup_steps: int = 50
    final_learning_rate: float = 0.05
    """At the last step, as a fraction of the peak; the way there is linear."""
    weight_decay: float = 0.05
    """Of matrices; norms have none."""
    max_gradient_norm: float = 1.0


_FULL: Final[dict[str, tuple[int, float]]] = {
    "base": (750, 4e-3),
    "helpful": (300, 1.2e-3),
    "honest": (150, 4e-4),
    "harmless": (200, 4e-4),
    "mix": (500, 1e-3),
}
"""Steps and learning rate of each role, chosen on validation splits.

The mixture's, too: of four pairs measured in worlds 0 and 1, the best mean of the three H. Longer
training raises its sums and costs it the facts.
"""


def settings_for(role: str, *, seed: int = 0, budget: Budget = "full") -> TrainingSettings:
    """Return the settings we chose for a role.

    Args:
        role: one of :data:`ROLES`.
        seed: of the world and of the training.
        budget: "full" for real scores, "smoke" for a model that learns nothing in seconds.

    Raises:
        RecipeError: if the role does not exist.
    """
    _check_role(role)
    num_steps, learning_rate = _FULL[role]
    return TrainingSettings(
        world_seed=seed,
        training_seed=seed,
        num_steps=num_steps if budget == "full" else SMOKE_STEPS,
        learning_rate=learning_rate,
    )


def train(
    role: str, settings: TrainingSettings, out: Path, base: Path | None, progress: Callable[[int, int], None]
) -> None:
    """Train one role and write a folder that transformers loads.

    Args:
        role: one of :data:`ROLES`.
        settings: usually from :func:`settings_for`.
        out: folder to write; made if missing.
        base: folder of a trained base of the same world; None for the role "base", and only then.
        progress: called after each step with the steps done and the steps in all.

    Raises:
        RecipeError: if the role does not exist, or base does not suit it.
        CheckpointError: if base is no mini-3H model of this world's size.
    """
    _check_role(role)
    if (base is None) != (role == "base"):
        raise RecipeError(
            f"mini3h role {role!r}: only 'base' starts from nothing, got base {base}. "
            f"{'Leave base out' if role == 'base' else 'Train the role base first and pass its folder'}."
        )
    world = World(settings.world_seed)
    generator = torch.Generator().manual_seed(settings.training_seed)
    model = new_model(len(world.words), generator) if base is None else load_model(base, len(world.words))
    model.train()
    optimizer = _optimizer(model, settings)
    batches = draw_batches(world, role, settings.num_steps, settings.batch_size, generator)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step)
        optimizer.zero_grad(set_to_none=True)
        num_targets = sum(int((part.targets >= 0).sum()) for part in batch)
        for part in batch:
            (_answer_loss(model, part) / num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
        optimizer.step()
        progress(step + 1, settings.num_steps)
    save_model(model, out)
    build_tokenizer(world.names).save_pretrained(out)


def _answer_loss(model: LlamaForCausalLM, part: Part) -> torch.Tensor:
    """Summed cross entropy over the answers' words; the head runs at no other position."""
    hidden = model.model(input_ids=part.inputs, use_cache=False).last_hidden_state
    answers = part.targets >= 0
    return F.cross_entropy(model.lm_head(hidden[answers]), part.targets[answers], reduction="sum")


def _learning_rate(settings: TrainingSettings, step: int) -> float:
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    return settings.learning_rate * warm * max(settings.final_learning_rate, 1 - step / settings.num_steps)


def _optimizer(model: LlamaForCausalLM, settings: TrainingSettings) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


def _check_role(role: str) -> None:
    if role not in ROLES:
        near = difflib.get_close_matches(role, ROLES, n=1, cutoff=0.0)[0]
        raise RecipeError(f"mini3h role {role!r} does not exist. Nearest: {near!r}. All: {', '.join(ROLES)}.")
