"""Suites: which benchmarks are run, and to which of the three H each belongs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from annotated_types import Ge, Le

from merging_core.digest import digest_of, file_sha256
from merging_core.errors import RecipeError
from merging_core.settings import STRICT, check_bounds
from tasks.benchmark import Benchmark as Benchmark
from tasks.benchmark import Dimension as Dimension
from tasks.benchmark_data import local_files
from tasks.names import check_names, nearest, repeated
from tasks.recipes import read_yaml, validated
from tasks.task_files import Split as Split
from tasks.task_files import TaskFile, packaged_files, packaged_tasks, read_task_file

SUITES: Final = Path(__file__).with_name("suites")


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """A named set of benchmarks."""

    __pydantic_config__: ClassVar = STRICT
    name: str
    """Name in recipes and reports."""
    title: str
    """One line for people."""
    benchmarks: tuple[Benchmark, ...]
    """What is run."""
    tasks: str = "."
    """Folder with the suite's own task files, beside the suite's file."""
    folder: Path = SUITES
    """Where the suite's file lies; set on loading."""
    inherited: tuple[Path, ...] = ()
    """Folders of task files of the suites that it extends; set on loading."""
    validation_share: Annotated[float, Ge(0), Le(0.5)] = 0.0
    """Share of the documents of a benchmark without a validation split of its own that is set apart for validation
    and left out of test, between 0 and 0.5; 0: such a benchmark has no validation."""
    data_dir: Path | None = None
    """Folder with local files of benchmarks, ``<data_dir>/<data>/``; a benchmark without a folder there comes from
    its hub. Set on loading."""
    world: Literal["mini3h"] | None = None
    """Where the documents come from if they are generated; None: from data files or a hub that the task names."""
    world_seed: Annotated[int, Ge(0)] = 0
    """Seed of the generated world, >= 0."""

    def __post_init__(self) -> None:
        check_bounds(self, f"suite {self.name}")
        if twice := repeated(one.task for one in self.benchmarks):
            raise RecipeError(f"suite {self.name}: {', '.join(twice)} stands twice. Name each benchmark once.")

    @property
    def tasks_folder(self) -> Path:
        """Where the suite's own task files lie."""
        return self.folder / self.tasks

    def metadata(self, split: Split) -> dict[str, Any]:
        """What the functions of the task files are told."""
        return {"split": split, "world_seed": self.world_seed} if self.world else {}

    def benchmark(self, task: str) -> Benchmark:
        """The benchmark of that name.

        Raises:
            RecipeError: if there is none, with the nearest right name.
        """
        found = {one.task: one for one in self.benchmarks}
        check_names(f"suite {self.name}", {task: None}, found)
        return found[task]

    def task_files(self, benchmark: Benchmark) -> list[TaskFile]:
        """The task files of a benchmark: one, or as many as its pattern finds.

        Raises:
            RecipeError: if there is none, or one is broken.
        """
        subject = f"suite {self.name}"
        if benchmark.lm_eval:
            paths = packaged_files(benchmark.lm_eval, f"{subject}: benchmark {benchmark.task}")
        else:
            folders = (self.tasks_folder, *self.inherited)
            options = [folder / f"{benchmark.task}.yaml" for folder in folders]
            paths = [next((path for path in options if path.is_file()), options[0])]
        return [read_task_file(path, subject) for path in paths]

    def local_data(self, benchmark: Benchmark, file: TaskFile, split: Split) -> dict[str, Path]:
        """The task's own name of a split to its local file, what is asked first; empty where its hub is read.

        Raises:
            RecipeError: if its folder lacks a file that is needed; or if it has neither a folder nor a hub.
        """
        says, subject = file.says, f"benchmark {benchmark.task}"
        if self.world is not None:
            return {}
        folder = self.data_dir / benchmark.data_folder if self.data_dir else None
        if folder is None or not folder.is_dir():
            if not says.get("dataset_path") and not says.get("custom_dataset"):
                raise RecipeError(
                    f"{subject}: is on no hub, and {folder or 'no data_dir'} holds no files of it. "
                    "See docs/suites.md for what to put there."
                )
            return {}
        if "*" in benchmark.lm_eval:
            folder = folder / str(says.get("dataset_name"))
        splits = [file.split(split)]
        if file.shots(benchmark.num_fewshot) and file.shots_split and file.shots_split not in splits:
            splits.append(file.shots_split)
        return local_files(folder, benchmark.data_folder, splits, subject)

    def benchmark_digest(self, benchmark: Benchmark, split: Split) -> str:
        """Identity of one benchmark by content: its task files, its documents, and how it is asked and read.

        Judge, dimension and weight are not part of it: they do not change what a model says.

        Raises:
            RecipeError: if a task file or a file of its data is missing.
        """
        files = self.task_files(benchmark)
        return digest_of(
            {
                "files": {_name(path): file_sha256(path) for file in files for path in file.files},
                "data": [
                    {
                        name: [path.name, file_sha256(path)]
                        for name, path in self.local_data(benchmark, file, split).items()
                    }
                    for file in files
                ],
                "documents": self._documents_digest(benchmark, split),
                "validation_share": None if self.world else self.validation_share,
                "task": benchmark.task,
                "read": "responses" if benchmark.question else [benchmark.metric, benchmark.filter],
                "num_fewshot": benchmark.num_fewshot,
                "chat_template": benchmark.chat_template,
                "sampling": [benchmark.samples, benchmark.temperature],
                "metadata": self.metadata(split),
            }
        )

    def _documents_digest(self, benchmark: Benchmark, split: Split) -> str | None:
        return _world_digest(self.world_seed, benchmark.task, split) if self.world else None


