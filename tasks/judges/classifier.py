"""The classifier judge: a sequence classifier or a guard model, run here with transformers."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from annotated_types import Ge

from merging_core.errors import RecipeError
from merging_core.settings import STRICT, check_bounds, check_choices
from tasks.generations import Generation
from tasks.judges.base import Judgement, Question, combined, decided, unparsed
from tasks.judges.readers import Labels, Words, folded
from tasks.progress import Progress
from tasks.steps import resolve_with_progress
from tasks.store import Ref, Store

# Raise it whenever the same model gives other verdicts by a change of ours.
CLASSIFIER_VERSION: Final = 1
_FIELDS: Final = frozenset({"prompt", "response", "reference"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierJudge:
    """Asks a sequence classifier for a label, or a guard model for a first word such as ``unsafe``."""

    __pydantic_config__: ClassVar = STRICT
    name: Literal["classifier"] = "classifier"
    """A sequence classifier or guard model, run here."""
    model: str
    """A local folder or hf://org/name@revision; identified by its content."""
    yes_labels: tuple[str, ...]
    """Labels, or first words of a reply, that mean yes to the question."""
    no_labels: tuple[str, ...]
    """Labels, or first words of a reply, that mean no. A classifier's labels must all be named."""
    answers_by: Literal["label", "text"] = "label"
    """A label of a sequence classifier, or the text that a guard model writes."""
    template: str | None = None
    """What it reads, with {prompt}, {response} and {reference}; left out: the model's own chat template over prompt and
    response as two turns, as guard models expect it."""
    max_new_tokens: Annotated[int, Ge(1)] = 16
    """Tokens that a guard model may write, >= 1."""
    device: str = "cpu"
    """Torch device, such as cpu or cuda:0; verdicts do not depend on it."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Responses in one forward pass, >= 1; verdicts do not depend on it."""

    def __post_init__(self) -> None:
        subject = "judge classifier"
        check_bounds(self, subject)
        check_choices(self, subject)
        yes, no = set(map(folded, self.yes_labels)), set(map(folded, self.no_labels))
        if not yes or not no or yes & no or "" in yes | no:
            raise RecipeError(
                f"{subject}: yes_labels and no_labels must each name labels, none in both, got "
                f"{self.yes_labels!r} and {self.no_labels!r}."
            )
        if self.template is not None:
            _check_template(self.template, subject)

    @property
    def questions(self) -> frozenset[Question]:
        """See :class:`tasks.judges.base.Judge`: any that its labels are about; code must be run."""
        return frozenset(get_args(Question)) - {"code"}

    def prepared(self, question: Question, store: Store) -> "Classifier":
        """The judge with its model pinned to content.

        Raises:
            RecipeError, CheckpointError: see :func:`tasks.sources.resolve`.
        """
        return Classifier(self, resolve_with_progress(self.model, store).ref, store)


@dataclass(frozen=True, slots=True)
class Classifier:
    """A classifier judge whose model is pinned."""

    settings: ClassifierJudge
    model: Ref
    store: Store

    @property
    def questions(self) -> frozenset[Question]:
        """See :class:`tasks.judges.base.Judge`."""
        return self.settings.questions

    def identity(self) -> Mapping[str, Any]:
        """See :class:`tasks.judges.base.Judge`."""
        settings = self.settings
        return {
            "name": settings.name,
            "version": CLASSIFIER_VERSION,
            "model": self.model.digest,
            "answers_by": settings.answers_by,
            "yes_labels": sorted(map(folded, settings.yes_labels)),
            "no_labels": sorted(map(folded, settings.no_labels)),
            "template": settings.template,
            "max_new_tokens": settings.max_new_tokens if settings.answers_by == "text" else None,
        }

    def judge(self, question: Question, generations: Sequence[Generation], progress: Progress) -> list[Judgement]:
        """See :class:`tasks.judges.base.Judge`. A text longer than the model reads is unparsed, not cut.

        Raises:
            CheckpointError: if the model cannot be loaded, or has no chat template and none was given.
            RecipeError: if its labels are not those that the settings name.
        """
        settings = self.settings
        reader = (Labels if settings.answers_by == "label" else Words)(self.store.folder(self.model), settings)
        asked = [(place, response) for place, one in enumerate(generations) for response in one.responses]
        tokens = [reader.tokens(generations[place], response) for place, response in asked]
        found = {index: unparsed(text) for index, text in enumerate(map(reader.too_long, tokens)) if text}
        # Neighbours of like length: little padding.
        order = sorted((index for index in range(len(asked)) if index not in found), key=lambda one: len(tokens[one]))
        done = len(found)
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            for index, (answer, said) in zip(batch, reader.answers([tokens[one] for one in batch]), strict=True):
                found[index] = unparsed(said) if answer is None else decided(question, answer, said)
            done += len(batch)
            progress(done, len(asked))
        by_place: list[list[Judgement]] = [[] for _ in generations]
        for index, (place, _) in enumerate(asked):
            by_place[place].append(found[index])
        return [combined(one) for one in by_place]


def _check_template(template: str, subject: str) -> None:
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise RecipeError(f"{subject}: template is not one ({error}). Write a literal brace twice.") from error
    if "response" not in named or not named <= _FIELDS:
        raise RecipeError(
            f"{subject}: template must name {{response}}, and may name {{prompt}} and {{reference}}, got {template!r}."
        )
