"""Independent steps on threads and on a real Ray cluster of two nodes: the same bytes, and what a dead node costs."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

import merging_core.merge
import tasks.orchestration
from flows.merge import merge as merge_flow
from flows.merge_and_evaluate import merge_and_score
from flows.parameters import Merge, MergeAndEvaluate
from flows.pipeline import Kitchen, pin_recipe
from merging_core.checkpoint import Checkpoint
from merging_core.errors import RecipeError
from tasks.fan_out import fan_out, num_gpus
from tasks.orchestration import AsPrefectTasks
from tasks.recipes import RecipeModel, load_recipe
from tasks.steps import Direct, Step
from tasks.store import Ref, Store

EXPERTS = ("helpful", "honest", "harmless")
SHARDS = {"method": {"name": "tsvm"}, "max_shard_bytes": 1500}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """Two nodes of one CPU and one pretended GPU each, on loopback, that ask for a token."""

    def __init__(self, folder):
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "OMP_NUM_THREADS": "1",
        }
        self._ray = str(Path(sys.executable).with_name("ray"))
        self.folder = folder
        port = self.address.partition(":")[2]
        self.nodes = [self._start("--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false")]
        self.nodes.append(self._start(f"--address={self.address}"))

    def _start(self, *options):
        command = [self._ray, "start", *options, "--num-cpus=1", "--num-gpus=1", "--node-ip-address=127.0.0.1"]
        log = (self.folder / f"node-{len(list(self.folder.glob('node-*')))}.log").open("w+")
        node = subprocess.Popen(
            [*command, "--disable-usage-stats", "--block"], env=self.environment, stdout=log, stderr=log
        )
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in Path(log.name).read_text():
            assert node.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, "the node did not start"
            time.sleep(0.1)
        return node

    def raylet(self, number):
        """The process of one node that all of its workers end with."""
        [found] = [
            process
            for process in psutil.Process(self.nodes[number].pid).children(recursive=True)
            if process.name() == "raylet"
        ]
        return found

    def stop(self):
        for node in self.nodes:
            if node.poll() is None:
                processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
                for process in processes:
                    process.terminate()
                _, alive = psutil.wait_procs(processes, timeout=20)
                for process in alive:
                    process.kill()


@pytest.fixture(scope="module")
def cluster(prefect_server, tmp_path_factory):
    pytest.importorskip("ray", reason="pip install 'tripoise[ray]'")
    # Sockets lie below it, and their paths must be short.
    folder = tmp_path_factory.getbasetemp().parent / f"ray{os.getpid()}"
    folder.mkdir()
    found = Cluster(folder)
    yield found
    found.stop()


def on_ray(cluster, *arguments, **environment):
    own = {"TRIPOISE_RAY_ADDRESS": cluster.address, "PREFECT_API_URL": PREFECT_API_URL.value()}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**cluster.environment, **own, **environment},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def merged_alone(recipe, root):
    """The folder of the same merge in this process, in one go."""
    run = Direct(Store(root))
    return run.store.folder(Kitchen(run, *pin_recipe(recipe, run)).merge(recipe))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def task_runs(name):
    with get_client(sync_client=True) as client:
        return [run for run in client.read_task_runs() if run.name.startswith(name)]


def begun(folder, number):
    """What the first steps said when they began, awaited."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = (folder / "begun").read_text().splitlines() if (folder / "begun").exists() else []
        if len(lines) >= number:
            return [json.loads(line) for line in lines]
        time.sleep(0.05)
    raise AssertionError(f"{number} steps did not begin")


def as_request(recipe):
    return Merge(recipe=RecipeModel.model_validate({name: getattr(recipe, name) for name in RecipeModel.model_fields}))


