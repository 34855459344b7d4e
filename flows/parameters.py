"""Parameters of the flows: what the run form, the API and benchmark files may say."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.evaluation import Evaluation
from merging_core.recipe import Recipe
from merging_core.vocabulary import TokenizerPolicy
from tasks.names import check_names, repeated
from tasks.recipes import (
    AnyExpert,
    AnyMethod,
    RecipeModel,
    Source,
    experts_as_list,
    method_as_mapping,
    read_yaml,
    validated,
)

SEED: Final = "{seed}"
Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Mixture(BaseModel):
    """A model trained on mixed data, to be compared with merges."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(title="Name", description="How reports call it.", min_length=1)
    source: Source = Field(
        title="Source",
        description="Local folder, hf://org/name@revision, mini3h://mix or recipes/data/name.yaml?seed=1.",
    )


class Merge(BaseModel):
    """Merge experts by one recipe."""

    model_config = ConfigDict(extra="forbid")
    recipe: RecipeModel = Field(title="Recipe", description="What is merged and how.")
    device: str = Field(
        default="cpu",
        title="Device",
        description="Torch device, or several that share the tensors, such as cuda:0,cuda:1.",
        min_length=1,
    )
    timeout_minutes: float | None = Field(
        default=None,
        title="Time limit in minutes",
        description="Of one merge, or of the task vectors of one expert. What is complete by then is kept for the next "
        "run. Left out: none.",
        gt=0,
        allow_inf_nan=False,
    )


class Decompose(Merge):
    """Make task vectors, statistics and calibrations, as far as a recipe's method needs them; nothing is merged."""


class MergeAndEvaluate(Evaluation):
    """Merge by one recipe and compare the result with its base and experts."""

    recipe: RecipeModel = Field(title="Recipe", description="What is merged and how.")
    publish_to: str = Field(
        default="",
        title="Publish to",
        description="A folder, s3://bucket/prefix or hf://org/name for the merged model. Left empty: it stays in the "
        "store.",
    )
    approval: bool = Field(
        default=True,
        title="Ask before publishing",
        description="The run pauses after the evaluation until somebody promotes or rejects the model.",
    )


class Bench(Evaluation):
    """Compare several methods on one suite: scales are chosen on validation, everything is reported on test."""

    title: str = Field(default="3H benchmark", title="Title", description="Heads the report.", min_length=1)
    base: Source = Field(title="Base checkpoint", description="What all experts started from.")
    experts: list[AnyExpert] = Field(title="Experts", description="The fine-tuned checkpoints.", min_length=1)
    mixtures: list[Mixture] = Field(
        default_factory=list, title="Data mixtures", description="Models trained on mixed data, for comparison."
    )
    methods: list[AnyMethod] = Field(title="Methods", description="Merging methods to compare.", min_length=1)
    tokenizer: TokenizerPolicy | None = Field(
        default=None,
        title="Tokenizer",
        description="For experts with more tokens or padding than the base: base drops what the base lacks, union adds "
        "it. Left out: such experts are refused.",
    )
    scales: list[Scale] = Field(
        default=[0.4, 0.6, 0.8, 1.0, 1.2],
        title="Scales",
        description="Tried on validation for every method that has a scale: the same budget of trials for each.",
        min_length=1,
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list,
        title="Seeds",
        description="Everything is done once for each: {seed} in a source stands for it, and a generated world is that "
        "of the seed. Scales are chosen over all seeds together. Left out: once.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        """What no single field shows: names that repeat, and recipes that cannot be."""
        names = ["base", *(one.name for one in self.experts), *(one.name for one in self.mixtures), *self.candidates()]
        if twice := repeated(names):
            raise ValueError(f"names of base, experts, mixtures and methods must differ, {twice[0]!r} stands twice")
        self._check_seeds()
        return self

    def _check_seeds(self) -> None:
        if twice := repeated(self.seeds):
            raise ValueError(f"seeds must differ, {twice[0]} stands twice")
        sources = [self.base, *(one.source for one in self.experts), *(one.source for one in self.mixtures)]
        if varied := [source for source in sources if SEED in source]:
            if not self.seeds:
                raise ValueError(f"{varied[0]}: names {SEED}, and there are no seeds; add seeds: [0, 1, 2]")
        elif len(self.seeds) > 1:
            raise ValueError(f"seeds: no source names {SEED}, so every seed would give the same models; write it there")

    def by_seed(self) -> "dict[int, Bench]":
        """Seed to the benchmark with its sources; without seeds the one seed is 0."""
        return {seed: self._with_seed(seed) for seed in self.seeds} if self.seeds else {0: self}

    def _with_seed(self, seed: int) -> "Bench":
        def own(source: str) -> str:
            return source.replace(SEED, str(seed))

        return self.model_copy(
            update={
                "base": own(self.base),
                "experts": [replace(one, source=own(one.source)) for one in self.experts],
                "mixtures": [one.model_copy(update={"source": own(one.source)}) for one in self.mixtures],
            }
        )

    def candidates(self) -> dict[str, list[Recipe]]:
        """Method name to the recipes that are tried on validation, smallest scale first."""
        found: dict[str, list[Recipe]] = {}
        for method in self.methods:
            plain: Any = method
            tried = [plain]
            if scale := next((field for field in fields(plain) if field.name == "scale"), None):
                if plain.scale != scale.default:
                    raise ValueError(
                        f"{method.name}: scale {plain.scale:g} would be replaced by those of scales, "
                        "which every method tries alike; leave it out"
                    )
                tried = [replace(plain, scale=value) for value in sorted(set(self.scales))]
            if (label := _label(plain)) in found:
                raise ValueError(f"method {label} stands twice")
            found[label] = [
                Recipe(base=self.base, experts=tuple(self.experts), method=one, tokenizer=self.tokenizer)
                for one in tried
            ]
        return found


def _label(method: Any) -> str:
    """How a report calls a method: its name and the settings that are not the default, the scale aside."""
    changed = [
        f"{field.name}: {getattr(method, field.name)}"
        for field in fields(method)
        if field.name not in ("name", "scale") and getattr(method, field.name) != field.default
    ]
    return f"{method.name} ({', '.join(changed)})" if changed else str(method.name)


def load_bench(path: Path) -> Bench:
    """Read and check a benchmark file.

    Raises:
        RecipeError: naming the entry, what was expected and, for a misspelt name, the nearest right one.
    """
    data: dict[str, Any] = read_yaml(path)
    check_names(f"benchmark {path.name}", data, Bench.model_fields)
    if "experts" in data:
        data["experts"] = experts_as_list(data["experts"])
    if isinstance(mixtures := data.get("mixtures"), dict):
        data["mixtures"] = [{"name": name, "source": source} for name, source in mixtures.items()]
    if isinstance(methods := data.get("methods"), list):
        data["methods"] = [method_as_mapping(method) for method in methods]
    bench: Bench = validated(Bench, data, f"benchmark {path.name}")
    return bench
