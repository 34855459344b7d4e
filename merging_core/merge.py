"""The merge itself: one tensor at a time from the inputs to the output folder."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from merging_core.adapter import Adapter, open_expert
from merging_core.blocks import is_finite
from merging_core.calibration import Calibration
from merging_core.checkpoint import Checkpoint, TensorInfo, natural_order
from merging_core.compatibility import check_compatible, own_tensors
from merging_core.devices import place
from merging_core.errors import IncompatibleError, NumericalError
from merging_core.jobs import MatrixDiagnostics, SpectralJob, TensorJob
from merging_core.memory import memory_of
from merging_core.methods.base import BlockMethod, CalibratedMethod, SpectralMethod, add_update
from merging_core.notes import Notes
from merging_core.recipe import DTYPES, Recipe
from merging_core.rules import Treatment, treatments
from merging_core.task_vectors import TaskVectors, read_statistics, require_finite
from merging_core.threads import one_torch_thread
from merging_core.updates import mean_update
from merging_core.writer import shards, write_checkpoint


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where the inputs of a merge lie."""

    base: Path
    experts: Mapping[str, Path]
    """Expert name to checkpoint folder."""
    vectors: Mapping[str, Path] = field(default_factory=dict)
    """Expert name to task-vectors folder; needed by spectral methods."""
    statistics: Mapping[str, Path] = field(default_factory=dict)
    """Expert name to statistics folder; needed where the method asks for them."""
    calibration: Mapping[str, Path] = field(default_factory=dict)
    """Expert name to calibration folder; needed where the method asks for them."""


def merge(
    recipe: Recipe,
    inputs: Inputs,
    out: Path,
    progress: Callable[[int], None] = lambda num_bytes: None,
    notes: Path | None = None,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    only: str | None = None,
) -> list[MatrixDiagnostics]:
    """Write the merged weights into an existing folder.

    Every tensor of the base is merged; or copied or averaged by the policy of a rule; or, if it is not a floating-point
    tensor, copied after checking that all experts agree. Same inputs give the same bytes, whatever their shard layout.

    Args:
        recipe: what to merge, how and in which precision.
        inputs: where the checkpoints and what was computed from them lie.
        out: existing folder for the safetensors files.
        progress: called with the bytes of each tensor written.
        notes: folder for what a merge needs to go on after it was killed. A call with the same arguments goes on with
            the first output shard that is not complete; without it, all is computed.
        devices: where tensors are merged; several share them by bytes.
        only: the one file to write, of :func:`merged_shards`; default: all, and the index where there are several.

    Returns:
        For spectral methods, ranks and weights of each matrix written, in the order of the layers; else nothing.

    Raises:
        IncompatibleError: if the checkpoints do not fit together, or a tensor that is only copied differs.
        RecipeError: if a rule holds for no tensor, or gives a setting out of bounds.
        NumericalError: if a merged tensor is not finite.
    """
    with ExitStack() as stack:
        base = stack.enter_context(Checkpoint(inputs.base, "the base"))
        experts = {
            expert.name: stack.enter_context(open_expert(inputs.experts[expert.name], base, f"expert {expert.name!r}"))
            for expert in recipe.experts
        }
        expected = check_compatible(base, experts)
        plan = plan_tensors(recipe, expected)
        layout = {name: TensorInfo(_stored_dtype(recipe, info), info.shape) for name, info in expected.items()}
        placed = place({name: info.num_bytes for name, info in layout.items()}, devices)
        stack.enter_context(one_torch_thread())
        job: TensorJob | SpectralJob
        if isinstance(recipe.method, SpectralMethod):
            vectors = [
                stack.enter_context(TaskVectors(inputs.vectors[expert.name], expert.name)) for expert in recipe.experts
            ]
            measured = (
                [read_statistics(inputs.statistics[expert.name]) for expert in recipe.experts]
                if recipe.method.statistics
                else []
            )
            job = SpectralJob(recipe, base, placed, vectors, measured)
        else:
            calibrations = (
                [stack.enter_context(Calibration(inputs.calibration[name], name)) for name in experts]
                if isinstance(recipe.method, CalibratedMethod)
                else []
            )
            job = TensorJob(recipe, base, placed, list(experts.values()), plan, layout, calibrations)

        def compute(name: str) -> Tensor:
            if name not in plan:
                return _copied(name, base, experts)
            treatment = plan[name]
            if treatment.policy == "base":
                merged = base.load(name)
            elif treatment.expert:
                merged = experts[treatment.expert].load(name)
            else:
                inner = _mean if treatment.policy == "mean" else job.compute
                merged = inner(name, treatment)
                if getattr(treatment.method, "scale", 1.0) == 0:
                    # Nothing of the experts is in the result; what is broken is an error all the same.
                    for checkpoint in experts.values():
                        require_finite(name, checkpoint.load(name), checkpoint.name)
                if treatment.factor != 1:
                    start = base.load(name).to(merged)
                    merged = add_update(start, (merged - start).mul_(treatment.factor))
            merged = merged.to(layout[name].dtype)
            if not is_finite(merged):
                _explain(name, recipe, [base, *experts.values()], layout[name].dtype)
            return merged

        def _mean(name: str, treatment: Treatment) -> Tensor:
            start, *tuned = job.load(name, (base, *experts.values()))
            update = mean_update(start, tuned, treatment.weights)
            return add_update(start, update.mul_(getattr(treatment.method, "scale", 1.0)))

        memory = memory_of(layout, len(experts), _copied_as(recipe, [base, *experts.values()]))
        noted = Notes(notes) if notes else None
        write_checkpoint(
            out,
            layout,
            compute,
            max_shard_bytes=recipe.max_shard_bytes,
            only=only,
            num_workers=max(os.cpu_count() or 1, len(devices)),
            held=memory.held.__getitem__,
            max_held=math.inf if isinstance(job, SpectralJob) else memory.most,
            written=progress,
            keep=noted.has if noted else lambda file: False,
            finished=lambda file, names: noted.add(file, names, job.diagnostics) if noted else None,
        )
        return sorted(noted.read() if noted else job.diagnostics, key=lambda one: natural_order(one.tensor))


