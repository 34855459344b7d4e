"""For all tests: no network, no analytics, shape checks. Kept free of project imports: the core is tested alone."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Who was started in the background may have inherited that interrupts are ignored, as may its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before any test imports the core. Only modules with shapes in them: every call of their functions takes longer.
CORE = Path(__file__).parents[1] / "merging_core"
sys.path.insert(0, str(Path(__file__).parent / "merging_core"))
install_import_hook(
    [
        ".".join(path.relative_to(CORE.parent).with_suffix("").parts)
        for path in sorted(CORE.rglob("*.py"))
        if "from jaxtyping import" in path.read_text()
    ],
    "shape_checks.check",
)

VOCABULARY = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijkl"])}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROLES = ("base", "helpful", "honest", "harmless")


def llama_shapes():
    """Names and shapes of a Llama of CONFIG."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {prefix + f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (hidden, inner)}
        shapes |= {prefix + f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes


def write_llama(folder, seed, base=None, change=lambda tensors: tensors):
    """Write a tiny Llama with a tokenizer; an expert is its base plus noise."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in llama_shapes().items()}
    if base is not None:
        tensors = {name: tensor + 0.1 * tensors[name] for name, tensor in load_file(base / "model.safetensors").items()}
    folder.mkdir(parents=True)
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    return folder


@pytest.fixture
def family(tmp_path):
    """Folders of a base and three experts, by name, below ``tmp_path / "models"``."""
    folders = {"base": write_llama(tmp_path / "models" / "base", 0)}
    for seed, name in enumerate(ROLES[1:], start=1):
        folders[name] = write_llama(tmp_path / "models" / name, seed, folders["base"])
    return folders


@pytest.fixture
def recipe_file(tmp_path, family):
    """Writes a recipe over the family; entries may be changed by keyword."""

    def write(**changes):
        import yaml

        recipe = {
            "base": str(family["base"]),
            "experts": {name: str(family[name]) for name in ROLES[1:]},
            "method": {"name": "r_tsvm", "scale": 1.0},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe | changes))
        return path

    return write


@pytest.fixture
def tripoise(tmp_path, monkeypatch, capsys):
    """Run the command line in this process; gives exit code, standard output and standard error."""
    from flows import cli

    monkeypatch.setenv("TRIPOISE_STORE", str(tmp_path / "store"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tripoise", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
