"""``tripoise store``: look at finished artifacts."""

import json
import logging
from typing import Annotated

import typer

from flows.commands.options import JsonOption, StoreOption, answer, open_store
from merging_core.errors import MergeError, RecipeError
from merging_core.streamed import is_streamed
from tasks.store import KINDS

app = typer.Typer(help="Look at the store of finished artifacts.", no_args_is_help=True)


@app.command("ls")
def ls(
    kind: Annotated[str | None, typer.Argument(help=f"One of: {', '.join(KINDS)}.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List finished artifacts."""
    from tasks.names import nearest

    if kind is not None and kind not in KINDS:
        raise RecipeError(f"kind {kind!r} does not exist.{nearest(kind, KINDS)} All: {', '.join(KINDS)}.")
    opened = open_store(store)
    rows = []
    for ref in opened.refs(kind):
        try:
            manifest = opened.manifest(ref)
        except MergeError as error:
            logging.getLogger("tripoise.store").warning("%s", error)
            continue
        size = sum(record["size"] for record in manifest.files.values())
        rows.append({"artifact": f"{ref.kind}/{ref.digest}", "bytes": size, "created": manifest.created})
    text = "\n".join(f"{row['artifact'][:30]:<32} {row['bytes'] / 1e6:>12,.2f} MB  {row['created']}" for row in rows)
    answer({"store": str(opened.root), "artifacts": rows}, as_json, text or f"{opened.root} is empty")


@app.command("show")
def show(
    artifact: Annotated[str, typer.Argument(help="kind/digest; the beginning of a digest is enough.")],
    store: StoreOption = None,
) -> None:
    """Print an artifact's manifest: what produced it, from what, and its files."""
    from dataclasses import asdict

    opened = open_store(store)
    typer.echo(json.dumps(asdict(opened.manifest(opened.lookup(artifact))), indent=1))


@app.command("verify")
def verify(
    artifact: Annotated[str | None, typer.Argument(help="kind/digest; default: everything.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every file with its recorded size and sha256; exit code 1 if one differs."""
    opened = open_store(store)
    refs = [opened.lookup(artifact)] if artifact else opened.refs()
    problems = {str(ref): found for ref in refs if (found := opened.problems(ref))}
    text = "\n".join(problem for found in problems.values() for problem in found)
    answer(
        {"checked": len(refs), "damaged": problems},
        as_json,
        f"{text}\n{len(refs)} artifacts checked, {len(problems)} damaged".strip(),
    )
    if problems:
        raise typer.Exit(1)


@app.command("explain")
def explain(
    artifact: Annotated[str, typer.Argument(help="kind/digest; the beginning of a digest is enough.")],
    store: StoreOption = None,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a mermaid flowchart.")] = False,
) -> None:
    """Say what an artifact was made from, back to the sources."""
    from tasks.lineage import lineage_mermaid, lineage_text

    opened = open_store(store)
    typer.echo((lineage_mermaid if mermaid else lineage_text)(opened.lookup(artifact), opened))


@app.command("pin")
def pin(
    artifact: Annotated[str, typer.Argument(help="kind/digest; the beginning of a digest is enough.")],
    remove: Annotated[bool, typer.Option("--remove", help="Let it be collected again.")] = False,
    store: StoreOption = None,
) -> None:
    """Keep an artifact, and all that it was made from, through every garbage collection."""
    from tasks import collect

    opened = open_store(store)
    ref = opened.lookup(artifact)
    (collect.unpin if remove else collect.pin)(ref, opened)
    typer.echo(f"{'unpinned' if remove else 'pinned'} {ref}")


@app.command("gc")
def gc(
    keep_days: Annotated[float, typer.Option("--keep-days", min=0, help="Keep what was made in the last days.")] = 30,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without this, only say what would go.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what no pinned, recent or running artifact was made from. Says what would go; --delete removes it."""
    from tasks.collect import collect

    found = collect(open_store(store), keep_days, delete=delete)
    summary = {
        "deleted": delete,
        "artifacts": [f"{ref.kind}/{ref.digest}" for ref in found.artifacts],
        "leftovers": [str(path) for path in found.leftovers],
        "bytes": found.num_bytes,
        "kept": found.kept,
    }
    lines = [*(str(ref) for ref in found.artifacts), *(str(path) for path in found.leftovers)]
    done = "removed" if delete else "would be removed (--delete does it)"
    lines.append(f"{len(lines)} {done}, {found.num_bytes / 1e6:,.2f} MB; {found.kept} artifacts stay")
    answer(summary, as_json, "\n".join(lines))


@app.command("push")
def push(
    artifact: Annotated[str | None, typer.Argument(help="kind/digest; default: everything.")] = None,
    mirror: Annotated[
        str | None, typer.Option("--mirror", help="s3://bucket/prefix; default: TRIPOISE_MIRROR.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Copy artifacts to the mirror on object storage; what is there is left alone."""
    from tasks.mirror import Mirror

    opened = open_store(store)
    if not (url := mirror or opened.mirror):
        raise RecipeError("store push: no mirror. Name one with --mirror s3://bucket/prefix or TRIPOISE_MIRROR.")
    target = Mirror(url)
    refs = [opened.lookup(artifact)] if artifact else opened.refs()
    if not artifact and (streamed := [ref for ref in refs if is_streamed(opened.folder(ref))]):
        refs = [ref for ref in refs if ref not in streamed]
        typer.echo(f"{len(streamed)} streamed checkpoints left out: their weights are on object storage already")
    num_sent = sum(target.push(ref, opened) for ref in refs)
    typer.echo(f"{num_sent} artifacts sent to {url}, {len(refs) - num_sent} were there")
