"""docker/Dockerfile: what it says, always; what it builds, where TRIPOISE_BUILD_IMAGE=1 asks for it.

The build takes 5 to 14 minutes and 7 GB of disk on two busy cores: too long for every submission. There is no Docker
engine here; buildah builds with Debian's own root file system as the base, and packages come from wherever pip of this
machine finds them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
STEPS = re.findall(r"^([A-Z]+) ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
WANTED = os.environ.get("TRIPOISE_BUILD_IMAGE") == "1"
MISSING = [program for program in ("buildah", "debootstrap") if not shutil.which(program)]


def stage(name):
    """The steps of one stage and of those it stands on, in order."""
    lines = [number for number, (step, text) in enumerate(STEPS) if step == "FROM" and text.endswith(f" AS {name}")]
    assert len(lines) == 1, f"no stage {name}"
    [start] = lines
    own = STEPS[start + 1 :]
    own = own[: next((number for number, (step, _) in enumerate(own) if step == "FROM"), len(own))]
    parent = STEPS[start][1].split()[0]
    return own if parent.startswith("$") else stage(parent) + own


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_runs_tripoise_as_nobody_special_and_says_what_it_is(target):
    steps = stage(target)
    assert dict(steps)["ENTRYPOINT"] == '["tripoise"]'
    user = dict(steps)["USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    labels = {name for step, text in steps if step == "LABEL" for name in re.findall(r"([\w.]+)=", text)}
    wanted = ("title", "description", "licenses", "version", "revision")
    assert {f"org.opencontainers.image.{name}" for name in wanted} <= labels
    # What both targets are made of is installed by constraints.txt.
    installs = [text for step, text in stage(f"builder-{target}") if step == "RUN" and "pip install" in text]
    assert all("--constraint constraints.txt" in text or "--requirement sbom-requirements" in text for text in installs)


def test_the_base_is_an_argument_with_a_full_version():
    assert STEPS[0] == ("ARG", f"BASE_IMAGE={STEPS[0][1].removeprefix('BASE_IMAGE=')}")
    assert re.search(r":\d+\.\d+\.\d+\b", STEPS[0][1])
    assert {text.split()[0] for step, text in STEPS if step == "FROM"} <= {
        *("${BASE_IMAGE}", "builder", "runtime"),
    }


def test_no_step_holds_a_secret_or_a_place_to_fetch_packages_from():
    assert not re.search(r"(?i)(password|token|api_key|credential)\S*=", DOCKERFILE)
    assert not re.search(r"https?://|index-url", DOCKERFILE)


def test_what_is_copied_is_there_and_nothing_else_is_sent_to_the_builder():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in ignored if not line.startswith("#")) == "*"
    sent = [line[1:] for line in ignored if line.startswith("!")]
    copied = set()
    for step, text in STEPS:
        if step == "COPY" and "--from" not in text:
            *sources, _ = [word for word in text.split() if not word.startswith("--")]
            copied |= set(sources)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(Path(source).match(pattern) for pattern in sent), f"{source} is not sent"
    for pattern in sent:
        assert any(Path(source).match(pattern) for source in copied), f"{pattern} is sent for nothing"


class Image:
    """The built image of the target cpu, and a container of it."""

    def __init__(self, folder):
        self.folder = folder
        places = ["--root", folder / "root", "--runroot", folder / "run", "--storage-driver", "vfs"]
        self.buildah = ["buildah", *map(str, places)]

    def call(self, *arguments, check=True):
        done = subprocess.run([*self.buildah, *map(str, arguments)], capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{arguments}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done

    def make_base(self):
        """A root file system of Debian with Python, as a local image."""
        tree, archive = self.folder / "base", self.folder / "base.tar"
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", packages, "bookworm", tree], check=True, stdout=subprocess.DEVNULL
        )
        subprocess.run(["tar", "-C", tree, "--exclude=./dev/*", "-cf", archive, "."], check=True)
        shutil.rmtree(tree)
        container = self.call("from", "scratch").stdout.strip()
        self.call("add", "--quiet", container, archive, "/")
        self.call("commit", "--quiet", "--rm", container, "localhost/base")
        archive.unlink()

    def build(self):
        configuration, places = pip_configuration()
        secret = self.folder / "pip.conf"
        secret.write_text(configuration)
        volumes = [f"--volume={place}:{place}:ro" for place in places]
        self.call(
            *("bud", "--isolation", "chroot", "--layers=false", "--target", "cpu", "--tag", "localhost/tripoise:cpu"),
            *("--build-arg", "BASE_IMAGE=localhost/base", "--secret", f"id=pip,src={secret}", *volumes),
            *("--file", ROOT / "docker" / "Dockerfile", ROOT),
        )
        self.container = self.call("from", "localhost/tripoise:cpu").stdout.strip()
        inspected = json.loads(self.call("inspect", "--type", "image", "localhost/tripoise:cpu").stdout)
        self.config = inspected["OCIv1"]["config"]

    def run(self, *command, volumes=(), check=True):
        """Run a command in the container, as its user."""
        mounts = [f"--volume={volume}" for volume in volumes]
        return self.call("run", "--isolation", "chroot", *mounts, self.container, "--", *command, check=check)


def pip_configuration():
    """This machine's configuration of pip as a file's text, and the places that it names."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    entries = dict(re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE))
    words = [word for value in entries.values() for word in value.split()]
    # An index of files keeps them beside its pages.
    places = {str(Path(word.removeprefix("file://")).parent) for word in words if word.startswith("file://")}
    places |= {word for word in words if word.startswith("/") and Path(word).exists()}
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items()), sorted(places)


