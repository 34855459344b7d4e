"""Checkpoints whose weights stay on object storage, against a real S3 server."""

import json
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging_core.checkpoint import Checkpoint
from merging_core.errors import CheckpointError, RecipeError
from merging_core.streamed import StreamedFile, is_streamed, read_note, write_note
from merging_core.writer import write_checkpoint
from tasks import remote
from tasks.align import Family, align
from tasks.collect import collect
from tasks.mirror import Mirror
from tasks.models import load_language_model
from tasks.sources import resolve
from tasks.sources.object_storage import LIMIT
from tasks.store import Store
from tasks.vectors import interference_step

from .conftest import BUCKET

BESIDES = {"README.md", "recipe.yaml", "manifest.json"}  # name the sources or the time


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setattr(remote, "_WAITS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(remote, "PART_BYTES", 100)  # of tensors of up to 512 bytes
    monkeypatch.setenv(LIMIT, "0")


@pytest.fixture
def urls(s3, family):
    """The family on S3, the base in several shards."""
    with Checkpoint(family["base"]) as base:
        tensors = {name: base.load(name).clone() for name in base.tensors}
        infos = dict(base.tensors)
    (family["base"] / "model.safetensors").unlink()
    write_checkpoint(family["base"], infos, tensors.__getitem__, max_shard_bytes=1500)
    assert len(list(family["base"].glob("*.safetensors"))) > 1
    for name, folder in family.items():
        for path in folder.iterdir():
            s3.client.upload_file(str(path), BUCKET, f"{name}/{path.name}")
    s3.requests.clear()
    return {name: f"s3://{BUCKET}/{name}" for name in family}


def of_weights(s3, name=""):
    return [
        (path, range_)
        for method, path, range_ in s3.requests
        if method == "GET" and path.split("?")[0].endswith(".safetensors") and f"/{name}" in path
    ]


def bytes_read(s3):
    """Of each tensor's data and headers, as asked for by ranges."""
    total = 0
    for _, range_ in of_weights(s3):
        start, end = range_.removeprefix("bytes=").split("-")
        total += int(end) - int(start) + 1
    return total


def recipe_of(urls, method):
    experts = {name: url for name, url in urls.items() if name != "base"}
    return {"base": str(urls["base"]), "experts": {n: str(u) for n, u in experts.items()}, "method": {"name": method}}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in BESIDES}


@pytest.mark.parametrize("method", ["linear", "ties", "tsvm", "r_tsvm"])
def test_a_merge_of_streamed_checkpoints_is_that_of_local_ones(
    s3, urls, family, recipe_file, tripoise, tmp_path, method
):
    answers = {}
    for where, sources in (("local", family), ("streamed", urls)):
        recipe = recipe_file(**recipe_of(sources, method))
        options = ("--out", tmp_path / where, "--store", tmp_path / f"store-{where}", "--json")
        code, out, err = tripoise("merge", recipe, *options)
        assert code == 0, err
        answers[where] = json.loads(out)
    assert answers["streamed"]["digest"] == answers["local"]["digest"]
    assert not answers["streamed"]["reused"]
    assert contents(tmp_path / "streamed") == contents(tmp_path / "local")
    assert not list((tmp_path / "store-streamed/downloads").rglob("*.safetensors"))
    assert Store(tmp_path / "store-streamed").refs("checkpoint") == Store(tmp_path / "store-local").refs("checkpoint")


def test_a_linear_merge_reads_every_tensor_once_after_the_sha256(s3, urls, recipe_file, tripoise, tmp_path):
    for url in urls.values():
        resolve(url, Store(tmp_path / "store"))
    s3.requests.clear()
    code, _, err = tripoise("merge", recipe_file(**recipe_of(urls, "linear")), "--out", tmp_path / "out")
    assert code == 0, err
    size = sum(sum(one.num_bytes for one in opened.tensors.values()) for opened in map(Checkpoint, notes_of(tmp_path)))
    assert bytes_read(s3) == size


def notes_of(tmp_path):
    store = Store(tmp_path / "store")
    return [store.folder(ref) for ref in store.refs("checkpoint")]


def test_weights_are_read_for_their_sha256_once(s3, urls, family, store, told):
    first = resolve(urls["base"], store)
    assert first.ref == resolve(str(family["base"]), Store(store.root.parent / "other")).ref
    assert any("is streamed: " in line and LIMIT in line for line in told)
    assert bytes_read(s3) > 0
    s3.requests.clear()
    assert resolve(urls["base"], store).reused
    s3.client.put_object(Bucket=BUCKET, Key="base/README.md", Body=b"a new card")
    assert resolve(urls["base"], store).ref == first.ref  # another listing, the same weights
    assert of_weights(s3) == []


