"""``tripoise evaluate``: score one model on a suite."""

import time
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import (
    JsonOption,
    LimitOption,
    OutOption,
    ReplaceOption,
    StoreOption,
    answer,
    open_store,
)
from flows.terminal import log_to, scores_text


def evaluate(
    model: Annotated[str, typer.Argument(help="Local folder, hf://org/name@revision or mini3h://role.")],
    out: OutOption,
    suite: Annotated[str, typer.Option("--suite", help="A shipped suite by name, or the path of one.")] = "3h-mini",
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Local files in place of hub data; layout: docs/suites.md.")
    ] = None,
    judges: Annotated[
        Path | None, typer.Option("--judges", help="YAML file: a judge for each question; see docs/judges.md.")
    ] = None,
    endpoint: Annotated[
        Path | None,
        typer.Option("--endpoint", help="YAML file: where MODEL is served, whose folder needs no weights then."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="validation or test.")] = "test",
    limit: LimitOption = None,
    device: Annotated[str, typer.Option("--device", help="Torch device, such as cpu or cuda:0.")] = "cpu",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Requests in one forward pass.")] = 64,
    backend: Annotated[
        str, typer.Option("--backend", help="transformers, or vllm where it is installed.")
    ] = "transformers",
    store: StoreOption = None,
    as_json: JsonOption = False,
    replace: ReplaceOption = False,
) -> None:
    """Score one model on a suite by lm-eval. Needs no server."""
    started = time.perf_counter()
    log_to(as_json)
    from flows.evaluation import first_judges, load_judges
    from flows.pipeline import pin, score
    from tasks.backends import load_endpoint
    from tasks.deliver import check_replaceable
    from tasks.evaluate import EvaluateSettings, Execution
    from tasks.reporting import deliver_scores
    from tasks.sources.tokenizer import tokenizer_step
    from tasks.steps import Direct
    from tasks.suite import load_suite

    chosen, deciding = load_suite(suite, data_dir), first_judges(load_judges(judges) if judges else None)
    settings = EvaluateSettings(split=split, limit=limit)  # type: ignore[arg-type]
    execution = Execution(device=device, batch_size=batch_size, backend=backend)  # type: ignore[arg-type]
    served = load_endpoint(endpoint) if endpoint else None
    run = Direct(open_store(store))
    protected = [run.store.root] if "://" in model else [run.store.root, Path(model)]
    check_replaceable(out, "scores", replace, protected=protected)
    if served:
        [ref], name = run.build("resolve", f"resolve {model}", [tokenizer_step(model)]), served.title
    else:
        ref, name = pin({"model": model}, run)["model"], model
    done = len(run.built)
    [scores] = score([(ref, name)], chosen, settings, execution, run, deciding, served)
    summary = deliver_scores(ref, name, chosen, scores, out, run.store, replace)
    summary |= {
        "reused": all(one.reused for one in run.built[done:]),
        "seconds": round(time.perf_counter() - started, 2),
        "out": str(out.absolute()),
    }
    answer(summary, as_json, scores_text(summary))
