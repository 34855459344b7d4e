import json
import os
import pickle
import struct
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    CONFIG,
    assert_same_bits,
    bits,
    llama,
    random_bits,
    raw_file,
    read_folder,
    rng,
    write_folder,
    write_index,
)

from merging_core.checkpoint import DTYPES, Checkpoint, TensorInfo, natural_order
from merging_core.errors import CheckpointError
from merging_core.writer import MAX_SHARD_BYTES, write_checkpoint


def layout_of(tensors):
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(folder, tensors, **options):
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, layout_of(tensors), tensors.__getitem__, **options)
    return folder


def read(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.load(name).clone() for name in checkpoint.tensors}


def any_bits(dtype, count):
    if dtype == torch.bool:
        return torch.arange(count) % 3 == 0
    return torch.randint(0, 256, (count * dtype.itemsize,), generator=rng(1), dtype=torch.uint8).view(dtype)


# Round trips


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 6), (6, 1), (1, 2, 3)])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, kind, shape):
    tensors = {"a": any_bits(DTYPES[kind], 6).reshape(shape)}
    assert_same_bits(read(write(tmp_path, tensors)), tensors)
    assert_same_bits(load_file(tmp_path / "model.safetensors"), tensors)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0)])
def test_scalars_and_empty_tensors_come_back(tmp_path, kind, shape):
    tensors = {"a": any_bits(DTYPES[kind], 1).reshape(()) if shape == () else torch.empty(shape, dtype=DTYPES[kind])}
    assert_same_bits(read(write(tmp_path, tensors)), tensors)
    assert_same_bits(load_file(tmp_path / "model.safetensors"), tensors)


@pytest.mark.parametrize("kind", DTYPES)
def test_files_of_safetensors_are_read_bit_for_bit(tmp_path, kind):
    tensors = {"a": any_bits(DTYPES[kind], 6).reshape(3, 2)}
    write_folder(tmp_path, tensors)
    assert_same_bits(read(tmp_path), tensors)


def test_all_dtypes_fit_into_one_file_and_stay_aligned(tmp_path):
    tensors = {f"t{number}.{kind}": any_bits(dtype, 3) for number, (kind, dtype) in enumerate(DTYPES.items())}
    write(tmp_path, tensors)
    assert_same_bits(load_file(tmp_path / "model.safetensors"), tensors)
    header, data_starts = header_of(tmp_path / "model.safetensors")
    assert data_starts % 8 == 0
    for name, tensor in tensors.items():
        assert (data_starts + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_one_dtype_gives_the_very_bytes_of_safetensors(tmp_path, dtype):
    tensors = {name: any_bits(dtype, 12).reshape(3, 4) for name in ("b", "a.weight", "layers.10.w", "layers.2.w")}
    write(tmp_path, tensors)
    save_file(tensors, tmp_path / "reference", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "reference").read_bytes()


def test_the_header_holds_what_safetensors_own_header_holds(tmp_path):
    tensors = {**llama(), "flag": torch.tensor([True]), "half": torch.ones(3, dtype=torch.bfloat16)}
    write(tmp_path, tensors)
    save_file(tensors, tmp_path / "reference", metadata={"format": "pt"})
    ours, theirs = (header_of(tmp_path / name)[0] for name in ("model.safetensors", "reference"))
    assert ours.pop("__metadata__") == theirs.pop("__metadata__") == {"format": "pt"}
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name]["dtype"] == theirs[name]["dtype"]
        assert ours[name]["shape"] == theirs[name]["shape"]
    spans = sorted(entry["data_offsets"] for entry in ours.values())
    assert spans[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(spans))