def plan_tensors(recipe: Recipe, tensors: Mapping[str, TensorInfo]) -> dict[str, Treatment]:
    """How each floating-point tensor is merged; the others are copied, and no rule changes that.

    Raises:
        RecipeError: see :func:`merging_core.rules.treatments`.
    """
    names = [name for name, info in tensors.items() if info.dtype.is_floating_point]
    return treatments(names, recipe.method, recipe.weight_of, recipe.rules, recipe.lines)


def merged_shards(recipe: Recipe, base: Checkpoint) -> dict[str, int]:
    """Files of the merged weights, to the bytes of the tensors in them."""
    layout = {name: TensorInfo(_stored_dtype(recipe, info), info.shape) for name, info in own_tensors(base).items()}
    files = shards(layout, recipe.max_shard_bytes)
    return {file: sum(layout[name].num_bytes for name in names) for file, names in files.items()}


def _stored_dtype(recipe: Recipe, info: TensorInfo) -> torch.dtype:
    return DTYPES[recipe.dtype] if recipe.dtype and info.dtype.is_floating_point else info.dtype


def _copied_as(recipe: Recipe, inputs: Iterable[Checkpoint]) -> int | None:
    """Bytes of an entry in the copies of whole tensors that the method needs; None if it converts block by block."""
    if recipe.compute_dtype == "float64":
        return 8
    # An adapter makes whole tensors out of factors, and a streamed tensor is a copy in memory.
    mapped = not any(isinstance(one, Adapter) or one.is_streamed for one in inputs)
    return None if mapped and isinstance(recipe.method, BlockMethod) else 4


def _copied(name: str, base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Tensor:
    tensor = base.load(name)
    if differing := [
        expert for expert, checkpoint in experts.items() if not torch.equal(checkpoint.load(name), tensor)
    ]:
        raise IncompatibleError(
            f"{name!r}: {tensor.dtype} cannot be merged and must be equal in all checkpoints; "
            f"it differs in {differing}. Name experts that left it as it is."
        )
    return tensor


def _explain(name: str, recipe: Recipe, inputs: Iterable[Checkpoint], dtype: torch.dtype) -> None:
    """Raise the NumericalError that says which input is broken, or that the result does not fit its dtype."""
    for checkpoint in inputs:
        require_finite(name, checkpoint.load(name), checkpoint.name)
    raise NumericalError(
        f"{name!r}: the merge by {recipe.method.name} leaves the range of {dtype}. "
        "Lower the scale or store a wider dtype."
    )
