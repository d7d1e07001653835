"""The shapes of well-known models, so that a plan needs no download.

A preset is the part of the model's public config.json that changes the maths, or of its
`text_config` where the file also describes an image encoder: facts, in the fields and the spelling
of that file, and read by the code that reads the file itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxinfer.checkpoint.hf_config import config_from_hf
from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidArgument

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)


def _fields(
    model_type: str,
    sizes: tuple[int, int, int, int, int],
    common: Mapping[str, Any],
    **own: Any,
) -> Mapping[str, Any]:
    """One config.json.

    Args:
      model_type: the family.
      sizes: D, F, L, N, K: width, hidden width, layers, query heads, key/value heads.
      common: what the family's models share.
      **own: what this one has besides, or instead.
    """
    shape = dict(zip(_SIZES, sizes, strict=True))
    return MappingProxyType({"model_type": model_type, **common, **shape, **own})


def _llama31(factor: float) -> dict[str, Any]:
    """The context of Llama 3.1 and later: 8,192 tokens stretched to 131,072."""
    scaling = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 8192}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"max_position_embeddings": 131072, "rope_scaling": scaling}


_LLAMA3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
_LLAMA31_405B = _fields("llama", (16384, 53248, 126, 128, 8), _LLAMA3, **_llama31(8.0))
_MISTRAL = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_QWEN25 = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
_QWEN3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
_GEMMA2 = {
    "vocab_size": 256000,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
_GEMMA3 = {
    "vocab_size": 262144,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "tie_word_embeddings": True,
}
# The larger ones read images too: 64 more ids, and a longer, stretched context.
_GEMMA3_VISION = _GEMMA3 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
_PHI3 = {
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_OLMO2 = {
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
_SMOLLM2 = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
_SMOLLM3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 65536,
    "no_rope_layer_interval": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}

# Where a model's base and chat files differ in their context, the chat model's.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-3-8b": _fields("llama", (4096, 14336, 32, 32, 8), _LLAMA3),
        "llama-3-70b": _fields("llama", (8192, 28672, 80, 64, 8), _LLAMA3),
        "llama-3-405b": _LLAMA31_405B,  # published as Llama 3.1; there is no other
        "llama-3.1-8b": _fields("llama", (4096, 14336, 32, 32, 8), _LLAMA3, **_llama31(8.0)),
        "llama-3.1-70b": _fields("llama", (8192, 28672, 80, 64, 8), _LLAMA3, **_llama31(8.0)),
        "llama-3.1-405b": _LLAMA31_405B,
        "llama-3.2-1b": _fields(
            *("llama", (2048, 8192, 16, 32, 8), _LLAMA3),
            **_llama31(32.0),
            tie_word_embeddings=True,
        ),
        "llama-3.2-3b": _fields(
            *("llama", (3072, 8192, 28, 24, 8), _LLAMA3),
            **_llama31(32.0),
            tie_word_embeddings=True,
        ),
        "qwen2.5-0.5b": _fields(
            *("qwen2", (896, 4864, 24, 14, 2), _QWEN25),
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        "qwen2.5-7b": _fields(
            *("qwen2", (3584, 18944, 28, 28, 4), _QWEN25),
            vocab_size=152064,
            tie_word_embeddings=False,
        ),
        "qwen3-0.6b": _fields("qwen3", (1024, 3072, 28, 16, 8), _QWEN3, tie_word_embeddings=True),
        "qwen3-1.7b": _fields("qwen3", (2048, 6144, 28, 16, 8), _QWEN3, tie_word_embeddings=True),
        "qwen3-4b": _fields("qwen3", (2560, 9728, 36, 32, 8), _QWEN3, tie_word_embeddings=True),
        "qwen3-8b": _fields("qwen3", (4096, 12288, 36, 32, 8), _QWEN3),
        "qwen3-14b": _fields("qwen3", (5120, 17408, 40, 40, 8), _QWEN3),
        "qwen3-32b": _fields("qwen3", (5120, 25600, 64, 64, 8), _QWEN3),
        "mistral-7b": _fields(  # version 0.3
            *("mistral", (4096, 14336, 32, 32, 8), _MISTRAL),
            vocab_size=32768,
            rope_theta=1000000.0,
            sliding_window=None,
        ),
        "mistral-7b-v0.1": _fields(
            *("mistral", (4096, 14336, 32, 32, 8), _MISTRAL),
            vocab_size=32000,
            rope_theta=10000.0,
            sliding_window=4096,
        ),
        "gemma-2-2b": _fields("gemma2", (2304, 9216, 26, 8, 4), _GEMMA2),
        "gemma-2-9b": _fields("gemma2", (3584, 14336, 42, 16, 8), _GEMMA2),
        "gemma-2-27b": _fields(
            *("gemma2", (4608, 36864, 46, 32, 16), _GEMMA2),
            head_dim=128,
            query_pre_attn_scalar=144,
        ),
        "gemma-3-270m": _fields("gemma3_text", (640, 2048, 18, 4, 1), _GEMMA3),
        "gemma-3-1b": _fields("gemma3_text", (1152, 6912, 26, 4, 1), _GEMMA3),
        "gemma-3-4b": _fields("gemma3_text", (2560, 10240, 34, 8, 4), _GEMMA3_VISION),
        "gemma-3-12b": _fields("gemma3_text", (3840, 15360, 48, 16, 8), _GEMMA3_VISION),
        "gemma-3-27b": _fields(
            *("gemma3_text", (5376, 21504, 62, 32, 16), _GEMMA3_VISION),
            head_dim=128,
            query_pre_attn_scalar=168,
        ),
        "phi-3-mini": _fields("phi3", (3072, 8192, 32, 32, 32), _PHI3),  # of 4,096 tokens
        "olmo-2-7b": _fields("olmo2", (4096, 11008, 32, 32, 32), _OLMO2),
        "smollm2-135m": _fields("llama", (576, 1536, 30, 9, 3), _SMOLLM2),
        "smollm3-3b": _fields("smollm3", (2048, 11008, 36, 16, 4), _SMOLLM3),
    }
)


def preset(name: str) -> ModelConfig:
    """The shape of the model with this name, in any case.

    Raises:
      InvalidArgument: no such preset; names the near ones, or all where none is near.
    """
    key = name.lower()
    if key not in PRESETS:
        near = difflib.get_close_matches(key[:200], PRESETS, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
        raise InvalidArgument(f"{name[:200]!r} is no preset; {hint}")
    return config_from_hf(PRESETS[key], where=f"preset {key}")