def header_of(path):
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), 8 + size


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    ),
    st.integers(1, 64),
    st.randoms(use_true_random=False),
)
def test_any_names_shapes_and_shard_limits_come_back_in_any_order(tmp_path_factory, tensors, limit, random):
    made = {}
    for name, (kind, shape) in tensors.items():
        count = int(torch.Size(shape).numel())
        made[name] = any_bits(DTYPES[kind], max(count, 1))[:count].reshape(shape)
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    write(first, made, max_shard_bytes=limit)
    assert_same_bits(read_folder(first), made)
    assert_same_bits(read(first), made)
    names = list(made)
    random.shuffle(names)
    write(second, {name: made[name] for name in names}, max_shard_bytes=limit)
    assert files_of(first) == files_of(second)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_names_that_differ_in_leading_zeros_do_not_depend_on_their_order(tmp_path):
    tensors = {"a1": torch.ones(1), "a01": torch.zeros(2), "a001": torch.ones(3)}
    write(tmp_path / "one", tensors, max_shard_bytes=12)
    write(tmp_path / "two", dict(reversed(tensors.items())), max_shard_bytes=12)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.parametrize("name", ["²", "w²", "3²", "٣", "x٣", "①"])
def test_digits_of_other_scripts_in_names_are_ordinary_text(name):
    assert sorted([name, "layers.10", "layers.2"], key=natural_order)


def test_natural_order_puts_layer_2_before_layer_10():
    names = [f"layers.{number}.w" for number in range(12)]
    assert sorted(sorted(names), key=natural_order) == names


# Shards


def test_shards_stay_under_the_limit_and_the_index_names_every_tensor(tmp_path):
    tensors = llama()
    write(tmp_path, tensors, max_shard_bytes=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(bits(tensor)) for tensor in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert {path.name for path in files} == set(index["weight_map"].values())
    for number, path in enumerate(files, start=1):
        assert path.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        stored = load_file(path)
        assert sum(len(bits(tensor)) for tensor in stored.values()) <= 2000
        assert all(index["weight_map"][name] == path.name for name in stored)
    assert_same_bits(read(tmp_path), tensors)


@pytest.mark.parametrize("position", ["a", "m", "z"])
def test_a_tensor_larger_than_the_limit_gets_a_shard_of_its_own(tmp_path, position):
    tensors = {f"{name}{position if name == 'big' else ''}": torch.ones(2) for name in ("b1", "n1", "y1")}
    tensors[position] = torch.ones(100)
    write(tmp_path, tensors, max_shard_bytes=32)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert [name for name in weight_map if weight_map[name] == weight_map[position]] == [position]
    assert_same_bits(read(tmp_path), tensors)


def test_a_limit_that_is_met_exactly_gives_one_file(tmp_path):
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    write(tmp_path / "one", tensors, max_shard_bytes=32)
    write(tmp_path / "two", tensors, max_shard_bytes=31)
    assert sorted(files_of(tmp_path / "one")) == ["model.safetensors"]
    assert len(files_of(tmp_path / "two")) == 3


def test_layers_that_follow_each_other_share_a_shard(tmp_path):
    tensors = {f"layers.{number}.w": torch.ones(1) for number in range(12)}
    write(tmp_path, tensors, max_shard_bytes=24)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {weight_map[f"layers.{number}.w"] for number in range(6)} == {"model-00001-of-00002.safetensors"}


def test_writing_asks_for_each_tensor_once_and_reports_its_bytes(tmp_path):
    tensors, asked, sizes = llama(), [], []

    def compute(name):
        asked.append(name)
        return tensors[name]

    write_checkpoint(tmp_path, layout_of(tensors), compute, written=sizes.append)
    assert sorted(asked) == sorted(tensors)
    assert sizes == [len(bits(tensors[name])) for name in asked]


# Going on


def write_counted(folder, tensors, **options):
    """Write, and give the names that were computed."""
    asked = []

    def compute(name):
        asked.append(name)
        return tensors[name]

    write_checkpoint(folder, layout_of(tensors), compute, **options)
    return asked


def test_complete_shards_are_kept_if_their_keeper_vouches_for_them(tmp_path):
    tensors = llama()
    write(tmp_path, tensors, max_shard_bytes=2000)
    whole = files_of(tmp_path)
    shards = sorted(name for name in whole if name.endswith(".safetensors"))
    assert len(shards) > 2
    lost = set(load_file(tmp_path / shards[1]))
    sizes = []
    for damage in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(path.read_bytes()[:8] + b" " + path.read_bytes()[9:]),
    ):
        damage(tmp_path / shards[1])
        sizes.clear()
        asked = write_counted(tmp_path, tensors, max_shard_bytes=2000, keep=lambda file: True, written=sizes.append)
        assert set(asked) == lost
        assert sum(sizes) == sum(len(bits(tensor)) for tensor in tensors.values())
        assert files_of(tmp_path) == whole
    assert set(write_counted(tmp_path, tensors, max_shard_bytes=2000, keep=lambda file: file != shards[1])) == lost
    assert set(write_counted(tmp_path, tensors, max_shard_bytes=2000)) == set(tensors)
    assert files_of(tmp_path) == whole


