"""The merge step: from pinned checkpoints to a folder that transformers loads.

Its parts are the shards of the merged weights, which a runner may have made apart, on several machines.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from merging_core.checkpoint import Checkpoint
from merging_core.devices import parse_devices
from merging_core.digest import file_sha256
from merging_core.jobs import MatrixDiagnostics
from merging_core.merge import Inputs, merge, merged_shards
from merging_core.methods.base import Surveyor
from merging_core.notes import Notes
from merging_core.recipe import Recipe
from tasks.align import Family, alignment_lines
from tasks.model_card import licence_of, model_card
from tasks.progress import track_bytes
from tasks.recipes import recipe_yaml
from tasks.side_files import write_side_files
from tasks.steps import Step
from tasks.store import NOTES, Ref, Store, require_free

_SPARE_BYTES: Final = 16_000_000
log = logging.getLogger("tripoise.merge")


def merge_step(
    recipe: Recipe,
    base: Ref,
    experts: Mapping[str, Ref],
    vectors: Mapping[str, Ref],
    statistics: Mapping[str, Ref],
    calibration: Mapping[str, Ref],
    store: Store,
    device: str = "cpu",
    sources: Family | None = None,
) -> Step:
    """Merge the experts into a complete model folder: weights, config, tokenizer, model card, recipe.

    Args:
        recipe: what to merge and how.
        base: checkpoint of the base.
        experts: expert name to checkpoint.
        vectors: expert name to task vectors, for spectral methods.
        statistics: expert name to statistics, for methods that ask for them.
        calibration: expert name to calibration, for methods that ask for it.
        store: where they lie.
        device: torch device, or several separated by commas, which share the tensors.
        sources: the checkpoints that the recipe names, where their vocabularies were aligned before.
    """
    aligned = Family(base, experts)
    named = sources or aligned
    licences = [
        licence_of(store.folder(ref)) if store.home(ref).exists() else None
        for ref in (named.base, *(named.experts[expert.name] for expert in recipe.experts))
    ]

    def inputs() -> Inputs:
        return Inputs(
            base=store.folder(base),
            experts=_folders(experts, store),
            vectors=_folders(vectors, store),
            statistics=_folders(statistics, store),
            calibration=_folders(calibration, store),
        )

    def make(out: Path) -> dict[str, Any]:
        conflicts = write_side_files(recipe, store.folder(base), _folders(named.experts, store), out)
        for line in conflicts:
            log.warning("%s", line)
        for shard in parts():
            _take_shard(shard.ref, out, store)
        diagnostics = _merge(recipe, inputs(), out, device)
        lines = alignment_lines(aligned, store)
        (out / "recipe.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")
        (out / "README.md").write_text(model_card(recipe, named, licences, lines, conflicts), encoding="utf-8")
        return {
            "recipe": asdict(recipe),
            "diagnostics": [asdict(one) for one in diagnostics],
            "alignment": lines,
            "conflicts": conflicts,
        }

    identity = recipe.identity(base.digest, {name: ref.digest for name, ref in experts.items()})
    identity["licences"] = licences
    identity["task_vectors"] = {name: ref.digest for name, ref in vectors.items()}
    identity["statistics"] = {name: ref.digest for name, ref in statistics.items()}
    identity["calibration"] = {name: ref.digest for name, ref in calibration.items()}
    parents = (base, *experts.values(), *vectors.values(), *statistics.values(), *calibration.values())
    parents = tuple(dict.fromkeys((*parents, named.base, *named.experts.values())))

    def parts() -> list[Step]:
        return _shard_steps(Step("merged", merge_title(recipe), identity, parents, make), recipe, inputs, store, device)

    return Step("merged", merge_title(recipe), identity, parents, make, device=device, parts=parts)


def _shard_steps(whole: Step, recipe: Recipe, inputs: Callable[[], Inputs], store: Store, device: str) -> list[Step]:
    """A step for each file of the merged weights; none for a single file.

    None either for a method that has to see the whole model first: every shard would repeat that.
    """
    with Checkpoint(inputs().base, "the base") as opened:
        files = merged_shards(recipe, opened)
    if len(files) == 1 or (isinstance(recipe.method, Surveyor) and recipe.method.surveyed is not None):
        return []

    def one(number: int, file: str) -> Step:
        def make(out: Path) -> dict[str, Any]:
            return {"diagnostics": [asdict(one) for one in _merge(recipe, inputs(), out, device, file)]}

        title = f"{whole.title}, file {number} of {len(files)}"
        return Step("shard", title, {"of": whole.ref.digest, "file": file}, whole.parents, make, device=device)

    return [one(number, file) for number, file in enumerate(files, start=1)]


def _take_shard(shard: Ref, out: Path, store: Store) -> None:
    """Put a finished shard, where there is one, into the folder of the merge, which then goes on with the others."""
    if not store.bring(shard):
        return
    manifest, notes = store.manifest(shard), Notes(out / NOTES)
    for file, record in manifest.files.items():
        if not (out / file).exists():
            try:
                (out / file).hardlink_to(store.folder(shard) / file)
            except OSError:  # a file system without links
                shutil.copyfile(store.folder(shard) / file, out / file)
            if file_sha256(out / file) != record["sha256"]:
                log.warning("%s: %s is not what was recorded; making it again", shard, file)
                (out / file).unlink()
                continue
        diagnostics = [MatrixDiagnostics(**one) for one in manifest.details["diagnostics"]]
        notes.add(file, [one.tensor for one in diagnostics], diagnostics)


def _merge(recipe: Recipe, inputs: Inputs, out: Path, device: str, only: str | None = None) -> list[MatrixDiagnostics]:
    """Merge into ``out`` what is not there yet, all or one file, after a look at the free disk."""
    devices = parse_devices(device)
    with Checkpoint(inputs.base, "the base") as opened:
        files = merged_shards(recipe, opened)
    total = files[only] if only else sum(files.values())
    kept = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    require_free(out, total - kept + _SPARE_BYTES, f"the merge by {recipe.method.name}")
    with track_bytes(f"merge {recipe.method.name}", total) as count:
        return merge(recipe, inputs, out, count, notes=out / NOTES, devices=devices, only=only)


def merge_title(recipe: Recipe) -> str:
    """Method and scale, such as ``merge r_tsvm x 0.8``."""
    scale = getattr(recipe.method, "scale", None)
    return f"merge {recipe.method.name}" + ("" if scale is None else f" x {scale:g}")


def read_diagnostics(ref: Ref, store: Store) -> list[MatrixDiagnostics]:
    """Ranks and weights of each matrix, as a spectral merge recorded them; empty for other methods."""
    return [MatrixDiagnostics(**one) for one in store.manifest(ref).details.get("diagnostics", [])]


def _folders(refs: Mapping[str, Ref], store: Store) -> dict[str, Path]:
    return {name: store.folder(ref) for name, ref in refs.items()}
