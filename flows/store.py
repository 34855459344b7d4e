"""The flows ``store-gc`` and ``store-verify``: the store kept small and sound."""

from typing import Any, Final

from prefect import flow
from pydantic import BaseModel, ConfigDict, Field

from flows.shown import completed, show_lines
from merging_core.errors import CheckpointError
from tasks.collect import collect
from tasks.store import Store


class StoreGc(BaseModel):
    """What a garbage collection may remove."""

    model_config = ConfigDict(extra="forbid")
    keep_days: float = Field(
        default=30, title="Keep days", description="What was made in the last days stays.", ge=0, allow_inf_nan=False
    )
    delete: bool = Field(
        default=False, title="Delete", description="Remove it. Without this, the run only says what would go."
    )


class StoreVerify(BaseModel):
    """What is verified."""

    model_config = ConfigDict(extra="forbid")
    artifact: str = Field(
        default="",
        title="Artifact",
        description="kind/digest; the beginning of a digest is enough. Left empty: everything.",
    )


_GC: Final = StoreGc()
_VERIFY: Final = StoreVerify()


@flow(name="store-gc", flow_run_name="garbage of the store")
def store_gc(request: StoreGc = _GC) -> dict[str, Any]:
    """You get a list of what no pinned, recent or running artifact was made from; removed, if asked for."""
    found = collect(Store.default(), request.keep_days, delete=request.delete)
    lines = [*(str(ref) for ref in found.artifacts), *(str(path) for path in found.leftovers)]
    done = "removed" if request.delete else "would be removed"
    show_lines("store-gc", f"{len(lines)} {done}, {found.num_bytes / 1e6:,.2f} MB; {found.kept} artifacts stay", lines)
    return completed(garbage=len(lines), removed=request.delete, bytes=found.num_bytes, kept=found.kept)


@flow(name="store-verify", flow_run_name="verify the store")
def store_verify(request: StoreVerify = _VERIFY) -> dict[str, Any]:
    """You get a list of damaged files; the run fails if there are any.

    Raises:
        CheckpointError: naming the first damaged file and how many artifacts are damaged.
    """
    store = Store.default()
    refs = [store.lookup(request.artifact)] if request.artifact else store.refs()
    problems = {ref: found for ref in refs if (found := store.problems(ref))}
    lines = [problem for found in problems.values() for problem in found]
    show_lines("store-verify", f"{len(refs)} artifacts checked, {len(problems)} damaged", lines)
    if problems:
        raise CheckpointError(f"{lines[0]}. {len(problems)} of {len(refs)} artifacts are damaged: make them again.")
    return completed(checked=len(refs), damaged=0)