@pytest.mark.parametrize("before", [2000, 900, MAX_SHARD_BYTES])
@pytest.mark.parametrize("after", [2000, 900, MAX_SHARD_BYTES])
def test_no_weights_of_another_layout_stay(tmp_path, before, after):
    write(tmp_path / "new", llama(), max_shard_bytes=after)
    write(tmp_path / "old", llama(3), max_shard_bytes=before)
    (tmp_path / "old" / ".model.safetensors.partial").write_bytes(b"half")
    (tmp_path / "old" / "tokenizer.json").write_text("{}")
    write(tmp_path / "old", llama(), max_shard_bytes=after)
    assert files_of(tmp_path / "old") == files_of(tmp_path / "new") | {"tokenizer.json": b"{}"}


def test_a_shard_gets_its_name_when_it_is_finished(tmp_path):
    tensors = llama()
    seen = []

    def compute(name):
        assert {path.name for path in tmp_path.glob("*.safetensors") if path.name[0] != "."} == {
            file for file, _ in seen
        }
        return tensors[name]

    def finished(file, names):
        assert not (tmp_path / file).exists()
        assert set(load_file(tmp_path / f".{file}.partial")) == set(names)
        seen.append((file, names))

    write_checkpoint(tmp_path, layout_of(tensors), compute, max_shard_bytes=2000, finished=finished)
    assert sorted(name for _, names in seen for name in names) == sorted(tensors)


@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_the_number_of_workers_changes_no_byte(tmp_path, num_workers):
    write(tmp_path / "one", llama(), max_shard_bytes=900)
    write(tmp_path / "many", llama(), max_shard_bytes=900, num_workers=num_workers, held=lambda name: 5, max_held=12)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "many")


@pytest.mark.parametrize("wrong", [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(3, 1)])
def test_a_tensor_other_than_announced_is_refused(tmp_path, wrong):
    with pytest.raises(CheckpointError, match="announced as"):
        write_checkpoint(tmp_path, {"a": TensorInfo(torch.float32, (3,))}, lambda name: wrong)


@pytest.mark.parametrize("view", [lambda t: t.T, lambda t: t[::2], lambda t: t[:1].expand(4, 6)])
def test_views_are_written_by_their_values(tmp_path, view):
    tensor = view(torch.arange(24.0).reshape(4, 6))
    assert_same_bits(read(write(tmp_path, {"a": tensor})), {"a": tensor.contiguous()})


def test_parameters_that_require_gradients_are_written(tmp_path):
    tensor = torch.nn.Parameter(torch.ones(3))
    assert_same_bits(read(write(tmp_path, {"a": tensor})), {"a": tensor.detach()})


# Reading


def test_opening_tells_dtypes_shapes_and_bytes(tmp_path):
    with Checkpoint(write_folder(tmp_path, {"a": torch.ones(2, 3, dtype=torch.bfloat16)}), "the base") as checkpoint:
        assert checkpoint.tensors == {"a": TensorInfo(torch.bfloat16, (2, 3))}
        assert checkpoint.tensors["a"].num_bytes == 12
        assert checkpoint.config == CONFIG
        assert checkpoint.name == "the base"


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shard_layout_of_the_input_does_not_matter(tmp_path, shards):
    assert_same_bits(read(write_folder(tmp_path, llama(), shards=shards)), llama())


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_loading_one_tensor_does_not_load_the_others(tmp_path):
    size = 64_000_000
    write_folder(tmp_path, {"big": torch.ones(size, dtype=torch.uint8), "small": torch.ones(4)})

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.load("small").sum() == 4
        assert resident() - before < size / 4


