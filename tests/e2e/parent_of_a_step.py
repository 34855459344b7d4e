"""A parent that asks the GPU pool for a merge: ``python -m tests.e2e.parent_of_a_step RECIPE.json STORE``.

In a process of its own: Prefect's log and event workers stay with the first server that a process has talked to.
"""

import json
import sys
from pathlib import Path

from prefect import flow

from flows.pipeline import Kitchen, pin_recipe
from flows.pools import OnPools
from tasks.recipes import parse_recipe
from tasks.store import Store


@flow
def parent(file: Path, root: Path) -> None:
    recipe, run = parse_recipe(json.loads(file.read_text())), OnPools(Store(root))
    first, again = (Kitchen(run, *pin_recipe(recipe, run)).merge(recipe) for _ in range(2))
    assert first == again
    print(f"{first.kind}/{first.digest}", flush=True)


if __name__ == "__main__":
    parent(Path(sys.argv[1]), Path(sys.argv[2]))