@cache
def _world_digest(seed: int, task: str, split: Split) -> str:
    """Identity of the generated documents of one task; asked again for every model of a run."""
    from tasks.mini3h.data import documents
    from tasks.mini3h.world import World

    skill: Any = task.removeprefix("mini3h_")
    return digest_of([asdict(one) for one in documents(World(seed), skill, split)])


def _name(path: Path) -> str:
    """A file in a digest: the same on every machine."""
    return str(path.relative_to(packaged_tasks())) if path.is_relative_to(packaged_tasks()) else path.name


def load_suite(name: str, data_dir: Path | None = None) -> Suite:
    """Read a suite that ships with Tripoise by its name, or any other by the path of its YAML file.

    Args:
        name: of the suite, or a path that ends in .yaml.
        data_dir: folder with local files of benchmarks; see docs/suites.md.

    Raises:
        RecipeError: if there is none of that name, with the nearest right one; the file is not a suite; an H has no
            benchmark; or ``data_dir`` holds no folder of any benchmark.
    """
    path = _path(name)
    data = _extended(path, ())
    suite: Suite = validated(Suite, {**data, "folder": path.parent.resolve()}, f"suite {path.name}")
    if missing := set(get_args(Dimension)) - {one.dimension for one in suite.benchmarks}:
        raise RecipeError(
            f"suite {suite.name}: no benchmark for {', '.join(sorted(missing))}. Each H needs one or more."
        )
    if data_dir is None:
        return suite
    folders = sorted({one.data_folder for one in suite.benchmarks})
    if suite.world or not any((data_dir / folder).is_dir() for folder in folders):
        raise RecipeError(
            f"suite {suite.name}: {data_dir} holds no folder of a benchmark. Looked for: {', '.join(folders)}."
        )
    return replace(suite, data_dir=data_dir.resolve())


def _path(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if path.parent == SUITES and not path.exists():
        shipped = sorted(file.stem for file in SUITES.glob("*.yaml"))
        raise RecipeError(f"suite {name!r} does not exist.{nearest(name, shipped)} All: {', '.join(shipped)}.")
    return path


def _extended(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """What a suite's file says, over what the suite that it extends says.

    ``only`` names the benchmarks that are taken from there; a benchmark of a known name changes its entries.
    """
    data = read_yaml(path)
    if path.resolve() in seen:
        raise RecipeError(f"suite {path.name}: extends itself. Remove one `extends`.")
    base, only, own = data.pop("extends", None), data.pop("only", None), data.get("benchmarks", [])
    if base is None and only is None:
        return data
    subject = f"suite {path.name}"
    if not isinstance(base, str):
        raise RecipeError(f"{subject}: extends must name a suite, got {base!r}.")
    relative = base.endswith((".yaml", ".yml"))
    origin = _path(str(path.parent / base) if relative else base)
    parent = _extended(origin, (*seen, path.resolve()))
    known = {one["task"]: one for one in parent["benchmarks"]}
    if only is not None:
        check_names(f"{subject}: only", dict.fromkeys(only), known)
        known = {name: known[name] for name in only}
    if not isinstance(own, list) or not all(isinstance(one, Mapping) and "task" in one for one in own):
        raise RecipeError(f"{subject}: benchmarks must be a list of entries with a task.")
    for one in own:
        known[one["task"]] = {**known.get(one["task"], {}), **one}
    folder = str((origin.parent / parent.get("tasks", ".")).resolve())
    inherited = [folder, *parent.get("inherited", [])]
    return {"tasks": ".", **_inheritable(parent), **data, "benchmarks": list(known.values()), "inherited": inherited}


def _inheritable(parent: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parent.items() if name not in ("name", "title", "tasks", "folder")}