def test_a_loaded_tensor_survives_closing(tmp_path):
    with Checkpoint(write_folder(tmp_path, llama())) as checkpoint:
        tensor = checkpoint.load("model.embed_tokens.weight")
    assert bits(tensor) == bits(llama()["model.embed_tokens.weight"])


def test_changing_a_loaded_tensor_leaves_the_file_alone(tmp_path):
    write_folder(tmp_path, {"a": torch.ones(4)})
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.load("a").zero_()
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [1, 1, 1, 1]


# Damage: whatever is wrong with the file, the error is a CheckpointError that says what to do


def damaged(folder):
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    return str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights for a moment")
def test_a_file_that_may_not_be_read_is_not_called_damaged():
    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(Path(name), llama())
        folder.chmod(0o755)
        (folder / "model.safetensors").chmod(0o600)
        os.seteuid(65534)
        try:
            message = damaged(folder)
        finally:
            os.seteuid(0)
    assert "model.safetensors: cannot be read" in message
    assert "fetch it again" not in message


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    write_folder(tmp_path, llama())
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    ends = {0, 1, 7, 8, 9, 8 + size // 2, 8 + size - 1, 8 + size, 8 + size + 1, len(whole) // 2, len(whole) - 1}
    for end in sorted(ends | set(range(0, len(whole), 97))):
        path.write_bytes(whole[:end])
        message = damaged(tmp_path)
        assert "model.safetensors" in message, end
        assert "fetch it again" in message, end


@pytest.mark.parametrize("extra", [b"\0", b"more than the header says"])
def test_a_file_with_bytes_left_over_is_refused(tmp_path, extra):
    write_folder(tmp_path, llama())
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(extra)
    damaged(tmp_path)


@given(st.data())
def test_a_flipped_header_byte_never_raises_anything_else(tmp_path_factory, data):
    folder = write_folder(tmp_path_factory.mktemp("flip"), {"w": torch.ones(2, 2), "b": torch.ones(3)})
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", raw[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 8 + size - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        read(folder)
    except CheckpointError:
        pass


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut JSON"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"\xff\xfe\xfd", id="not UTF-8"),
        pytest.param(b"not json at all", id="text"),
        pytest.param({"a": 5}, id="entry is a number"),
        pytest.param({"a": {"dtype": "F32"}}, id="no shape"),
        pytest.param({"a": ENTRY | {"data_offsets": [0, 4]}}, id="too few bytes"),
        pytest.param({"a": ENTRY | {"data_offsets": [0, 16]}}, id="too many bytes"),
        pytest.param({"a": ENTRY | {"data_offsets": [8, 0]}}, id="end before begin"),
        pytest.param({"a": ENTRY | {"data_offsets": [8, 16]}}, id="a hole"),
        pytest.param({"a": ENTRY, "b": ENTRY}, id="overlap"),
        pytest.param({"a": ENTRY | {"shape": [-2]}}, id="negative shape"),
        pytest.param({"a": ENTRY | {"shape": [2**40, 2**40]}}, id="shape overflows"),
        pytest.param({"a": ENTRY | {"dtype": "F33"}}, id="unknown dtype"),
        pytest.param({"a": ENTRY | {"dtype": "I4"}}, id="packed dtype"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    raw_file(tmp_path / "model.safetensors", header, bytes(8))
    damaged(tmp_path)


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 10**9])
def test_a_header_size_beyond_the_file_is_refused(tmp_path, size):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", size) + b'{"a":1}')
    damaged(tmp_path)


