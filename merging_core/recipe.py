"""A recipe: everything that determines the merged bits."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

import torch
from annotated_types import Ge

from merging_core.errors import RecipeError
from merging_core.methods import Method, RTsvm
from merging_core.methods.base import WeightChecker
from merging_core.rules import Lines, Rule, check_rules
from merging_core.settings import STRICT, check_bounds, check_choices
from merging_core.vocabulary import TokenizerPolicy
from merging_core.writer import MAX_SHARD_BYTES

# Raise it, with a bold line in CHANGELOG.md, whenever a merge of the same inputs gives other bytes.
MERGE_VERSION: Final = 2

# Far above any use, and far enough below the largest float32 that a sum of weights is one.
MAX_WEIGHT: Final = 1e30

ComputeDtype = Literal["float32", "float64"]
StoredDtype = Literal["float64", "float32", "bfloat16", "float16"]
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """One fine-tuned checkpoint in a recipe."""

    __pydantic_config__: ClassVar = STRICT
    name: str
    """How reports call this expert, such as helpful."""
    source: str
    """Local folder, hf://org/name@revision or mini3h://role."""
    weight: float = 1.0
    """Factor on this expert, at most 1e30 in size."""
    calibration: str | None = None
    """Texts for methods that ask for them: a .jsonl file, lines of {"text": ...}, or a .txt file, one text a line."""

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.source.strip():
            raise RecipeError(f"expert {self.name!r}: name and source must not be empty.")
        if not self.name.isprintable() or "|" in self.name:
            raise RecipeError(f"expert {self.name!r}: a name is one line without '|'; tables could not show it.")
        is_number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not is_number or not abs(self.weight) <= MAX_WEIGHT:
            raise RecipeError(
                f"expert {self.name!r}: weight must be a finite number between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}, "
                f"got {self.weight!r}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What to merge, how, and in which precision.

    Raises:
        RecipeError: if there is no expert, two share a name, or the weights cannot be normalised.
    """

    base: str
    """Source of the checkpoint that all experts started from."""
    experts: tuple[Expert, ...]
    """In the order in which they are merged."""
    method: Method = field(default_factory=RTsvm)
    """Merging method and its settings."""
    compute_dtype: ComputeDtype = "float32"
    """Precision of the arithmetic; a checkpoint stored wider is computed wider."""
    dtype: StoredDtype | None = None
    """Precision of the stored result; None: each tensor as in the base."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the methods that draw random numbers, >= 0."""
    rules: tuple[Rule, ...] = ()
    """What is different for some tensors; later rules win."""
    lines: Lines | None = None
    """Layer-wise scale of the merged update (LiNeS); None: 1 everywhere."""
    tokenizer: TokenizerPolicy | None = None
    """For experts with more tokens or padding: base drops what the base lacks, union adds it; None: refused."""
    chat_template: str = "base"
    """Whose chat template the merged model has: base, or the name of an expert."""
    generation_config: str = "base"
    """Whose generation settings the merged model has: base, or the name of an expert."""
    max_shard_bytes: Annotated[int, Ge(1)] = MAX_SHARD_BYTES
    """Size in bytes at which a new file of the merged weights is begun, >= 1."""

    def __post_init__(self) -> None:
        check_bounds(self, "recipe")
        check_choices(self, "recipe")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise RecipeError(f"recipe: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.tokenizer not in (None, *get_args(TokenizerPolicy)):
            raise RecipeError(f"recipe: tokenizer must be base or union, or left out, got {self.tokenizer!r}.")
        if not self.experts:
            raise RecipeError("recipe: experts must name at least one checkpoint, got none.")
        names = [expert.name for expert in self.experts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(f"recipe: expert names must differ, {twice[0]!r} stands {names.count(twice[0])} times.")
        for entry, chosen in (("chat_template", self.chat_template), ("generation_config", self.generation_config)):
            if chosen not in ("base", *names):
                raise RecipeError(f"recipe: {entry} must be base or the name of an expert, got {chosen!r}.")
        if isinstance(self.method, WeightChecker):
            self.method.check_weights(self.weights)
        check_rules(self.rules, self.method, self.weight_of)

    @property
    def weight_of(self) -> dict[str, float]:
        """Expert name to factor, in recipe order."""
        return {expert.name: expert.weight for expert in self.experts}

    @property
    def weights(self) -> tuple[float, ...]:
        """Factor on each expert, in recipe order."""
        return tuple(expert.weight for expert in self.experts)

    def identity(self, base: str, experts: Mapping[str, str]) -> dict[str, Any]:
        """What determines the merged bytes, with sources replaced by digests.

        Args:
            base: digest of the base checkpoint.
            experts: expert name to digest of its checkpoint.

        Returns:
            A mapping for :func:`merging_core.digest.digest_of`; the sources' spelling is not part of it.
        """
        return {
            "version": MERGE_VERSION,
            "base": base,
            "experts": [
                {"name": expert.name, "checkpoint": experts[expert.name], "weight": expert.weight}
                for expert in self.experts
            ],
            "method": asdict(self.method),
            "compute_dtype": self.compute_dtype,
            "dtype": self.dtype,
            "seed": self.seed,
            "rules": [asdict(rule) for rule in self.rules],
            "lines": asdict(self.lines) if self.lines else None,
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "generation_config": self.generation_config,
            # Not told where nothing is said: models from before there was a choice are found.
            **({"max_shard_bytes": self.max_shard_bytes} if self.max_shard_bytes != MAX_SHARD_BYTES else {}),
        }
