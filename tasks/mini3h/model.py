"""The mini-3H model: a Llama of 0.8 million parameters, made and loaded without global state.

Modules are built on the meta device and filled afterwards, because their own initialisation draws
from torch's global generator, which other threads use too.
"""

from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from merging_core.errors import CheckpointError
from tasks.mini3h.vocabulary import BOS_ID, EOS_ID, MAX_LENGTH, PAD_ID

HIDDEN_SIZE: Final = 128
NUM_LAYERS: Final = 4
NUM_HEADS: Final = 4
INTERMEDIATE_SIZE: Final = 336
INITIAL_STD: Final = 0.05
"""Larger than Llama's 0.02: a model this narrow learns faster from it."""
MAX_NEW_TOKENS: Final = 8
TIED: Final = "lm_head.weight"
WEIGHTS: Final = "model.safetensors"


def new_model(vocab_size: int, generator: torch.Generator) -> LlamaForCausalLM:
    """Make a model whose matrices are normal(0, 0.05) from ``generator``, norms 1."""
    model = _empty_model(vocab_size)
    state = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            state[name] = torch.ones(parameter.shape, dtype=torch.float32)
        else:
            values = torch.empty(parameter.shape, dtype=torch.float32)
            state[name] = values.normal_(0.0, INITIAL_STD, generator=generator)
    return _fill(model, state)


def load_model(folder: Path, vocab_size: int) -> LlamaForCausalLM:
    """Load a mini-3H model that :func:`save_model` wrote.

    Raises:
        CheckpointError: if the folder holds no weights, or those of another world or shape.
    """
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: a mini-3H base has {WEIGHTS}, found none. Train the role 'base' first.")
    state = load_file(folder / WEIGHTS)
    model = _empty_model(vocab_size)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{folder}: tensors and shapes must be those of a mini-3H base, {len(wrong)} differ, first {wrong[:3]}. "
            "Train the role 'base' first."
        )
    return _fill(model, state)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config, generation config and float32 weights as transformers does."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    model.save_pretrained(folder)


def _empty_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        intermediate_size=INTERMEDIATE_SIZE,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=INITIAL_STD,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=True,
        dtype="float32",
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def _fill(model: LlamaForCausalLM, state: dict[str, Tensor]) -> LlamaForCausalLM:
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    # Its frequencies are no part of the state; built again, they leave the meta device.
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    return model.requires_grad_()