@pytest.mark.parametrize(("kind", "num_bytes"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_types_narrower_than_a_byte_are_refused_by_name(tmp_path, kind, num_bytes):
    header = {"packed": {"dtype": kind, "shape": [8], "data_offsets": [0, num_bytes]}}
    raw_file(tmp_path / "model.safetensors", header, bytes(num_bytes))
    message = damaged(tmp_path)
    assert "'packed'" in message
    assert kind in message
    assert "unquantized" in message


def test_a_directory_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    damaged(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"expert 'honest': no folder .*nowhere"):
        Checkpoint(tmp_path / "nowhere", "expert 'honest'")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no folder"):
        Checkpoint(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00"])
def test_a_damaged_config_is_refused(tmp_path, text):
    write_folder(tmp_path, llama(), config=None)
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in damaged(tmp_path)


def test_a_config_that_is_not_utf8_is_refused(tmp_path):
    write_folder(tmp_path, llama(), config=None)
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff\xfe"}')
    assert "config.json" in damaged(tmp_path)


def test_a_checkpoint_without_a_config_has_an_empty_one(tmp_path):
    with Checkpoint(write_folder(tmp_path, llama(), config=None)) as checkpoint:
        assert checkpoint.config == {}


# Index and shards


def test_a_missing_shard_is_named(tmp_path):
    write_folder(tmp_path, llama(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message = damaged(tmp_path)
    assert "1 of 3 shards are missing" in message
    assert "model-00002-of-00003.safetensors" in message


def test_a_cut_shard_is_named(tmp_path):
    write_folder(tmp_path, llama(), shards=3)
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert path.name in damaged(tmp_path)


def test_a_stale_index_beside_a_single_file_is_refused(tmp_path):
    write_folder(tmp_path, llama())
    write_folder(tmp_path, llama(), shards=2)
    assert "stale" in damaged(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write_folder(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, shards=2)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    message = damaged(tmp_path)
    assert "'a'" in message
    assert "two shards" in message


def test_an_index_that_names_tensors_that_are_not_there_is_refused(tmp_path):
    write_folder(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, shards=2)
    first = "model-00001-of-00002.safetensors"
    write_index(tmp_path, {"a": first, "b": "model-00002-of-00002.safetensors", "c": first})
    message = damaged(tmp_path)
    assert "1 tensors are not in the shard that the index names" in message
    assert "'c'" in message


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path):
    write_folder(tmp_path, {"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}, shards=2)
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    message = damaged(tmp_path)
    assert "not in the index" in message
    assert "'c'" in message


def test_an_index_that_puts_a_tensor_into_the_wrong_shard_is_refused(tmp_path):
    write_folder(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, shards=2)
    write_index(tmp_path, {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"})
    assert "2 tensors are not in the shard that the index names, first ['a', 'b']" in damaged(tmp_path)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "..", ".", "", "sub/x.safetensors", "/etc/passwd"])
def test_a_shard_outside_the_folder_is_refused(tmp_path, shard):
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, folder / "sub" / "x.safetensors")
    write_index(folder, {"a": shard})
    damaged(folder)


def test_an_absolute_shard_path_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    (tmp_path / "model").mkdir()
    write_index(tmp_path / "model", {"a": str(tmp_path / "outside.safetensors")})
    assert "outside the folder" in damaged(tmp_path / "model")


@pytest.mark.parametrize(
    "index", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 5}}']
)
def test_a_damaged_index_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    damaged(tmp_path)


# Refused formats


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_remedy_and_never_loaded(tmp_path, file):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / file).write_bytes(pickle.dumps(Bomb()))
    message = damaged(tmp_path)
    assert file in message
    assert f"tripoise convert {tmp_path} --out NEW_FOLDER" in message
    assert not (tmp_path / "exploded").exists()


def test_safetensors_beside_pickles_are_used(tmp_path):
    write_folder(tmp_path, llama())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_same_bits(read(tmp_path), llama())


def test_an_adapter_folder_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert "a recipe with that one expert makes a complete model" in damaged(tmp_path)


def test_an_empty_folder_says_what_was_expected(tmp_path):
    assert "holds no model.safetensors" in damaged(tmp_path)


def test_the_default_shard_limit_is_five_gigabytes():
    assert MAX_SHARD_BYTES == 5_000_000_000


def test_random_bit_patterns_of_the_helper_are_finite_and_hold_a_negative_zero():
    tensor = random_bits(torch.bfloat16, (50, 50), rng())
    assert torch.isfinite(tensor).all()
    assert torch.signbit(tensor[tensor == 0]).any()
