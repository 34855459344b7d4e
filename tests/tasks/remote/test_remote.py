import random

import pytest

from merging_core.errors import CheckpointError, RecipeError
from tasks import remote
from tasks.progress import silent
from tasks.remote import Storage

from .conftest import BUCKET

URL = f"s3://{BUCKET}/some/prefix"
KEY = "some/prefix"
PART = 5 << 20  # the least that S3 takes


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(remote, "PART_BYTES", PART)
    monkeypatch.setattr(remote, "_WAITS_S", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def content():
    return random.Random(0).randbytes(3 * PART + 1234)


def put(s3, name, content):
    s3.client.put_object(Bucket=BUCKET, Key=f"{KEY}/{name}", Body=content)


def get(s3, name):
    return s3.client.get_object(Bucket=BUCKET, Key=f"{KEY}/{name}")["Body"].read()


def gets(s3):
    return [range_ for method, _, range_ in s3.requests if method == "GET" and range_]


def test_a_big_file_goes_up_in_parts_and_comes_down_in_ranges(s3, content, tmp_path):
    (tmp_path / "big").write_bytes(content)
    Storage(URL).upload({"big": tmp_path / "big"}, silent)
    assert get(s3, "big") == content
    assert sum("uploadId" in path and method == "PUT" for method, path, _ in s3.requests) == 4
    seen = []
    Storage(URL).download({"big": "sub/copy"}, tmp_path / "down", lambda done, total: seen.append((done, total)))
    assert (tmp_path / "down/sub/copy").read_bytes() == content
    assert len(gets(s3)) == 4
    assert seen[-1] == (len(content), len(content))
    assert [path.name for path in (tmp_path / "down").iterdir()] == ["sub"]


def test_what_is_there_is_not_sent_again(s3, tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    Storage(URL).upload({"a": tmp_path / "a"}, silent)
    s3.requests.clear()
    Storage(URL).upload({"a": tmp_path / "a"}, silent)
    assert {method for method, _, _ in s3.requests} <= {"HEAD", "GET"}


def test_empty_files_and_the_listing(s3, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    storage = Storage(URL)
    storage.upload({"empty": tmp_path / "empty"}, silent)
    storage.write("small", b"text")
    assert {name: one.size for name, one in storage.list().items()} == {"empty": 0, "small": 4}
    storage.download({"empty": "empty"}, tmp_path / "down", silent)
    assert (tmp_path / "down/empty").read_bytes() == b""
    assert (storage.read("small"), storage.read("none"), storage.size("none")) == (b"text", None, None)
    assert Storage(f"s3://{BUCKET}/nothing").list() == {}


@pytest.mark.parametrize("fault", [("status", 500), ("status", 503), ("cut", 100_000), ("slow", 0.3)])
def test_a_download_survives_faults_of_single_requests(s3, content, tmp_path, fault):
    put(s3, "big", content)
    failed = []

    def rule(method, path, number):
        if method == "GET" and "big" in path and len(failed) < 3:
            failed.append(number)
            return fault
        return None

    s3.rule = rule
    Storage(URL).download({"big": "big"}, tmp_path, silent)
    assert (tmp_path / "big").read_bytes() == content
    assert len(failed) == 3


@pytest.mark.parametrize("fault", [("status", 500), ("cut", 100_000)])
def test_an_upload_survives_a_fault_in_the_middle_of_a_part(s3, content, tmp_path, fault):
    (tmp_path / "big").write_bytes(content)
    failed = []

    def rule(method, path, number):
        if method == "PUT" and "partNumber=2" in path and not failed:
            failed.append(number)
            return fault
        return None

    s3.rule = rule
    Storage(URL).upload({"big": tmp_path / "big"}, silent)
    assert get(s3, "big") == content
    assert failed


def test_a_broken_download_goes_on_with_what_is_missing(s3, content, tmp_path):
    put(s3, "big", content)
    last = f"bytes={3 * PART}-"
    broken = Storage(URL)
    s3.rule = lambda method, path, number: ("status", 500) if last in str(s3.requests[-1][2]) else None
    with pytest.raises(CheckpointError, match="the storage failed"):
        broken.download({"big": "big"}, tmp_path, silent)
    s3.rule = lambda method, path, number: None
    s3.requests.clear()
    Storage(URL).download({"big": "big"}, tmp_path, silent)
    assert [range_.startswith(last) for range_ in gets(s3)] == [True]
    assert (tmp_path / "big").read_bytes() == content


def test_parts_of_an_older_content_are_not_taken_for_the_new(s3, content, tmp_path):
    put(s3, "big", content)
    s3.rule = lambda method, path, number: ("status", 500) if f"bytes={PART}-" in str(s3.requests[-1][2]) else None
    with pytest.raises(CheckpointError):
        Storage(URL).download({"big": "big"}, tmp_path, silent)
    s3.rule = lambda method, path, number: None
    put(s3, "big", content[::-1])
    Storage(URL).download({"big": "big"}, tmp_path, silent)
    assert (tmp_path / "big").read_bytes() == content[::-1]


def test_a_file_that_changes_meanwhile_is_an_error(s3, content, tmp_path):
    put(s3, "big", content)
    changed = []

    def rule(method, path, number):
        if method == "GET" and not changed:
            changed.append(number)
            put(s3, "big", content[::-1])

    s3.rule = rule
    with pytest.raises(CheckpointError, match="changed while it was downloaded"):
        Storage(URL).download({"big": "big"}, tmp_path, silent)


def test_errors_name_the_address_and_never_the_credentials(s3, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"s3://models/some/prefix: holds no weights"):
        Storage(URL).download({"weights": "weights"}, tmp_path, silent)
    s3.rule = lambda method, path, number: ("status", 403)
    with pytest.raises(CheckpointError, match="credentials") as caught:
        Storage(URL).read("x")
    assert "secret-of-a-test" not in str(caught.value)
    with pytest.raises(RecipeError, match="Leave them out") as caught:
        Storage("s3://user:word@bucket/x")
    assert "word" not in str(caught.value)
    with pytest.raises(RecipeError, match="nothing installed serves nope"):
        Storage("nope://bucket/x")


def test_any_fsspec_url(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    storage = Storage(f"file://{tmp_path}/there")
    (tmp_path / "there").mkdir()
    storage.upload({"a": tmp_path / "a"}, silent)
    storage.download({"a": "b"}, tmp_path / "back", silent)
    assert (tmp_path / "back/b").read_bytes() == b"content"
