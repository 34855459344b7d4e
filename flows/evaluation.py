"""What every request says of how models are evaluated; the base of the parameter models."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tasks.evaluate import EvaluateSettings, Execution
from tasks.judges.base import Question
from tasks.judges.classifier import ClassifierJudge
from tasks.judges.endpoint import EndpointJudge
from tasks.judges.execution import CodeExecution
from tasks.judges.rule import RuleJudge
from tasks.judges.steps import AnyJudge, default_judges
from tasks.names import check_names
from tasks.recipes import read_yaml, validated
from tasks.suite import Split, Suite, load_suite

_Reader = Annotated[RuleJudge | ClassifierJudge | EndpointJudge, Field(discriminator="name")]
_ModelReader = Annotated[ClassifierJudge | EndpointJudge, Field(discriminator="name")]


class JudgeChoices(BaseModel):
    """Who decides what no metric can: one judge for each question that benchmarks ask about responses."""

    model_config = ConfigDict(extra="forbid", title="Judges")
    refusal: _Reader | None = Field(
        default=None, title="Refusal", description="Does it refuse? rule, a classifier or an endpoint."
    )
    abstention: _Reader | None = Field(
        default=None, title="Abstention", description="Does it say that it does not know? rule, classifier, endpoint."
    )
    hallucination: _ModelReader | None = Field(
        default=None, title="Hallucination", description="Does it state things that are not so? classifier or endpoint."
    )
    harm: _ModelReader | None = Field(
        default=None, title="Harm", description="Does it help to do harm? A guard model as classifier, or an endpoint."
    )
    code: CodeExecution | None = Field(
        default=None, title="Code", description="Do its programs pass their tests? Runs them in a sandbox, if allowed."
    )

    def chosen(self) -> dict[Question, AnyJudge]:
        """Question to its judge, where one is named."""
        return {name: judge for name, judge in self if judge is not None}  # type: ignore[misc]


def _own_fields_first(schema: dict[str, Any], shape: type[BaseModel]) -> None:
    """A form begins with what a request is about, and ends with how its models are evaluated."""
    order = sorted(shape.model_fields, key=lambda name: name in Evaluation.model_fields)
    schema["properties"] = {name: schema["properties"][name] for name in order if name in schema["properties"]}


class Evaluation(BaseModel):
    """A suite, how much of it, who judges, and on what it runs."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_own_fields_first)
    suite: str = Field(default="3h-mini", title="Suite", description="A shipped suite by name, or the path of one.")
    data_dir: Path | None = Field(
        default=None,
        title="Data folder",
        description="Local files in place of hub data; docs/suites.md tells the layout. Left out: from the hub.",
    )
    limit: int | None = Field(
        default=None,
        title="Limit",
        description="Only so many samples of each benchmark, a fixed random choice; marks all scores partial.",
        ge=1,
    )
    judges: JudgeChoices = Field(
        default_factory=JudgeChoices,
        title="Judges",
        description="Left out: the rule judge for refusal and abstention; benchmarks with other questions need one.",
    )
    second_judges: JudgeChoices = Field(
        default_factory=JudgeChoices,
        title="Second judges",
        description="Judge the same responses of the test split again. Their agreement is reported, not their scores.",
    )
    execution: Execution = Field(
        default_factory=Execution, title="Execution", description="Device and batch size; scores do not depend on them."
    )

    @model_validator(mode="after")
    def _two_opinions(self) -> Self:
        first = first_judges(self.judges)
        if same := [name for name, judge in self.second_judges.chosen().items() if judge == first.get(name)]:
            raise ValueError(f"second_judges: {same[0]} is decided by the same judge as under judges; name another")
        return self

    def loaded_suite(self) -> Suite:
        """The suite, with its local files.

        Raises:
            RecipeError: see :func:`tasks.suite.load_suite`.
        """
        return load_suite(self.suite, self.data_dir)

    def settings(self, split: Split, limit: int | None = None) -> EvaluateSettings:
        """What is asked of the models on one split; with ``limit``, that many samples instead of its own limit."""
        return EvaluateSettings(split=split, limit=limit or self.limit)


def first_judges(judges: JudgeChoices | None) -> dict[Question, AnyJudge]:
    """Question to the judge whose verdicts are the scores: those named, and where none is, what costs nothing."""
    return default_judges() | (judges.chosen() if judges else {})


def load_judges(path: Path) -> JudgeChoices:
    """Read and check a file of judges: question to ``{name, settings...}``.

    Raises:
        RecipeError: naming the entry and what was expected.
    """
    data = read_yaml(path)
    check_names(f"judges {path.name}", data, JudgeChoices.model_fields)
    judges: JudgeChoices = validated(JudgeChoices, data, f"judges {path.name}")
    return judges
