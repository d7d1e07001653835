"""Tiny models of every family, as fields of transformers' config classes.

Widths, windows and scalings are chosen so that a forgotten term shows.
"""

from __future__ import annotations

from typing import Any

from jaxinfer.checkpoint.hf_config import config_from_hf
from jaxinfer.config import ModelConfig

VOCAB = 96  # V, the width of the logits
KNOWN = 90  # ids that the tokenizer knows; the others pad the logits and are never chosen
WINDOW = 12

BASE: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 36, "intermediate_size": 56, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"rms_norm_eps": 1e-2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"tie_word_embeddings": False},
}
ODD = {"head_dim": 10}  # D / N is 9
ONE_KV = {"num_key_value_heads": 1}
TIED = {"tie_word_embeddings": True}
SLIDING = {"sliding_window": WINDOW}
SWITCHED = {**SLIDING, "use_sliding_window": True}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0},
    **{"original_max_position_embeddings": 32},
}
GEMMA = {**SLIDING, "head_dim": 24, "query_pre_attn_scalar": 20}
GEMMA3 = {
    **GEMMA,
    "num_hidden_layers": 7,  # five local layers, a global one, a local one
    "final_logit_softcapping": 4.0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
    },
}
GEMMA3_LINEAR = {
    **{**GEMMA, "num_hidden_layers": 3},
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
    },
}

# Name -> the class of the config and its fields. The first word is the family.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", ODD),
    "llama tied, one kv head, every bias": (
        "Llama",
        {**TIED, **ONE_KV, "head_dim": 24, "attention_bias": True, "mlp_bias": True},
    ),
    "llama llama3": ("Llama", {**ODD, "rope_parameters": LLAMA3, "max_position_embeddings": 2048}),
    "llama linear": ("Llama", {"hidden_size": 40, "rope_parameters": LINEAR}),
    "llama yarn": ("Llama", {"head_dim": 24, "rope_parameters": YARN}),
    "llama yarn, every field": (
        "Llama",
        {
            "head_dim": 24,
            "rope_parameters": {
                **YARN,
                **{"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.5},
            },
        },
    ),
    "mistral": ("Mistral", {**ODD, **SLIDING}),
    "mistral no window, tied, one kv head": (
        "Mistral",
        {**TIED, **ONE_KV, "head_dim": 24, "sliding_window": None},
    ),
    "qwen2": ("Qwen2", {"hidden_size": 40}),
    "qwen2 upper layers slide, tied": (
        "Qwen2",
        {**TIED, **SWITCHED, "hidden_size": 40, "max_window_layers": 1},
    ),
    "qwen2 yarn": ("Qwen2", {"hidden_size": 40, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", ODD),
    "qwen3 all slide, tied, one kv head, biases": (
        "Qwen3",
        {**TIED, **ONE_KV, **SWITCHED, "max_window_layers": 0, "head_dim": 24}
        | {"attention_bias": True},
    ),
    "gemma2": (
        "Gemma2",
        {**TIED, **GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2 no softcaps, untied, one kv head": (
        "Gemma2",
        {**GEMMA, **ONE_KV, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("Gemma3Text", {**TIED, **GEMMA3}),
    "gemma3 linear, chosen layers, untied, one kv head": (
        "Gemma3Text",
        {**GEMMA3_LINEAR, **ONE_KV, "max_position_embeddings": 2048},
    ),
    "phi3": ("Phi3", {"hidden_size": 40, **SLIDING}),
    "phi3 half of a head rotates, tied, one kv head": (
        "Phi3",
        {**TIED, **ONE_KV, "hidden_size": 48, "sliding_window": None}
        | {"partial_rotary_factor": 0.5},
    ),
    "olmo2": ("Olmo2", {"hidden_size": 40}),
    "olmo2 tied, one kv head, biases": (
        "Olmo2",
        {**TIED, **ONE_KV, "hidden_size": 48, "attention_bias": True},
    ),
    "smollm3": ("SmolLM3", {**TIED, "hidden_size": 40, "num_hidden_layers": 4}),
    "smollm3 windows, chosen layers, biases": (
        "SmolLM3",
        {**SWITCHED, "hidden_size": 40, "no_rope_layers": [1, 0], "attention_bias": True}
        | {"mlp_bias": True, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}


def tiny_family(name: str) -> ModelConfig:
    """Our config of an entry of SETTINGS."""
    kind, fields = SETTINGS[name]
    model_type = kind.lower().replace("text", "_text")
    return config_from_hf({"model_type": model_type, **BASE, **fields}, where=name)
