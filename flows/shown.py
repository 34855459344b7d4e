"""What the Prefect UI shows of a run: its plan, its model with recipe and lineage, its scores, lists."""

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed

from tasks.lineage import lineage_mermaid, lineage_text
from tasks.plan import Planner
from tasks.scores import read_record
from tasks.store import Ref, Store
from tasks.suite import Suite

_MOST_LINES: Final = 200


def completed(**result: Any) -> dict[str, Any]:
    """The end of a flow: its result, and the same as the message that the UI and the API show.

    Prefect unpacks the state: whoever calls the flow gets the plain result.
    """
    said = ", ".join(f"{name}: {value}" for name, value in result.items() if isinstance(value, str | int))
    return cast(dict[str, Any], Completed(message=said, data=result))


def show_plan(compose: Callable[[Planner], Any], store: Store) -> None:
    """Which steps will be reused, and which computed and why, those first; of very many the first are listed.

    What cannot be known yet is named in the description.
    """
    planner = Planner(store)
    compose(planner)
    rows = [
        {"step": one.title, "decision": "reuse" if one.reused else "compute", "why": one.why, "artifact": str(one.ref)}
        for one in planner.planned
    ]
    rows.sort(key=lambda row: row["decision"])
    computed = sum(not one.reused for one in planner.planned)
    said = f"{computed} to compute, {len(rows) - computed} to reuse"
    if len(rows) > _MOST_LINES:
        said += f"; the first {_MOST_LINES} are listed, `tripoise plan` lists all"
    if planner.unknown:
        said += f". Not known yet: {'; '.join(planner.unknown)}"
    create_table_artifact(key="plan", table=rows[:_MOST_LINES], description=said)


def show_model(model: Ref, store: Store) -> None:
    """Where a merged model is, its recipe, and what it was made from."""
    folder = store.folder(model)
    recipe = folder / "recipe.yaml"
    create_markdown_artifact(
        key="model",
        markdown=f"# `{model.kind}/{model.digest}`\n\n- Folder: [{folder}]({folder.as_uri()})\n"
        f"- Evaluate it as `store://{model.kind}/{model.digest}`\n"
        f"- Copy it: `tripoise publish {model.kind}/{model.digest[:12]} TARGET`\n",
        description=f"{model.kind}/{model.digest}",
    )
    if recipe.is_file():
        text = recipe.read_text(encoding="utf-8")
        create_markdown_artifact(key="recipe", markdown=f"```yaml\n{text}```\n", description=f"Recipe of {model}")
    create_markdown_artifact(
        key="lineage",
        markdown=f"```mermaid\n{lineage_mermaid(model, store)}\n```\n\n```\n{lineage_text(model, store)}\n```\n",
        description=f"What {model} was made from",
    )


def show_scores(model: Ref, scores: Sequence[Ref], suite: Suite, store: Store) -> None:
    """A table of one model's scores."""
    rows = []
    for benchmark, ref in zip(suite.benchmarks, scores, strict=True):
        record = read_record(ref, store)
        numbers = {name: record[name] for name in ("value", "stderr", "n")}
        rows.append({"benchmark": benchmark.title or benchmark.task, "dimension": benchmark.dimension, **numbers})
    create_table_artifact(key="scores", table=rows, description=f"{model} on {suite.title}")


def show_lines(key: str, heading: str, lines: Sequence[str]) -> None:
    """A heading and a list, cut where it gets long."""
    more = [f"- and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    listed = [f"- `{line}`" for line in lines[:_MOST_LINES]]
    create_markdown_artifact(key=key, markdown="\n".join([f"# {heading}", "", *listed, *more]), description=heading)
