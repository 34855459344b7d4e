"""Models as small as they can be, of the real classes."""

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(**settings: Any) -> LlamaForCausalLM:
    """A Llama of two layers and two heads that was not trained; torch's seed decides its weights.

    Args:
        settings: of its configuration.
    """
    small = {
        **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24},
        **{"num_hidden_layers": 2, "num_attention_heads": 2},
    }
    return LlamaForCausalLM(LlamaConfig(**(small | settings)))
