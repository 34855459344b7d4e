"""Tiny checkpoints for tests: written and read with safetensors alone, never through the code under test."""

import json
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from merging_core.calibration import write_calibration
from merging_core.checkpoint import Checkpoint
from merging_core.merge import Inputs, merge
from merging_core.methods import SpectralMethod
from merging_core.methods.base import CalibratedMethod
from merging_core.recipe import Expert, Recipe
from merging_core.task_vectors import DecomposeSettings, decompose, measure_expert
from merging_core.writer import MAX_SHARD_BYTES

CONFIG = {"model_type": "llama", "vocab_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
NAMES = ("helpful", "honest", "harmless", "fourth", "fifth")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CPU = (torch.device("cpu"),)
# Removed when the interpreter ends.
_ROOT = tempfile.TemporaryDirectory(prefix="tripoise-test-")
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_folder(folder, tensors, *, config=CONFIG, shards=1, vocab=None):
    """Write a checkpoint folder with ``safetensors.torch.save_file``; tensors are dealt out to the shards in turn."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if vocab is not None:
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for at, (name, tensor) in enumerate(tensors.items()) if at % shards == number}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file, metadata={"format": "pt"})
    write_index(folder, weight_map)
    return folder


def write_index(folder, weight_map):
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_folder(folder):
    """All tensors of a folder, by safetensors alone."""
    return {
        name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def raw_file(path, header, data=b""):
    """A safetensors file with any header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def bits(tensor):
    """The tensor's bytes: unlike ==, tells -0.0 from 0.0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert found[name].shape == wanted[name].shape, name
        assert bits(found[name]) == bits(wanted[name]), name


def relative(found, wanted):
    """Distance in Frobenius norm, relative to what is wanted."""
    found, wanted = found.to(torch.float64), wanted.to(torch.float64)
    return float((found - wanted).norm() / wanted.norm())


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_bits(dtype, shape, generator):
    """Every finite bit pattern is possible: signed zeros, subnormals, huge values."""
    size = dtype.itemsize
    low, high = (0, 256) if size == 1 else (-(2 ** (8 * size - 1)), 2 ** (8 * size - 1) - 1)
    integers = torch.randint(low, high, shape, generator=generator, dtype=torch.int64)
    tensor = integers.to(_INTEGER_OF_SIZE[size]).view(dtype).clone()
    # The integer dtypes' own view, since not every narrow float can be tested for NaN.
    tensor[~torch.isfinite(tensor.to(torch.float64))] = -0.0
    flat = tensor.view(-1)
    for at, value in enumerate((-0.0, 0.0, torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max)):
        if at < flat.numel():
            flat[at] = value
    return tensor


def llama(seed=0, dtype=torch.float32, scale=0.1):
    """Two layers' worth of tall, wide and square matrices, vectors, and an integer buffer."""
    draw = rng(seed)

    def normal(*shape):
        return (torch.randn(shape, generator=draw, dtype=torch.float64) * scale).to(dtype)

    return {
        "model.embed_tokens.weight": normal(24, 12),
        "model.layers.0.mlp.up_proj.weight": normal(20, 12),
        "model.layers.0.mlp.down_proj.weight": normal(12, 20),
        "model.layers.1.self_attn.q_proj.weight": normal(12, 12),
        "model.layers.1.self_attn.gate.weight": normal(2, 12),
        "model.layers.1.input_layernorm.weight": normal(12),
        "model.scalar": normal(),
        "model.conv.weight": normal(2, 3, 4),
        "lm_head.weight": normal(24, 12),
        "model.position_ids": torch.arange(7),
    }


def tuned(base, seed, scale=0.02):
    """An expert: the base plus a random full-rank update of every floating-point tensor."""
    draw = rng(seed)
    return {
        name: (tensor.to(torch.float64) + scale * torch.randn(tensor.shape, generator=draw, dtype=torch.float64)).to(
            tensor.dtype
        )
        if tensor.dtype.is_floating_point
        else tensor.clone()
        for name, tensor in base.items()
    }


def random_update(rows, cols, seed=0, dtype=torch.float64):
    return torch.randn(rows, cols, generator=rng(seed), dtype=torch.float64).to(dtype)


def calibrated(kind, base, expert):
    """Made-up statistics of an expert: Gram matrices of the inputs of matrices, or squared gradients of all tensors."""
    draws = {name: rng(sum(f"{expert} {name}".encode())) for name in base}
    if kind == "fisher":
        return {name: torch.rand(base[name].shape, generator=draw) for name, draw in draws.items()}
    inputs = {
        name: torch.randn(40, base[name].shape[1], generator=draws[name]) for name in base if base[name].dim() == 2
    }
    return {name: x.T @ x / len(x) for name, x in inputs.items() if x.numel()}


class Merge:
    """One merge from tensors in memory to tensors in memory, through the files and functions that users have.

    Experts are a list (named as in NAMES) or a mapping of name to tensors; ``out`` is the merged folder.
    """

    def __init__(
        self,
        method,
        base,
        experts,
        *,
        weights=None,
        config=CONFIG,
        shards=1,
        rank_fraction=1.0,
        given_order=None,
        out=None,
        devices=CPU,
        **recipe,
    ):
        folder = Path(tempfile.mkdtemp(dir=_ROOT.name))
        experts = experts if isinstance(experts, dict) else dict(zip(NAMES, experts, strict=False))
        weights = weights or [1.0] * len(experts)
        self.recipe = Recipe(
            base="base",
            experts=tuple(
                Expert(name=name, source=name, weight=weight) for name, weight in zip(experts, weights, strict=True)
            ),
            method=method,
            **recipe,
        )
        base_folder = write_folder(folder / "base", base, config=config, shards=shards)
        folders = {
            name: write_folder(folder / name, tensors, config=config, shards=shards)
            for name, tensors in experts.items()
        }
        vectors, statistics = {}, {}
        if isinstance(method, SpectralMethod):
            kept = DecomposeSettings(rank_fraction=rank_fraction, embeddings=method.embeddings)
            for name, expert in folders.items():
                with Checkpoint(base_folder, "the base") as opened, Checkpoint(expert, f"expert {name!r}") as tuned_one:
                    vectors[name] = folder / f"{name}-vectors"
                    vectors[name].mkdir()
                    decompose(opened, tuned_one, kept, vectors[name])
                    if method.statistics:
                        statistics[name] = folder / f"{name}-statistics"
                        statistics[name].mkdir()
                        measure_expert(opened, tuned_one, method.statistics, statistics[name])
        calibration = {}
        if isinstance(method, CalibratedMethod):
            for name in folders:
                calibration[name] = folder / f"{name}-calibration"
                calibration[name].mkdir()
                write_calibration(calibration[name], calibrated(method.calibration.kind, base, name), name)
        order = given_order or list(experts)
        self.inputs = Inputs(
            base=base_folder,
            experts={name: folders[name] for name in order},
            vectors={name: vectors[name] for name in order if name in vectors},
            statistics={name: statistics[name] for name in order if name in statistics},
            calibration={name: calibration[name] for name in order if name in calibration},
        )
        self.out = Path(out or folder / "merged")
        self.out.mkdir(exist_ok=True)
        self.progress = []
        self.diagnostics = merge(self.recipe, self.inputs, self.out, self.progress.append, devices=devices)
        self.tensors = read_folder(self.out)

    def again(self, max_shard_bytes=MAX_SHARD_BYTES, **options):
        """Merge the same inputs once more; the new folder."""
        out = Path(tempfile.mkdtemp(dir=_ROOT.name))
        merge(replace(self.recipe, max_shard_bytes=max_shard_bytes), self.inputs, out, **options)
        return out


def merged(method, base, experts, **options):
    return Merge(method, base, experts, **options).tensors


def merged_update(method, updates, *, base=None, dtype=torch.float64, name="w", **options):
    """The merged update of one tensor named ``w``, from updates over a zero (or given) base."""
    base = torch.zeros(updates[0].shape, dtype=dtype) if base is None else base
    experts = [{name: (base + update).to(dtype)} for update in updates]
    result = merged(method, {name: base.to(dtype)}, experts, **options)[name]
    return result.to(torch.float64) - base.to(torch.float64)