@pytest.fixture(scope="module")
def image():
    folder = Path(tempfile.mkdtemp(prefix="image-", dir="/var/tmp"))
    image = Image(folder)
    try:
        started = time.monotonic()
        image.make_base()
        based = time.monotonic()
        image.build()
        size = image.call("images", "--format", "{{.Size}}", "localhost/tripoise:cpu").stdout.strip()
        print(f"base {based - started:.0f} s, image {time.monotonic() - based:.0f} s, {size}")
        yield image
    finally:
        image.call("rm", "--all", check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.e2e
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not WANTED, reason="builds an image for minutes: TRIPOISE_BUILD_IMAGE=1 asks for it")
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap needs root")
class TestBuiltImage:
    def test_its_entry_point_shows_help(self, image):
        assert image.config["User"] == "10001:10001"
        [program] = image.config["Entrypoint"]
        assert "Usage: tripoise" in image.run(program, "--help").stdout

    def test_it_merges_a_model(self, image, tmp_path, recipe_file):
        recipe, out = recipe_file(), tmp_path / "out"
        out.mkdir()
        out.chmod(0o777)
        tmp_path.chmod(0o755)
        # safetensors writes for its own user only.
        for path in tmp_path.glob("models/*/*"):
            path.chmod(0o644)
        arguments = ("tripoise", "merge", recipe, "--out", out / "merged", "--json")
        result = json.loads(image.run(*arguments, volumes=[f"{tmp_path}:{tmp_path}"]).stdout)
        assert (out / "merged" / "model.safetensors").stat().st_uid == 10001
        assert not result["reused"]
        again = json.loads(image.run(*arguments, "--replace", volumes=[f"{tmp_path}:{tmp_path}"]).stdout)
        assert (again["reused"], again["digest"]) == (True, result["digest"])

    def test_its_user_may_write_to_the_store_prefects_home_and_tmp_only(self, image):
        found = image.run("find", "/", "-xdev", "-type", "d", "-writable", check=False).stdout.split()
        allowed = ("/tmp", "/var/tmp", "/var/lib/tripoise", "/var/lib/prefect", "/var/lib/objects", "/run", "/dev")
        assert {"/tmp", "/var/lib/tripoise", "/var/lib/prefect"} <= set(found)
        assert [path for path in found if not path.startswith((*allowed, "/proc"))] == []

    def test_its_list_of_parts_is_what_the_constraints_say(self, image):
        parts = json.loads(image.run("cat", "/opt/tripoise/sbom.cdx.json").stdout)
        assert parts["bomFormat"] == "CycloneDX"
        found = {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"] for one in parts["components"]}
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
        pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
        assert {"torch", "prefect", "prefect-redis", "asyncpg", "trl", "tripoise"} <= found.keys()
        assert found.keys() - pinned.keys() <= {"tripoise", "pip", "setuptools"}
        assert {name: version.partition("+")[0] for name, version in found.items() if name in pinned}.items() <= (
            pinned.items()
        )
        assert found["torch"].endswith("+cpu")

    def test_secrets_become_variables_of_one_command(self, image, tmp_path):
        (tmp_path / "PREFECT_API_AUTH_STRING").write_text("admin:a b'$c\n")
        tmp_path.chmod(0o755)
        shown = image.run(
            *("with-secrets", "python", "-c", "import os; print(os.environ['PREFECT_API_AUTH_STRING'])"),
            volumes=[f"{tmp_path}:/run/secrets:ro"],
        )
        assert shown.stdout == "admin:a b'$c\n"
