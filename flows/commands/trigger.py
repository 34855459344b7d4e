"""``tripoise trigger``: start a run of a deployment on a Prefect server."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.commands.options import JsonOption, answer


def trigger(
    name: Annotated[str, typer.Argument(help="Deployment, such as merge.")],
    param: Annotated[
        list[str] | None,
        typer.Option("--param", help="path=value, such as request.recipe.method.name=tsvm; the value is YAML."),
    ] = None,
    params: Annotated[Path | None, typer.Option("--params", help="YAML file with parameters.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option("--idempotency-key", help="The same key again gives the same run.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended; exit code 1 if without success.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Start a run of a deployment on the server of PREFECT_API_URL; what is not given is as in the deployment."""
    from dataclasses import asdict

    from flows.client import Client
    from tasks.recipes import read_yaml

    with Client() as client:
        parameters: dict[str, Any] = client.deployment(name)["parameters"]
        parameters = merged(parameters, read_yaml(params)) if params else parameters
        for text in param or ():
            set_at(parameters, text)
        run = client.trigger(name, parameters, idempotency_key)
        if wait:
            run = client.wait(run)
    answer(asdict(run), as_json, f"{run.id}  {run.name}  {run.state}  {run.message}".rstrip())
    if wait and run.state not in ("COMPLETED", "PAUSED"):
        raise typer.Exit(1)


def merged(old: Any, new: Any) -> Any:
    """Mappings entry by entry, at every depth; of anything else the new one."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {name: merged(old.get(name), value) for name, value in new.items()}


def set_at(parameters: dict[str, Any], text: str) -> None:
    """Set one value by its path, such as ``request.recipe.experts.0.weight=0.5``; mappings on the way are made.

    Raises:
        RecipeError: if the text is not of that form, or the path leads through something else.
    """
    import yaml

    from merging_core.errors import RecipeError

    path, equals, value = text.partition("=")
    *steps, last = path.split(".")
    if not equals or not last:
        raise RecipeError(f"--param {text}: expected path=value, such as request.limit=8.")
    try:
        new = yaml.safe_load(value)
        place: Any = parameters
        for step in steps:
            place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
        place[int(last) if isinstance(place, list) else last] = new
    except (ValueError, TypeError, AttributeError, IndexError, yaml.YAMLError) as error:
        raise RecipeError(f"--param {text}: cannot be set ({' '.join(str(error).split())}).") from error
