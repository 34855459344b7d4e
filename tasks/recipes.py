"""Recipe files: YAML in, a checked Recipe out, every mistake with the nearest right name."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from merging_core.errors import RecipeError
from merging_core.methods import METHODS, Method, RTsvm
from merging_core.recipe import ComputeDtype, Expert, Recipe, StoredDtype
from merging_core.rules import Lines, Rule
from merging_core.vocabulary import TokenizerPolicy
from merging_core.writer import MAX_SHARD_BYTES
from tasks.mergekit import from_mergekit, is_mergekit
from tasks.names import check_names, nearest


def _no_booleans(data: Any) -> Any:
    """Refuse true and false where a number is meant: pydantic would read them as 1 and 0."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            if isinstance(value, bool) and name in _NUMBERS:
                raise ValueError(f"{name} must be a number, got {value!r}")
    return data


# Settings and entries that hold a number in every method and expert.
_NUMBERS = {
    field.name for shape in (*METHODS.values(), Expert) for field in fields(shape) if "float" in str(field.type)
} | {"seed"}


def _default_first(schema: dict[str, Any]) -> None:
    """Let forms open with what is meant where nothing is said.

    Prefect's form shows the first choice, and on a change to another one keeps the entries of the first: so it is a
    choice without settings.
    """
    name = {"const": RTsvm().name, "default": RTsvm().name, "title": "Name", "description": "Which method."}
    default = {
        "title": "default",
        "description": "R-TSVM as it comes. Another choice brings its own settings.",
        "type": "object",
        "properties": {"name": name},
        "additionalProperties": False,
    }
    schema["anyOf"] = [default, *schema.pop("oneOf")]


AnyMethod = Annotated[
    Method, Field(discriminator="name", json_schema_extra=_default_first), BeforeValidator(_no_booleans)
]
AnyExpert = Annotated[Expert, BeforeValidator(_no_booleans)]
Source = Annotated[str, Field(min_length=1)]


class RecipeModel(BaseModel):
    """A recipe at the boundary: what a recipe file, the run form and the API may say."""

    model_config = ConfigDict(extra="forbid", title="Recipe")
    base: Source = Field(
        title="Base checkpoint",
        description="What all experts started from: a local folder, hf://org/name@revision or mini3h://base.",
    )
    experts: list[AnyExpert] = Field(
        title="Experts", description="The fine-tuned checkpoints, in the order in which they are merged.", min_length=1
    )
    method: AnyMethod = Field(
        default_factory=RTsvm,
        title="Merging method",
        description="How the experts are merged; each has settings.",
    )
    compute_dtype: ComputeDtype = Field(
        default="float32",
        title="Precision of the arithmetic",
        description="A checkpoint that is stored wider is computed wider.",
    )
    dtype: StoredDtype | None = Field(
        default=None, title="Precision of the stored result", description="Left out: each tensor as in the base."
    )
    seed: int = Field(default=0, title="Seed", description="For methods that draw random numbers.", ge=0)
    rules: list[Rule] = Field(
        default_factory=list,
        title="Rules",
        description="Other settings, weights or a policy for some tensors or depths; later rules win.",
    )
    lines: Lines | None = Field(
        default=None, title="LiNeS", description="Scale of the merged update that grows with depth. Left out: none."
    )
    tokenizer: TokenizerPolicy | None = Field(
        default=None,
        title="Tokenizer",
        description="For experts with more tokens or padding than the base: base drops what the base lacks, union adds "
        "it. Left out: such experts are refused.",
    )
    chat_template: str = Field(
        default="base",
        title="Chat template",
        description="Whose chat template the merged model has: base, or the name of an expert.",
    )
    generation_config: str = Field(
        default="base",
        title="Generation settings",
        description="Whose generation_config.json the merged model has: base, or the name of an expert.",
    )
    max_shard_bytes: int = Field(
        default=MAX_SHARD_BYTES,
        title="Largest file",
        description="Bytes at which a new file of the merged weights is begun. Machines can share files.",
        ge=1,
    )

    def recipe(self) -> Recipe:
        """The checked recipe.

        Raises:
            RecipeError: for what no single field shows: experts of one name, weights that cancel.
        """
        return Recipe(
            base=self.base,
            experts=tuple(self.experts),
            method=self.method,
            compute_dtype=self.compute_dtype,
            dtype=self.dtype,
            seed=self.seed,
            rules=tuple(self.rules),
            lines=self.lines,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            generation_config=self.generation_config,
            max_shard_bytes=self.max_shard_bytes,
        )


