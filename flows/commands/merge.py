"""``tripoise merge``: by a recipe into a folder."""

import time
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import JsonOption, OutOption, ReplaceOption, StoreOption, answer, open_store
from flows.terminal import log_to


def merge(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    out: OutOption,
    store: StoreOption = None,
    as_json: JsonOption = False,
    replace: ReplaceOption = False,
    device: Annotated[str, typer.Option("--device", help="Torch device; several, as cuda:0,cuda:1, share it.")] = "cpu",
) -> None:
    """Merge experts by a recipe into a folder that transformers loads. Needs no server."""
    started = time.perf_counter()
    log_to(as_json)
    from flows.pipeline import Kitchen, pin_recipe
    from tasks.deliver import check_replaceable, deliver_artifact
    from tasks.plan import Planner
    from tasks.recipes import load_recipe
    from tasks.steps import Direct

    wanted = load_recipe(recipe)
    run = Direct(open_store(store))
    sources = [Path(source) for source in (wanted.base, *(one.source for one in wanted.experts)) if "://" not in source]
    protected = [run.store.root, recipe, *sources]
    check_replaceable(out, "merged", replace, protected=protected)
    pinned = pin_recipe(wanted, run)
    expected = Kitchen.of(wanted, Planner(run.store), pinned=pinned).merge(wanted)
    check_replaceable(out, "merged", replace, expected.digest, protected)
    merged = Kitchen.of(wanted, run, device, pinned=pinned).merge(wanted)
    deliver_artifact(merged, out, run.store, replace)
    reused = run.built[-1].reused
    seconds = round(time.perf_counter() - started, 2)
    summary = {"digest": merged.digest, "reused": reused, "seconds": seconds, "out": str(out.absolute())}
    answer(summary, as_json, f"{'reused' if reused else 'made'} {merged} in {seconds} s: {out}")