def test_shards_on_threads_make_the_bytes_of_one_merge(recipe_file, tmp_path, monkeypatch, prefect_server):
    recipe = load_recipe(recipe_file(**SHARDS))
    alone, store = merged_alone(recipe, tmp_path / "alone"), Store(tmp_path / "store")
    monkeypatch.setenv("TRIPOISE_STORE", str(store.root))
    monkeypatch.setenv("TRIPOISE_PARALLEL_STEPS", "2")
    ref = Ref(*merge_flow(as_request(recipe))["merged"].split("/"))
    assert contents(store.folder(ref)) == contents(alone)
    assert store.manifest(ref).details == Store(tmp_path / "alone").manifest(ref).details
    files = sorted(path.name for path in alone.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(file for shard in store.refs("shard") for file in store.manifest(shard).files) == files
    titles = {f"merge tsvm x 1, file {number} of {len(files)}" for number in range(1, len(files) + 1)}
    assert titles <= {run.name for run in task_runs("merge")}


class Before(Direct):
    """Calls something with the merge step before it is run."""

    def __init__(self, store, call):
        super().__init__(store)
        self.call = call

    def build(self, name, title, steps):
        if name == "merge":
            self.call(steps[0])
        return super().build(name, title, steps)


def cut_short(file):
    file.write_bytes(b"cut short")


def flip_a_bit(file):
    """As a bad disk does: size and time stay."""
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit])
def test_a_merge_takes_the_shards_that_are_there_and_makes_the_others(recipe_file, tmp_path, monkeypatch, damage):
    recipe = load_recipe(recipe_file(**SHARDS))
    alone, store = merged_alone(recipe, tmp_path / "alone"), Store(tmp_path / "store")
    written, taken, damaged = [], [], []
    write = merging_core.merge.write_checkpoint

    def noted(out, layout, compute, **options):
        write(out, layout, lambda name: written.append(name) or compute(name), **options)

    def two_of_them(step):
        first, second, *others = step.parts()
        assert len(others) > 1
        first.build(store)
        taken.extend(written)
        second.build(store)
        damaged.append(next(store.folder(second.ref).glob("*.safetensors")))
        damage(damaged[0])
        written.clear()

    monkeypatch.setattr(merging_core.merge, "write_checkpoint", noted)
    run = Before(store, two_of_them)
    made = store.folder(Kitchen(run, *pin_recipe(recipe, run)).merge(recipe))
    assert contents(made) == contents(alone)
    with Checkpoint(alone) as whole:
        assert taken
        assert sorted(written) == sorted(set(whole.tensors) - set(taken))


