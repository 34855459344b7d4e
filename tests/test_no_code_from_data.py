"""No source file turns data into code: no eval, no exec, no pickle, no remote code of a checkpoint."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("merging_core", "tasks", "flows") for path in (ROOT / package).rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code"}
RUNS_CODE_ON_PURPOSE = {
    # In a process that has no network and no rights: tasks/sandbox/isolation.py.
    "tasks/sandbox/runner.py": ["runpy"],
    # Over a socket between a process and its own child, see tasks/apart/call.py.
    "tasks/apart/call.py": ["cloudpickle"],
    "tasks/apart/server.py": ["cloudpickle"],
}
CALLS = {"eval", "exec", "compile", "__import__"}


def faults(source):
    """What a file does that it must not, with line numbers."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = {name.name.partition(".")[0] for name in names} & MODULES
            case ast.ImportFrom(module=str(module), level=0):
                found = {module.partition(".")[0]} & MODULES
            case ast.Call(func=ast.Name(id=name)):
                found = {name} & CALLS
            case ast.Call(func=ast.Attribute(value=ast.Name(id="builtins"), attr=name)):
                found = {name} & CALLS
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=("torch" | "yaml" | "numpy" | "np") as module), attr="load")
            ):
                found = set() if _is_safe(module, node) else {f"{module}.load"}
            case ast.Call(func=ast.Attribute(attr="read_pickle" | "unsafe_load" as name)):
                found = {name}
            case ast.keyword(arg="trust_remote_code" | "allow_pickle" as name, value=value):
                found = set() if _is_constant(value, False) else {name}
            case ast.Dict(keys=keys, values=values):
                named = {
                    key.value: value for key, value in zip(keys, values, strict=True) if isinstance(key, ast.Constant)
                }
                value = named.get("trust_remote_code")
                found = {"trust_remote_code"} if value and not _is_constant(value, False) else set()
            case _:
                continue
        yield from (f"line {getattr(node, 'lineno', 0)}: {one}" for one in sorted(found))


def _is_safe(module, call):
    given = {word.arg: word.value for word in call.keywords}
    if module == "torch":
        return _is_constant(given.get("weights_only"), True)
    # numpy refuses pickles unless allow_pickle says otherwise; our yaml loaders are subclasses of SafeLoader.
    loader = given.get("Loader")
    return module != "yaml" or (isinstance(loader, ast.Name) and loader.id.startswith("_"))


def _is_constant(node, value):
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_turns_data_into_code(path):
    allowed = RUNS_CODE_ON_PURPOSE.get(path.relative_to(ROOT).as_posix(), [])
    assert [one.partition(": ")[2] for one in faults(path.read_text())] == allowed


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "builtins.exec(x)",
        "import pickle",
        "from dill import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "yaml.load(f)",
        "np.load(f, allow_pickle=True)",
        "pandas.read_pickle(f)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)",
        "options = {'trust_remote_code': flag}",
    ],
)
def test_the_check_finds_what_it_looks_for(source):
    assert len(list(faults(source))) == 1


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "torch.load(f, weights_only=True)", "re.compile(p)", "json.load(f)", "f(trust_remote_code=False)"],
)
def test_the_check_lets_pass_what_is_harmless(source):
    assert list(faults(source)) == []