@pytest.mark.parametrize("fault", [("status", 500), ("status", 503), ("cut", 10), ("slow", 0.2)])
def test_tensors_survive_faults_of_single_requests(s3, urls, family, store, fault):
    folder = store.folder(resolve(urls["helpful"], store).ref)
    seen = Counter()

    def rule(method, path, number):
        range_ = s3.requests[-1][2]
        if method != "GET" or not range_:
            return None
        seen[range_] += 1
        return fault if seen[range_] == 1 else None

    s3.rule = rule
    with Checkpoint(folder) as opened:
        read = {name: opened.load(name) for name in opened.tensors}
    expected = load_file(family["helpful"] / "model.safetensors")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert fault[0] == "slow" or set(seen.values()) == {2}


def test_a_short_answer_is_asked_for_again(s3, urls, family, store, monkeypatch):
    folder = store.folder(resolve(urls["helpful"], store).ref)
    with Checkpoint(folder) as opened:
        file = opened._files["model.norm.weight"]
        storage, answers = remote.Storage(urls["helpful"]), []

        class Short:
            """The real storage, whose first answer lacks a byte."""

            def __getattr__(self, name):
                return getattr(storage_fs, name)

            def cat_file(self, *arguments, **options):
                answers.append(storage_fs.cat_file(*arguments, **options))
                return answers[-1][: -1 if len(answers) == 1 else None]

        storage_fs, place = storage._fs, file._places["model.norm.weight"]
        monkeypatch.setattr(storage, "_fs", Short())
        into = bytearray(place.end - place.start)
        pinned = storage.list()["model.safetensors"]
        storage.fill(pinned, place.start, memoryview(into))
    expected = load_file(family["helpful"] / "model.safetensors")["model.norm.weight"]
    assert bytes(into) == expected.view(torch.uint8).numpy().tobytes()
    assert len(answers) == 2