def test_shards_have_the_time_limit_of_their_merge(recipe_file, tmp_path, monkeypatch, prefect_server):
    limits = []
    made = tasks.orchestration.build_apart
    monkeypatch.setattr(
        tasks.orchestration,
        "build_apart",
        lambda steps, store: limits.extend((one.kind, one.timeout_minutes) for one in steps) or made(steps, store),
    )
    monkeypatch.setenv("TRIPOISE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("TRIPOISE_PARALLEL_STEPS", "2")
    request = as_request(load_recipe(recipe_file(**SHARDS))).model_copy(update={"timeout_minutes": 7.0})
    merge_flow(request)
    assert {"shard", "merged", "task-vectors"} <= {kind for kind, _ in limits}
    assert {limit for _, limit in limits} == {7.0}


@flow
def counted(root):
    def make(number):
        return Step("data", f"step {number}", {"number": number}, (), lambda out: (out / "a").write_text("a") and None)

    run = AsPrefectTasks(Store(root))
    run.map("work", [("one", [make(1), make(2)]), ("two", [make(3)])])
    run.map("work", [("again", [make(3)]), ("three", [make(4)])])
    return run.num_made, run.num_reused


def test_what_was_made_and_reused_is_counted_alike(tmp_path, monkeypatch, prefect_server):
    one_after_the_other = counted(tmp_path / "a")
    monkeypatch.setenv("TRIPOISE_PARALLEL_STEPS", "2")
    assert counted(tmp_path / "b") == one_after_the_other == (3, 1)


@pytest.mark.parametrize("method", [{"name": "pcb"}, {"name": "ties", "trim_scope": "global"}])
def test_a_method_that_looks_at_the_whole_model_is_not_split(recipe_file, tmp_path, method):
    found = []
    run = Before(Store(tmp_path / "store"), lambda step: found.extend(step.parts()))
    recipe = load_recipe(recipe_file(method=method, max_shard_bytes=1500))
    Kitchen(run, *pin_recipe(recipe, run)).merge(recipe)
    assert not found


def test_the_size_of_files_names_another_artifact_and_the_usual_one_none(recipe_file):
    usual, same, other = (load_recipe(recipe_file(**how)) for how in ({}, {"max_shard_bytes": 5_000_000_000}, SHARDS))
    assert usual.identity("b", {}.fromkeys(usual.weight_of, "d")) == same.identity(
        "b", {}.fromkeys(usual.weight_of, "d")
    )
    assert "max_shard_bytes" not in usual.identity("b", {}.fromkeys(usual.weight_of, "d"))
    assert other.identity("b", {}.fromkeys(usual.weight_of, "d"))["max_shard_bytes"] == 1500


def test_merging_and_scoring_on_ray_gives_the_bytes_of_one_process(cluster, models, tmp_path):
    recipe = {
        "base": models["base"],
        "experts": [{"name": name, "source": models[name]} for name in EXPERTS],
        "method": {"name": "tsvm"},
        "max_shard_bytes": 100_000,
    }
    request = MergeAndEvaluate.model_validate({"recipe": recipe, "limit": 4})
    alone, there = Store(tmp_path / "alone"), Store(tmp_path / "store")
    model, report = merge_and_score(request, Direct(alone))
    call = (
        "import sys; from flows.merge_and_evaluate import *; "
        "merge_and_evaluate(MergeAndEvaluate.model_validate_json(sys.argv[1]))"
    )
    flow = on_ray(cluster, "-c", call, request.model_dump_json(), TRIPOISE_STORE=str(there.root))
    said, _ = flow.communicate(timeout=400)
    assert flow.returncode == 0, said
    assert contents(there.folder(model)) == contents(alone.folder(model))
    for ref in alone.refs("scores"):
        assert contents(there.folder(ref)) == contents(alone.folder(ref))
    assert there.home(report).exists()
    assert len(there.refs("shard")) > 3
    names = {run.name for run in task_runs("evaluate tsvm on ")}
    assert len(names) == len(alone.refs("scores")) / 5


def test_a_node_that_dies_costs_the_steps_it_had(cluster, tmp_path):
    flow = on_ray(cluster, "-m", "tests.flows.steps_on_ray", tmp_path, 4, "")
    first, second = begun(tmp_path, 2)
    lost = cluster.raylet(1)
    [had] = [one for one in (first, second) if lost.pid in one["processes"]]
    worker = psutil.Process(had["processes"][0])
    lost.kill()
    worker.wait(timeout=60)
    (tmp_path / "go").touch()
    said, _ = flow.communicate(timeout=300)
    assert flow.returncode == 0, said
    numbers = [one["number"] for one in begun(tmp_path, 5)]
    assert sorted(numbers) == sorted([*range(4), had["number"]])


def test_a_step_has_gpus_of_its_own_on_ray(cluster, tmp_path):
    flow = on_ray(cluster, "-m", "tests.flows.steps_on_ray", tmp_path, 2, "cuda:0")
    begun(tmp_path, 1)
    (tmp_path / "go").touch()
    said, _ = flow.communicate(timeout=300)
    assert flow.returncode == 0, said
    assert [one["gpus"] for one in begun(tmp_path, 2)] == ["0", "0"]


def test_a_flow_that_is_stopped_stops_its_steps_on_threads(tmp_path, prefect_server):
    flow = subprocess.Popen(
        [sys.executable, "-m", "tests.flows.steps_on_ray", str(tmp_path), "3", "cpu"],
        env={**os.environ, "TRIPOISE_PARALLEL_STEPS": "2", "PREFECT_API_URL": PREFECT_API_URL.value()},
        cwd=Path(__file__).parents[2],
    )
    try:
        steps = [psutil.Process(one["processes"][0]) for one in begun(tmp_path, 2)]
        flow.terminate()
        assert psutil.wait_procs(steps, timeout=20)[1] == []
        assert flow.wait(timeout=20) != 0
        assert Store(tmp_path / "store").refs() == []
    finally:
        flow.kill()
        flow.wait()


def test_a_flow_that_is_stopped_stops_its_steps_on_ray(cluster, tmp_path):
    flow = on_ray(cluster, "-m", "tests.flows.steps_on_ray", tmp_path, 1, "cpu")
    [only] = begun(tmp_path, 1)
    step = psutil.Process(only["processes"][0])
    flow.terminate()
    step.wait(timeout=60)
    said, _ = flow.communicate(timeout=60)
    assert flow.returncode != 0, said
    assert Store(tmp_path / "store").refs() == []


@pytest.mark.parametrize(("device", "number"), [("", 0), ("cpu", 0), ("cuda", 1), ("cuda:0", 1), ("cuda:0, cuda:1", 2)])
def test_a_device_names_so_many_gpus(device, number):
    assert num_gpus(device) == number


@pytest.mark.parametrize("device", ["cuda:1", "cuda:1,cuda:0", "cuda:0,cuda:2"])
def test_a_gpu_that_a_task_of_its_own_does_not_have_is_refused(device):
    with pytest.raises(RecipeError, match=r"numbered from 0\. Name cuda:0"):
        num_gpus(device)


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5"])
def test_a_number_of_steps_that_is_none_is_refused(monkeypatch, number):
    monkeypatch.setenv("TRIPOISE_PARALLEL_STEPS", number)
    with pytest.raises(RecipeError, match="TRIPOISE_PARALLEL_STEPS: must be a whole number >= 1"):
        fan_out()
