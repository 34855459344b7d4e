"""``tripoise plan``: what would be computed, and why."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import JsonOption, StoreOption, answer, open_store
from flows.terminal import log_to


def plan(
    file: Annotated[Path, typer.Argument(help="Recipe, benchmark or sweep file (YAML).")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a merge, a benchmark or a sweep would compute, and why; computes nothing.

    Local folders are hashed and hub repositories fetched, since what would be computed follows from content.
    """
    log_to(as_json)
    from flows.parameters import load_bench
    from flows.pipeline import Kitchen
    from tasks.plan import Planner
    from tasks.recipes import load_recipe, read_yaml

    planner, entries = Planner(open_store(store)), read_yaml(file)
    if "search" in entries:
        from flows.sweep import plan_search
        from flows.sweep_parameters import load_sweep

        plan_search(load_sweep(file), planner)
    elif "methods" in entries:
        from flows.benchmark import compare_methods

        compare_methods(load_bench(file), planner)
    else:
        recipe = load_recipe(file)
        Kitchen.of(recipe, planner).merge(recipe)
    steps = [
        {"step": one.title, "artifact": str(one.ref), "reused": one.reused, "why": one.why} for one in planner.planned
    ]
    lines = [f"{'reuse  ' if one.reused else 'compute'} {one.title:<44} {one.why}".rstrip() for one in planner.planned]
    num_computed = sum(not one.reused for one in planner.planned)
    lines.append(f"{num_computed} to compute, {len(steps) - num_computed} to reuse")
    lines += [f"not known yet: {one}" for one in planner.unknown]
    answer(
        {"compute": num_computed, "reuse": len(steps) - num_computed, "steps": steps, "unknown": planner.unknown},
        as_json,
        "\n".join(lines),
    )
