"""Parameters of the flow ``reevaluate``: what its run form, the API and watch files may say."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.evaluation import Evaluation
from tasks.names import check_names, repeated
from tasks.recipes import Source, read_yaml, validated
from tasks.watch.records import Acceptance, Terms, Watched

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
_DigestStart = Annotated[str, Field(pattern=r"^[0-9a-f]{6,64}$")]


class WatchedSource(BaseModel):
    """Where checkpoints of one model appear."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(
        title="Name", description="Of the model, in events (tripoise.model.NAME) and on the page.", pattern=_NAME
    )
    source: Source = Field(
        title="Source",
        description="A folder or s3://bucket/prefix whose folders are checkpoints; hf://org/name for all branches and "
        "tags of a repository, hf://org/name@branch for one.",
    )


class Watch(Evaluation):
    """Evaluate what is new in some sources, and compare it with what was accepted before."""

    name: str = Field(
        default="watch",
        title="Name",
        description="What is remembered between two looks is kept under this name, in the store.",
        pattern=_NAME,
    )
    sources: list[WatchedSource] = Field(
        title="Sources", description="What is watched; each has an accepted checkpoint of its own.", min_length=1
    )
    accept: Acceptance = Field(
        default="automatic-if-not-worse",
        title="Accept",
        description="Whether a checkpoint that is not worse becomes the one that later ones are compared with, or only "
        "one that is approved.",
    )
    tolerance: float | None = Field(
        default=None,
        title="Tolerance",
        description="A fall of an H by more than this counts as a regression even if it may be chance. Left out: only "
        "what the samples prove.",
        gt=0,
        le=1,
    )
    settle_s: float = Field(
        default=60.0,
        title="Settle",
        description="Seconds for which a checkpoint must not have been written to; a younger one is left for the next "
        "look. Commits of a Hub repository need not settle.",
        ge=0,
        le=86_400,
    )
    approve: list[_DigestStart] = Field(
        default_factory=list,
        title="Approve",
        description="Beginnings of the digests of scored checkpoints that are accepted before this look. For one run, "
        "not for the defaults of a deployment.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if twice := repeated(one.name for one in self.sources):
            raise ValueError(f"sources: names must differ, {twice[0]!r} stands twice")
        if made := [one.source for one in self.sources if one.source.startswith("mini3h://")]:
            raise ValueError(f"sources: {made[0]} is made here and never changes; watch a folder, s3:// or hf://")
        if self.second_judges.chosen():
            raise ValueError("second_judges: a watch does not ask them; leave them out")
        return self

    def watched(self, published: str = "") -> list[Watched]:
        """The sources, as a look takes them; of the one that is called ``published`` nothing needs to settle."""
        return [Watched(one.name, one.source, one.name == published) for one in self.sources]

    def terms(self) -> Terms:
        """What counts as settled, as worse and as acceptable."""
        return Terms(self.accept, self.tolerance, self.settle_s)


def load_watch(path: Path) -> Watch:
    """Read and check a watch file; ``sources`` may be a mapping of name to source.

    Raises:
        RecipeError: naming the entry, what was expected and, for a misspelt name, the nearest right one.
    """
    data: dict[str, Any] = read_yaml(path)
    check_names(f"watch {path.name}", data, Watch.model_fields)
    if isinstance(sources := data.get("sources"), dict):
        data["sources"] = [{"name": name, "source": source} for name, source in sources.items()]
    watch: Watch = validated(Watch, {"name": path.stem} | data, f"watch {path.name}")
    return watch