class _UniqueLoader(yaml.SafeLoader):
    """Refuses a name that stands twice in one mapping: plain YAML would keep the last and drop the first silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name!r} stands twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        RecipeError: if the file is missing, is not YAML, or holds something else.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueLoader)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: expected a mapping of names to values, got {type(value).__name__}.")
    return value


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe file; relative paths in it are seen from the current folder."""
    return parse_recipe(read_yaml(path))


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """Check a recipe given as plain data.

    Args:
        data: a mergekit file, or a recipe: ``experts`` may be a mapping of name to source or to ``{source, weight}``,
            or a list of ``{name, source, weight}``; ``method`` may be a name alone or ``{name, settings…}``.

    Raises:
        RecipeError: naming the entry, what was expected and, for a misspelt name, the nearest right one.
    """
    if is_mergekit(data):
        return from_mergekit(data)
    check_names("recipe", data, RecipeModel.model_fields)
    plain = dict(data)
    if "experts" in plain:
        plain["experts"] = experts_as_list(plain["experts"])
    if "method" in plain:
        plain["method"] = method_as_mapping(plain["method"])
    if isinstance(plain.get("rules"), list):
        plain["rules"] = [_rule_as_mapping(number, rule, plain) for number, rule in enumerate(plain["rules"], start=1)]
    model: RecipeModel = validated(RecipeModel, plain, "recipe")
    return model.recipe()


def experts_as_list(experts: Any) -> Any:
    """Turn the mapping form of ``experts`` into the list form, and check the names of the entries."""
    if isinstance(experts, Mapping):
        experts = [
            {"name": name, **(entry if isinstance(entry, Mapping) else {"source": entry})}
            for name, entry in experts.items()
        ]
    if not isinstance(experts, list):
        raise RecipeError(f"experts: expected a mapping of name to source, got {experts!r}.")
    for entry in experts:
        if isinstance(entry, Mapping):
            check_names(f"expert {entry.get('name', '?')!r}", entry, [field.name for field in fields(Expert)])
    return experts


def method_as_mapping(method: Any) -> dict[str, Any]:
    """Turn a bare method name into a mapping, and check the names of method and settings."""
    plain = {"name": method} if isinstance(method, str) else method
    if not isinstance(plain, Mapping) or "name" not in plain:
        raise RecipeError(f"method: expected a name or a mapping with a name, got {method!r}.")
    name = plain["name"]
    if not isinstance(name, str) or name not in METHODS:
        raise RecipeError(f"method {name!r} does not exist.{nearest(str(name), METHODS)} All: {', '.join(METHODS)}.")
    check_names(f"method {name}", plain, [field.name for field in fields(METHODS[name])])
    return dict(plain)


def _rule_as_mapping(number: int, rule: Any, recipe: Mapping[str, Any]) -> Any:
    """Let ``tensors`` and ``exclude`` be one pattern, and check the names of entries and settings."""
    if not isinstance(rule, Mapping):
        return rule
    subject = f"rule {number}"
    check_names(subject, rule, [field.name for field in fields(Rule)])
    if isinstance(settings := rule.get("settings"), Mapping):
        method = recipe["method"]["name"] if "method" in recipe else RTsvm().name
        check_names(f"{subject}: method {method}", settings, [field.name for field in fields(METHODS[method])][1:])
    return {
        name: [value] if name in ("tensors", "exclude", "experts") and isinstance(value, str) else value
        for name, value in rule.items()
    }


def validated(shape: Any, data: Any, subject: str) -> Any:
    """Let pydantic build ``shape`` from plain data; its complaints become one RecipeError."""
    try:
        return _adapter(shape).validate_python(data)
    except ValidationError as error:
        texts = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"]) or subject
            got = f", got {item['input']!r}" if isinstance(item["input"], str | int | float | bool | None) else ""
            message = item["msg"].removeprefix("Value error, ").rstrip(".")
            texts.append(message + "." if item["type"] == "value_error" else f"{where}: {message}{got}.")
        raise RecipeError(f"{subject}: " + " ".join(dict.fromkeys(texts))) from error


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe as the text of a recipe file, in the mapping form."""
    plain = asdict(recipe)
    plain["experts"] = {expert.name: _plain_expert(expert) for expert in recipe.experts}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _plain_expert(expert: Expert) -> Any:
    """The source alone where nothing else is said of an expert."""
    said = {
        field.name: getattr(expert, field.name)
        for field in fields(expert)
        if field.name != "name" and getattr(expert, field.name) != field.default
    }
    return expert.source if set(said) == {"source"} else said


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