@pytest.mark.parametrize("how", ["same size", "shorter", "removed"])
def test_a_change_after_the_pinning_is_an_error_and_leaves_nothing(
    s3, urls, family, recipe_file, tripoise, tmp_path, how
):
    content = (family["honest"] / "model.safetensors").read_bytes()
    key = {"Bucket": BUCKET, "Key": "honest/model.safetensors"}
    pinned = []

    def rule(method, path, number):
        # The merge begins with the base's tensors, when all is pinned.
        store = Store(tmp_path / "store")
        if not pinned and len(store.refs("checkpoint")) == len(urls):
            pinned.append(number)
            if how == "removed":
                s3.client.delete_object(**key)
            else:
                s3.client.put_object(**key, Body=content[:-8] + b"\x00" * (8 if how == "same size" else 0))

    s3.rule = rule
    code, _, err = tripoise("merge", recipe_file(**recipe_of(urls, "linear")), "--out", tmp_path / "out")
    assert code == 1
    assert pinned
    assert ("holds no model.safetensors" if how == "removed" else "changed since it was pinned") in err
    assert not (tmp_path / "out").exists()
    assert Store(tmp_path / "store").refs("merged") == []
    assert not list((tmp_path / "store/merged").glob("*"))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A store on a disk of 400 kB."""
    monkeypatch.delenv(LIMIT)
    root = tmp_path / "small"
    root.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", root], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield Store(root)
    subprocess.run(["umount", "--lazy", root], check=True)


def enlarge(s3, family, tmp_path, name, num_bytes):
    """Put a tensor into an expert on S3; gives it."""
    big = torch.full((num_bytes,), len(name), dtype=torch.uint8)
    save_file(load_file(family[name] / "model.safetensors") | {"big": big}, tmp_path / "big.safetensors")
    s3.client.upload_file(str(tmp_path / "big.safetensors"), BUCKET, f"{name}/model.safetensors")
    return big


def test_what_is_larger_than_the_free_disk_is_streamed(s3, urls, family, small, tmp_path, monkeypatch, told):
    big = enlarge(s3, family, tmp_path, "helpful", 500_000)
    monkeypatch.setattr(remote, "PART_BYTES", 1 << 20)
    folder = small.folder(resolve(urls["helpful"], small).ref)
    assert is_streamed(folder)
    assert any("are free on the disk" in line for line in told)
    assert not is_streamed(small.folder(resolve(urls["honest"], small).ref))  # this one fits
    with Checkpoint(folder) as opened:
        assert torch.equal(opened.load("big"), big)


def test_of_two_downloads_at_once_that_fit_only_singly_the_second_is_streamed(
    s3, urls, family, small, tmp_path, monkeypatch
):
    names = ("helpful", "honest")
    bigs = {name: enlarge(s3, family, tmp_path, name, 200_000) for name in names}
    monkeypatch.setattr(remote, "PART_BYTES", 1 << 16)
    monkeypatch.setattr(remote, "_THREADS", 1)
    refs = {}

    def progress(done, total):
        if "honest" not in refs:  # a part of the other has arrived
            refs["honest"] = None
            refs["honest"] = resolve(urls["honest"], small).ref

    refs["helpful"] = resolve(urls["helpful"], small, progress=progress).ref
    assert [is_streamed(small.folder(refs[name])) for name in names] == [False, True]
    for name in names:
        with Checkpoint(small.folder(refs[name])) as opened:
            assert torch.equal(opened.load("big"), bigs[name])


def test_a_disk_that_fills_up_during_a_download_is_told_and_the_next_run_streams(
    s3, urls, family, small, tmp_path, monkeypatch
):
    big = enlarge(s3, family, tmp_path, "helpful", 200_000)
    monkeypatch.setattr(remote, "PART_BYTES", 1 << 14)
    monkeypatch.setattr(remote, "_THREADS", 1)

    def fill_up(done, total):
        with suppress(OSError), (small.root / "other").open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    with pytest.raises(CheckpointError, match=rf"helpful: the disk of {small.root} is full .* Free some space"):
        resolve(urls["helpful"], small, progress=fill_up)
    folder = small.folder(resolve(urls["helpful"], small).ref)
    assert is_streamed(folder)
    with Checkpoint(folder) as opened:
        assert torch.equal(opened.load("big"), big)


def test_a_lifted_limit_downloads_and_the_record_points_to_the_files(s3, urls, store, monkeypatch):
    streamed = resolve(urls["base"], store).ref
    assert is_streamed(store.folder(streamed))
    monkeypatch.setenv(LIMIT, "1")
    monkeypatch.setattr(remote, "PART_BYTES", 1 << 20)
    assert resolve(urls["base"], store).ref == streamed
    assert not is_streamed(store.folder(streamed))
    assert store.problems(streamed) == []
    assert "model.safetensors.index.json" in store.manifest(streamed).files
    assert not [name for name in store.manifest(streamed).files if "streamed" in name]
    monkeypatch.setenv(LIMIT, "0")
    s3.requests.clear()
    resolve(urls["base"], store)  # what is here is not streamed again
    assert not is_streamed(store.folder(streamed))
    assert of_weights(s3) == []


@pytest.mark.parametrize("how", ["uploaded again", "moved"])
def test_a_streamed_record_follows_its_source(s3, urls, family, store, how):
    first = resolve(urls["helpful"], store).ref
    notes, path = store.folder(first), family["helpful"] / "model.safetensors"
    if how == "moved":
        for file in family["helpful"].iterdir():
            s3.client.upload_file(str(file), BUCKET, f"new/{file.name}")
            s3.client.delete_object(Bucket=BUCKET, Key=f"helpful/{file.name}")
    else:
        # The ETag of an upload in parts is another one.
        upload = {"Bucket": BUCKET, "Key": "helpful/model.safetensors"}
        upload["UploadId"] = s3.client.create_multipart_upload(**upload)["UploadId"]
        part = s3.client.upload_part(**upload, PartNumber=1, Body=path.read_bytes())
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        s3.client.complete_multipart_upload(**upload, MultipartUpload=parts)
    assert resolve(urls["helpful"] if how == "uploaded again" else f"s3://{BUCKET}/new", store).ref == first
    with Checkpoint(store.folder(first)) as opened:
        read = {name: opened.load(name) for name in opened.tensors}
    expected = load_file(path)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert store.problems(first) == []
    assert not list(notes.glob("*.streamed.json"))


def test_an_outage_in_the_middle_of_a_merge_keeps_its_finished_shards(
    s3, urls, family, recipe_file, tripoise, tmp_path
):
    for url in urls.values():
        resolve(url, Store(tmp_path / "store"))
    recipe = recipe_file(**recipe_of(urls, "linear"), max_shard_bytes=1000)
    merge = ("merge", recipe, "--out", tmp_path / "out")
    merged = tmp_path / "store/merged"
    s3.rule = lambda *_: ("status", 503) if list(merged.glob("*/*.safetensors")) else None
    code, _, err = tripoise(*merge)
    assert code == 1
    assert "the storage failed" in err
    kept = {path.name: path.stat().st_mtime_ns for path in merged.glob("*/*.safetensors")}
    assert kept
    s3.rule = lambda *_: None
    code, _, err = tripoise(*merge)
    assert code == 0, err
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in merged.glob("*/*.safetensors")}.items()


def test_an_unreadable_memo_only_costs_another_read(s3, urls, store):
    first = resolve(urls["helpful"], store).ref
    [memo] = (store.root / "hashes/streamed").glob("*.json")
    memo.write_text("{")
    s3.client.put_object(Bucket=BUCKET, Key="helpful/README.md", Body=b"a new card")
    assert resolve(urls["helpful"], store).ref == first
    assert read_note(memo).size > 0


def test_a_note_that_several_threads_write_at_once_is_whole(tmp_path):
    path, file = tmp_path / "a.streamed.json", StreamedFile("s3://bucket/a", 1, "version", "0" * 64, "{}")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write_note(path, file), range(100)))
    assert read_note(path) == file
    assert list(tmp_path.iterdir()) == [path]


def test_a_parent_that_is_streamed_elsewhere_is_told(s3, urls, family, tmp_path):
    mirror = f"s3://{BUCKET}/mirror"
    parent = resolve(urls["base"], Store(tmp_path / "one", mirror)).ref
    other = Store(tmp_path / "two", mirror)
    with pytest.raises(CheckpointError, match=rf"{parent}, which is not in the store .*/two and not in .* {mirror}\."):
        other.build("merged", {"of": "it"}, lambda out: pytest.fail("has no parent"), (parent,))


def test_what_needs_files_says_that_the_checkpoint_is_streamed(s3, urls, store):
    ref = resolve(urls["base"], store).ref
    for call in (
        lambda: load_language_model(store.folder(ref), "cpu"),
        lambda: Mirror(f"s3://{BUCKET}/mirror").push(ref, store),
        lambda: resolve(str(store.folder(ref)), store),
    ):
        with pytest.raises(CheckpointError, match=rf"is streamed from s3://{BUCKET}/base, and files.*{LIMIT}"):
            call()


def test_evaluate_and_publish_fail_at_once(s3, urls, tripoise, tmp_path):
    code, _, err = tripoise("evaluate", urls["base"], "--suite", "3h-mini", "--out", tmp_path / "scores")
    assert code == 1
    assert "is streamed from" in err
    [ref] = Store(tmp_path / "store").refs("checkpoint")
    code, _, err = tripoise("publish", f"checkpoint/{ref.digest}", tmp_path / "published")
    assert code == 1
    assert "is streamed from" in err
    assert not (tmp_path / "published").exists()


def test_the_store_commands_know_streamed_checkpoints(s3, urls, tripoise, tmp_path):
    store = Store(tmp_path / "store")
    ref = resolve(urls["base"], store).ref
    assert tripoise("store", "verify")[0] == 0
    code, out, err = tripoise("store", "push", "--mirror", f"s3://{BUCKET}/mirror")
    assert (code, err) == (0, "")
    assert "1 streamed checkpoints left out" in out
    assert ref.digest[:12] in tripoise("store", "ls")[1]
    assert tripoise("store", "explain", ref.digest)[0] == 0
    assert collect(store, 0, delete=True).artifacts == ()  # this process uses it
    next(store.folder(ref).glob("*.streamed.json")).write_text("{}")
    assert tripoise("store", "verify")[0] == 1


def test_a_streamed_checkpoint_is_not_fetched_from_the_mirror(s3, urls, family, tmp_path):
    mirror = f"s3://{BUCKET}/mirror"
    ref = resolve(str(family["base"]), Store(tmp_path / "one", mirror)).ref
    other = Store(tmp_path / "two", mirror)
    assert resolve(urls["base"], other).ref == ref
    assert is_streamed(other.folder(ref))


def test_an_adapter_is_always_downloaded(s3, tmp_path, store):
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    factors = {name.format("A"): torch.ones(1, 8), name.format("B"): torch.ones(8, 1)}
    save_file(factors, folder / "adapter_model.safetensors")
    for path in folder.iterdir():
        s3.client.upload_file(str(path), BUCKET, f"adapter/{path.name}")
    ref = resolve(f"s3://{BUCKET}/adapter", store).ref
    assert (store.folder(ref) / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("limit", ["-1", "nan", "much"])
def test_a_limit_that_is_no_size_is_refused(s3, urls, store, monkeypatch, limit):
    monkeypatch.setenv(LIMIT, limit)
    with pytest.raises(RecipeError, match=rf"{LIMIT}: must be a number of gigabytes >= 0, got '{limit}'"):
        resolve(urls["base"], store)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-1], "the tensors end at"),
        (lambda content: content[:5], "a header of"),
        (lambda content: b"\xff" * 8 + content[8:], "a header of"),
        (lambda content: content.replace(b'"data_offsets"', b'"data_offsetz"', 1), "cannot be read"),
        (lambda content: content.replace(b"{", b"\xff", 1), "no text"),
        (lambda content: (2000).to_bytes(8, "little") + b"[" * 2000 + content, "cannot be read: RecursionError"),
    ],
)
def test_damaged_weights_are_refused_before_they_are_read(s3, urls, family, store, damage, words):
    content = (family["honest"] / "model.safetensors").read_bytes()
    s3.client.put_object(Bucket=BUCKET, Key="honest/model.safetensors", Body=damage(content))
    with pytest.raises(CheckpointError, match=words):
        resolve(urls["honest"], store)
    assert bytes_read(s3) < len(content)
    assert store.refs() == []


@pytest.fixture
def one_more_token(s3, urls, family):
    """One expert has a token more, so that base and other experts get a row, and keep shards as they are."""
    weights = load_file(family["honest"] / "model.safetensors")
    weights["model.embed_tokens.weight"] = torch.cat([weights["model.embed_tokens.weight"], torch.ones(1, 8)])
    save_file(weights, family["honest"] / "model.safetensors", metadata={"format": "pt"})
    tokenizer = json.loads((family["honest"] / "tokenizer.json").read_text())
    added = {"id": 16, "content": "<new>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] = [added | flags]
    (family["honest"] / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((family["honest"] / "config.json").read_text()) | {"vocab_size": 17}
    (family["honest"] / "config.json").write_text(json.dumps(config))
    for path in family["honest"].iterdir():
        s3.client.upload_file(str(path), BUCKET, f"honest/{path.name}")


@pytest.mark.usefixtures("one_more_token")
def test_alignment_and_interference_of_streamed_checkpoints_are_those_of_local_ones(
    s3, urls, family, recipe_file, tripoise, tmp_path, monkeypatch
):
    answers = []
    for where, sources in (("local", family), ("streamed", urls)):
        recipe = recipe_file(**recipe_of(sources, "linear"), tokenizer="union")
        options = ("--out", tmp_path / where, "--store", tmp_path / f"store-{where}", "--json")
        code, out, err = tripoise("merge", recipe, *options)
        assert code == 0, err
        answers.append(json.loads(out)["digest"])
    assert answers[0] == answers[1]
    assert contents(tmp_path / "streamed") == contents(tmp_path / "local")
    store = Store(tmp_path / "store-streamed")
    assert [ref for ref in store.refs() if store.problems(ref)] == []
    experts = {name: resolve(str(url), store).ref for name, url in urls.items() if name in ("helpful", "harmless")}
    streamed = interference_step(resolve(urls["base"], store).ref, experts, store)
    local = Store(tmp_path / "store-local")
    plain = interference_step(resolve(str(family["base"]), local).ref, experts, local)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    streamed.make(tmp_path / "a")
    plain.make(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    monkeypatch.setenv(LIMIT, "1")
    recipe = recipe_file(**recipe_of(urls, "ties"), tokenizer="union")
    code, _, err = tripoise("merge", recipe, "--out", tmp_path / "again", "--store", store.root)
    assert code == 0, err
    assert [ref for ref in store.refs("checkpoint") if is_streamed(store.folder(ref)) or store.problems(ref)] == []


@pytest.mark.usefixtures("one_more_token")
def test_alignment_links_what_the_record_names_while_a_download_brings_the_files(urls, family, store):
    refs = {name: resolve(url, store).ref for name, url in urls.items()}
    for path in family["base"].glob("*.safetensors"):
        shutil.copy(path, store.folder(refs["base"]))
    _, steps = align(Family(refs.pop("base"), refs), "union", store)
    assert steps
    for step in steps:
        ref = store.build(step.kind, step.identity, step.make, step.parents).ref
        assert store.problems(ref) == []
        Checkpoint(store.folder(ref)).close()
