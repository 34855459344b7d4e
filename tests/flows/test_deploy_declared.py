"""What `deployments/` declares: complete, consistent, and refused by name where it is not."""

import json
import re
import shutil
import socket

import pytest
import yaml
from prefect.utilities.templating import apply_values, find_placeholders

from flows.deploying.declared import POOLS, SHIPPED, read_declared
from merging_core.errors import CheckpointError, RecipeError

TEMPLATES = sorted((SHIPPED / "pools").glob("*.json"))
# Set by the worker from the deployment or from its own settings, not by a default.
SET_BY_WORKER = {"command", "labels", "name"}


def rendered(name, **values):
    """The configuration of one job, as a worker computes it from template, defaults and job variables."""
    template = json.loads((SHIPPED / "pools" / f"{name}.json").read_text())
    defaults = {
        key: one["default"]
        for key, one in template["variables"]["properties"].items()
        if one.get("default") is not None
    }
    return apply_values(template["job_configuration"], defaults | values)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_variable_of_a_template_is_declared_explained_and_used(path):
    template = json.loads(path.read_text())
    declared = template["variables"]["properties"]
    used = {found.name for found in find_placeholders(template["job_configuration"])}
    assert used == set(declared)
    for name, variable in declared.items():
        assert variable["title"], name
        assert variable["description"], name


def test_there_is_a_template_for_every_profile_and_pool():
    expected = {f"{kind}-{pool}" for kind in ("process", "docker", "kubernetes") for pool in ("cpu", "gpu")}
    assert {path.stem for path in TEMPLATES} == expected
    for profile, kind in (("local", "process"), ("docker", "docker"), ("kubernetes", "kubernetes")):
        assert {(pool.name, pool.type) for pool in read_declared(SHIPPED, profile).pools} == {
            (name, kind) for name in POOLS
        }


def test_a_docker_job_on_the_gpu_pool_gets_a_gpu_and_shared_memory():
    settings = rendered("docker-gpu")["container_create_kwargs"]
    assert settings["device_requests"] == [{"Driver": "nvidia", "Count": 1, "Capabilities": [["gpu"]]}]
    assert settings["shm_size"] == "8g"
    assert "device_requests" not in rendered("docker-cpu")["container_create_kwargs"]


def test_a_kubernetes_job_on_the_gpu_pool_gets_gpus_where_they_are():
    spec = rendered("kubernetes-gpu", gpu_count=4)["job_manifest"]["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert spec["tolerations"][0]["key"] == "nvidia.com/gpu"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert mounts["shm"] == "/dev/shm"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert volumes["store"]["persistentVolumeClaim"]["claimName"] == "tripoise-store"
    light = rendered("kubernetes-cpu")["job_manifest"]["spec"]["template"]["spec"]
    assert "nvidia" not in json.dumps(light)


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_parents_ask_the_gpu_pool_and_gpu_runs_hold_a_slot(kind):
    assert rendered(f"{kind}-cpu")["env"]["TRIPOISE_GPU_STEPS"] == "deployments"
    gpu = rendered(f"{kind}-gpu")["env"]
    assert gpu["TRIPOISE_GPU_SLOTS"] == "tripoise-gpu"
    assert "TRIPOISE_GPU_STEPS" not in gpu


def test_heavy_flows_go_to_the_gpu_pool_and_nobody_elses_folder_is_recorded():
    declared = read_declared(SHIPPED, "local")
    heavy = {one.name for one in declared.deployments if one.work_pool.name == "tripoise-gpu"}
    assert {"merge", "decompose", "evaluate", "train"} <= heavy
    assert yaml.safe_load((SHIPPED / "prefect.yaml").read_text())["pull"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file["deployments"][0].update(wrok_pool={}), "wrok_pool"),
        (lambda file: file["deployments"][0]["work_pool"].update(name="tripoise-gpus"), "Nearest: 'tripoise-gpu'"),
        (lambda file: file["deployments"].append(file["deployments"][0]), "stands twice"),
        (lambda file: file["deployments"][0].update(schedules=[{"cron": "* *"}]), "cron"),
        (lambda file: file["deployments"][0].update(schedules=[{}]), "either cron or interval"),
    ],
)
def test_a_mistake_in_the_file_is_refused_by_its_name(tmp_path, change, message):
    folder = shutil.copytree(SHIPPED, tmp_path / "deployments")
    file = yaml.safe_load((folder / "prefect.yaml").read_text())
    change(file)
    (folder / "prefect.yaml").write_text(yaml.safe_dump(file))
    with pytest.raises(RecipeError, match=re.escape(message)):
        read_declared(folder, "local")


def test_a_misspelt_profile_gets_the_nearest(tripoise):
    code, _, error = tripoise("deploy", "--profile", "kubernets")
    assert code == 1
    assert "Nearest: 'kubernetes'" in error


def test_without_a_server_it_says_which_setting_names_one(tripoise, monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for command in (("deploy",), ("trigger", "merge")):
        with temporary_settings(restore_defaults={PREFECT_API_URL}):
            code, _, error = tripoise(*command)
        assert code == 1
        assert "PREFECT_API_URL" in error


def test_a_server_that_does_not_answer_is_named_in_the_same_words_everywhere():
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.client import Client
    from flows.deploying.apply import server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/api"
        # Bound and not listening: nobody else can answer there.
        words = re.escape(
            f"{url}: no answer ([Errno 111] Connection refused). Start the server, or correct PREFECT_API"
        )
        with Client(url) as client, pytest.raises(CheckpointError, match=words):
            client.decide("a run", "promote")
        with (
            temporary_settings({PREFECT_API_URL: url}),
            pytest.raises(CheckpointError, match=words),
            server() as client,
        ):
            client.read_work_pools()


def test_serving_on_a_port_that_is_taken_says_so_and_starts_nothing(tripoise):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, error = tripoise("serve", "--port", taken.getsockname()[1])
    assert code == 1
    assert "Name another one with --port" in error
