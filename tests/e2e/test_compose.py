"""docker/compose.yaml: valid, and every service hardened as docs/operations.md says. test_team_server.py runs it."""

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from prefect.settings import Settings
from prefect_redis.cleanup_queue import RedisWorkerCleanupQueueSettings
from prefect_redis.client import RedisMessagingSettings

DOCKER = Path(__file__).parents[2] / "docker"
TEXT = (DOCKER / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
# They end when they have done their one thing.
ONCE = {"migrate", "deploy", "objects-owner", "bucket"}
SERVER = ("migrate", "api", "services")
CLIENTS = ("deploy", "worker-cpu", "worker-gpu")


def test_it_is_a_compose_file():
    check = [Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, DOCKER / "compose.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_has_every_part_of_an_installation():
    assert SERVICES["api"]["deploy"]["replicas"] == 2
    assert "--no-services" in SERVICES["api"]["command"]
    assert SERVICES["services"]["deploy"]["replicas"] == 1
    [device] = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert [name for name, one in SERVICES.items() if "ports" in one] == ["proxy"], (
        "only the proxy is reached from outside"
    )


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_no_more_than_it_needs(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert {"cpus", "memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & service.keys()
    assert "docker.sock" not in str(service)
    assert name in ONCE or service["healthcheck"]["test"][0].startswith("CMD")
    assert service["restart"] == ("no" if name in ONCE else "unless-stopped")


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_pinned_to_a_full_version(name):
    tag = SERVICES[name]["image"].rpartition(":")[2]
    ours = SERVICES[name]["image"].startswith("tripoise:${TRIPOISE_VERSION:-")
    assert ours or re.match(r"\d+\.\d+", tag), tag


def test_volumes_have_names():
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in COMPOSE["volumes"], name


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_what_can_tell_that_it_is_ready(name):
    for other, how in SERVICES[name].get("depends_on", {}).items():
        wanted = "service_completed_successfully" if other in ONCE else "service_healthy"
        assert how == {"condition": wanted}, f"{name} on {other}"


def test_no_setting_holds_a_secret(tmp_path):
    """Every secret is a file of docker/make-secrets; no value of any is in the compose file, nor a word for one."""
    folder = tmp_path / "secrets"
    subprocess.run([DOCKER / "make-secrets", folder, "tripoise.example"], check=True, stdout=subprocess.DEVNULL)
    wanted = {Path(one["file"]).name for one in COMPOSE["secrets"].values()}
    assert {path.name for path in folder.iterdir()} == wanted
    assert folder.stat().st_mode & 0o777 == 0o700
    named = {
        one if isinstance(one, str) else one["source"]
        for service in SERVICES.values()
        for one in service.get("secrets", [])
    }
    assert named == COMPOSE["secrets"].keys()
    for name, service in SERVICES.items():
        for setting, value in service.get("environment", {}).items():
            if re.search("PASSWORD|AUTH|KEY|TOKEN|URL", setting):
                assert setting.endswith("_FILE") or "@" not in str(value), f"{name}: {setting}"
                assert setting.endswith(("_FILE", "_URL")), f"{name}: {setting}"
    # Made once: passwords that are in use are never replaced.
    again = subprocess.run([DOCKER / "make-secrets", folder, "tripoise.example"], capture_output=True, text=True)
    assert again.returncode != 0


def names_of(model):
    """The variables of a settings model and of those below it."""
    found = {f"{model.model_config['env_prefix']}{name}".upper() for name in model.model_fields}
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            found |= names_of(field.annotation)
    return found


@pytest.mark.parametrize("name", [*SERVER, *CLIENTS])
def test_prefect_knows_every_setting(name):
    service = SERVICES[name]
    targets = {one["target"] for one in service["secrets"] if isinstance(one, dict)}
    used = {one for one in {*service["environment"], *targets} if one.startswith("PREFECT_")}
    known = names_of(Settings) | names_of(RedisMessagingSettings) | names_of(RedisWorkerCleanupQueueSettings)
    assert used - known == set()


@pytest.mark.parametrize("name", SERVER)
def test_what_replicas_must_share_is_in_no_ones_memory(name):
    settings = SERVICES[name]["environment"]
    shared = {setting: value for setting, value in settings.items() if "prefect_redis" in value}
    assert shared == {
        "PREFECT_SERVER_EVENTS_MESSAGING_BROKER": "prefect_redis.messaging",
        "PREFECT_SERVER_EVENTS_MESSAGING_CACHE": "prefect_redis.messaging",
        "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
        "PREFECT_SERVER_WORKER_CHANNEL_CLEANUP_QUEUE_STORAGE": "prefect_redis.cleanup_queue",
    }
    assert settings["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "true"
    assert settings["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    targets = {one["target"] for one in SERVICES[name]["secrets"]}
    assert {"PREFECT_SERVER_API_AUTH_STRING", "PREFECT_SERVER_DOCKET_URL"} <= targets


def test_the_bucket_is_made_once_and_left_alone_then(tmp_path):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://localhost:{port}",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "secrets" / "aws_credentials"),
        "AWS_DEFAULT_REGION": SERVICES["bucket"]["environment"]["AWS_DEFAULT_REGION"],
        "HOME": str(tmp_path),
    }
    try:
        subprocess.run([DOCKER / "make-secrets", tmp_path / "secrets", "localhost"], check=True)
        _, *rest = SERVICES["bucket"]["command"]
        for _ in range(2):
            subprocess.run([sys.executable, *rest], env=environment, check=True)
        bucket = SERVICES["worker-cpu"]["environment"]["TRIPOISE_MIRROR"].split("/")[2]
        assert httpx.head(f"http://localhost:{port}/{bucket}").status_code == 200
    finally:
        server.stop()
