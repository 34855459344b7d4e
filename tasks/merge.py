"""The merge step: from pinned checkpoints to a folder that transformers loads."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from merging_core.checkpoint import CONFIG, INDEX, Checkpoint
from merging_core.merge import Inputs, MatrixDiagnostics, merge, merged_bytes
from merging_core.recipe import Recipe
from tasks.model_card import licence_of, model_card
from tasks.progress import track
from tasks.recipes import recipe_yaml
from tasks.sources.local import COMPANIONS
from tasks.steps import Step
from tasks.store import Ref, Store, require_free

_SPARE_BYTES: Final = 16_000_000


def merge_step(
    recipe: Recipe,
    base: Ref,
    experts: Mapping[str, Ref],
    vectors: Mapping[str, Ref],
    statistics: Mapping[str, Ref],
    store: Store,
) -> Step:
    """Merge the experts into a complete model folder: weights, config, tokenizer, model card, recipe.

    Args:
        recipe: what to merge and how.
        base: checkpoint of the base.
        experts: expert name to checkpoint.
        vectors: expert name to task vectors, for spectral methods.
        statistics: expert name to statistics, for methods that ask for them.
        store: where they lie.
    """
    licence = licence_of(store.folder(base)) if store.home(base).exists() else None

    def make(out: Path) -> dict[str, Any]:
        inputs = Inputs(
            base=store.folder(base),
            experts=_folders(experts, store),
            vectors=_folders(vectors, store),
            statistics=_folders(statistics, store),
        )
        with Checkpoint(inputs.base, "the base") as opened:
            total = merged_bytes(recipe, opened)
        require_free(out, total + _SPARE_BYTES, f"the merge by {recipe.method.name}")
        done = 0
        with track(f"merge {recipe.method.name}", "bytes") as progress:

            def count(num_bytes: int) -> None:
                nonlocal done
                done += num_bytes
                progress(done, total)

            diagnostics = merge(recipe, inputs, out, count)
        _copy_side_files(recipe, inputs.base, out)
        (out / "recipe.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")
        (out / "README.md").write_text(model_card(recipe, base, experts, licence), encoding="utf-8")
        return {"recipe": asdict(recipe), "diagnostics": [asdict(one) for one in diagnostics]}

    identity = recipe.identity(base.digest, {name: ref.digest for name, ref in experts.items()})
    identity["licence"] = licence
    identity["task_vectors"] = {name: ref.digest for name, ref in vectors.items()}
    identity["statistics"] = {name: ref.digest for name, ref in statistics.items()}
    parents = (base, *experts.values(), *vectors.values(), *statistics.values())
    return Step("merged", merge_title(recipe), identity, parents, make)


def merge_title(recipe: Recipe) -> str:
    """Method and scale, such as ``merge r_tsvm x 0.8``."""
    scale = getattr(recipe.method, "scale", None)
    return f"merge {recipe.method.name}" + ("" if scale is None else f" x {scale:g}")


def read_diagnostics(ref: Ref, store: Store) -> list[MatrixDiagnostics]:
    """Ranks and weights of each matrix, as a spectral merge recorded them; empty for other methods."""
    return [MatrixDiagnostics(**one) for one in store.manifest(ref).details.get("diagnostics", [])]


def _folders(refs: Mapping[str, Ref], store: Store) -> dict[str, Path]:
    return {name: store.folder(ref) for name, ref in refs.items()}


def _copy_side_files(recipe: Recipe, base: Path, out: Path) -> None:
    for name in COMPANIONS:
        if name not in (CONFIG, INDEX) and (base / name).exists():
            shutil.copyfile(base / name, out / name)
    config = json.loads((base / CONFIG).read_text())
    if recipe.dtype:
        # transformers 5 writes "dtype", older releases "torch_dtype"; both are read.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = recipe.dtype
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
