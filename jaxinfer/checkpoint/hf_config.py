"""config.json, as transformers 4 and 5 write it, translated into `ModelConfig`.

Every field is read, or stands in a list of fields that do not change the maths, or is refused by
name. An absent field has the default of the family's class in transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jaxinfer.checkpoint.fields import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_LEN,
    MAX_VOCAB,
    MAX_WIDTH,
    REQUIRED,
    Fields,
)
from jaxinfer.checkpoint.hf_families import CLASSES, FAMILIES, HARMLESS, VISION, Family
from jaxinfer.checkpoint.hf_rope import context, gemma3_ropes_from_hf, rope_from_hf
from jaxinfer.config import LayerConfig, ModelConfig, Rope
from jaxinfer.errors import CorruptFile, UnsupportedModel

FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = {FULL: FULL, SLIDING: SLIDING, "attention": FULL}
Activation = Literal["silu", "gelu_tanh", "gelu"]
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def config_from_hf(config: Mapping[str, Any], *, where: str) -> ModelConfig:
    """Translate a parsed config.json; `where` names the file in messages.

    Raises:
      UnsupportedModel: an architecture, or a field that may change the maths, that we do not have.
      CorruptFile: a field of the wrong type or out of range, or fields that contradict each other.
    """
    fields = Fields(config, where)
    name = _model_type(fields)
    if name != "gemma3":
        return _text_config(fields, name)
    text = fields.table("text_config")
    if text is None:
        raise CorruptFile(f"{where}: text_config is missing")
    text.choice("model_type", "gemma3_text", {"gemma3_text": "gemma3_text"})
    text.only("final_logit_softcapping")  # the class with vision has it, but its head drops it
    inner = _text_config(text, "gemma3_text")
    tied = fields.flag("tie_word_embeddings", inner.tied)
    _refuse_known(fields)
    fields.ignore(HARMLESS | VISION)
    fields.refuse_rest()
    return dataclasses.replace(inner, tied=tied)


def _model_type(fields: Fields) -> str:
    """The model_type, or where it is absent what the class's name says; both must agree."""
    classes = fields.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise fields.corrupt("architectures", "a list of texts")
    for name in classes:
        if name not in CLASSES:
            raise UnsupportedModel(
                f"{fields.where}: architectures names {name[:60]!r}, which is not supported;"
                f" supported: {', '.join(CLASSES)}"
            )
    if "model_type" not in fields and classes:
        return CLASSES[classes[0]]
    model_type: str = fields.choice("model_type", REQUIRED, {n: n for n in {*CLASSES.values()}})
    if any(CLASSES[name] != model_type for name in classes):
        raise fields.corrupt("model_type", f"that of {classes[0]}, {CLASSES[classes[0]]!r}")
    return model_type


def _text_config(fields: Fields, name: str) -> ModelConfig:
    f = FAMILIES[name]
    width = fields.integer("hidden_size", f.hidden_size, most=MAX_WIDTH)
    heads = fields.integer("num_attention_heads", f.num_attention_heads, most=MAX_HEADS)
    kv_heads = fields.integer_or_none("num_key_value_heads", f.num_key_value_heads, most=MAX_HEADS)
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise fields.corrupt("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    head_dim = _head_dim(fields, f, width, heads)
    max_len = fields.integer("max_position_embeddings", f.max_position_embeddings, most=MAX_LEN)
    layers = _layers(fields, name, head_dim, max_len)
    if f.attention_bias == "qkv":
        fields.only("attention_bias", True, why="contradicting this family, which has biases")
    elif f.attention_bias == "never":
        fields.only("attention_bias", False)
    bias = f.attention_bias == "optional" and fields.flag("attention_bias", False)
    if not f.mlp_bias:
        fields.only("mlp_bias", False)
    config = ModelConfig(
        family=name.removesuffix("_text"),
        vocab_size=fields.integer("vocab_size", f.vocab_size, most=MAX_VOCAB),
        width=width,
        hidden=fields.integer("intermediate_size", f.intermediate_size, most=MAX_WIDTH),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layers=layers,
        max_len=max(context(max_len, layer.rope) for layer in layers),
        norm_eps=fields.number("rms_norm_eps", f.rms_norm_eps, most=1.0),
        pre_norm=f.pre_norm,
        post_norm=f.post_norm,
        qk_norm=f.qk_norm,
        qkv_bias=bias or f.attention_bias == "qkv",
        out_bias=bias,
        mlp_bias=f.mlp_bias and fields.flag("mlp_bias", False),
        attention_scale=head_dim**-0.5,
        tied=fields.flag("tie_word_embeddings", f.tied),
    )
    if f.gemma:
        config = _gemma(fields, config)
    else:
        activation = fields.choice("hidden_act", "silu", ACTIVATIONS)
        config = dataclasses.replace(config, activation=activation)
    _refuse_known(fields)
    fields.ignore(HARMLESS)
    fields.refuse_rest()
    return config


def _head_dim(fields: Fields, f: Family, width: int, heads: int) -> int:
    head_dim = fields.integer_or_none("head_dim", f.head_dim, most=MAX_WIDTH)
    if head_dim is None:
        if width % heads:
            raise fields.corrupt("hidden_size", f"a multiple of num_attention_heads, {heads}")
        head_dim = width // heads
    if head_dim % 2:
        raise fields.corrupt("head_dim", f"an even width for rotary pairs, not {head_dim}")
    return head_dim


def _layers(fields: Fields, name: str, head_dim: int, max_len: int) -> tuple[LayerConfig, ...]:
    f = FAMILIES[name]
    n = fields.integer("num_hidden_layers", f.num_hidden_layers, most=MAX_LAYERS)
    rotary = _rotary_layers(fields, n) if name == "smollm3" else [True] * n
    windows = _windows(fields, name, rotary)
    ropes: dict[str, Rope]
    if name == "gemma3_text":
        ropes = gemma3_ropes_from_hf(fields, head_dim=head_dim, max_len=max_len)
    else:
        rope = rope_from_hf(
            fields,
            head_dim=head_dim,
            max_len=max_len,
            default_theta=f.rope_theta,
            phi3=name == "phi3",
        )
        ropes = {FULL: rope, SLIDING: rope}
    return tuple(
        LayerConfig(window, ropes[SLIDING if window else FULL] if uses_rope else None)
        for window, uses_rope in zip(windows, rotary, strict=True)
    )


def _rotary_layers(fields: Fields, n: int) -> list[bool]:
    """Which layers of SmolLM3 rotate. `no_rope_layers` means the opposite of its name."""
    every = fields.integer("no_rope_layer_interval", 4, most=MAX_LAYERS)
    rotary = fields.items("no_rope_layers", n)
    if rotary is None:
        return [(i + 1) % every != 0 for i in range(n)]
    if not all(r in (0, 1) for r in rotary):
        raise fields.corrupt("no_rope_layers", "a list of 0 and 1")
    return [bool(r) for r in rotary]


def _windows(fields: Fields, name: str, rotary: list[bool]) -> list[int | None]:
    """The window of each layer, from `layer_types` or else the family's own pattern.

    transformers masks the keys at `query - window` and before: a window of W tokens counts the
    query's own, which is what `LayerConfig.window` means too.
    """
    f, n = FAMILIES[name], len(rotary)
    if f.windows == "none":
        fields.only("sliding_window")
    window = fields.integer_or_none("sliding_window", f.sliding_window, most=MAX_LEN)
    if f.windows == "switched" and not fields.flag("use_sliding_window", False):
        window = None
    types = fields.items("layer_types", n)
    default = _default_types(fields, name, window, rotary)
    if types is None:
        types = default
    for t in types:
        if not isinstance(t, str):
            raise fields.corrupt("layer_types", "a list of texts")
        if t not in LAYER_TYPES:
            raise UnsupportedModel(
                f"{fields.where}: {fields.prefix}layer_types names {t[:60]!r}, which is not"
                f" supported; supported: {', '.join(LAYER_TYPES)}"
            )
    types = [LAYER_TYPES[t] for t in types]
    if f.windows in ("none", "all") and types != default:
        # The reference does not look at the field here: it would run other maths than it says.
        raise fields.unsupported("layer_types", "not supported unless all layers are alike")
    if SLIDING in types and window is None:
        raise fields.corrupt("sliding_window", "a number of tokens, for the sliding layers")
    return [window if t == SLIDING else None for t in types]


def _default_types(fields: Fields, name: str, window: int | None, rotary: list[bool]) -> list[str]:
    n = len(rotary)
    if name in ("qwen2", "qwen3"):
        first = fields.integer("max_window_layers", 28, least=0, most=MAX_LAYERS)
        sliding = [window is not None and i >= first for i in range(n)]
    elif name == "smollm3":
        fields.ignore(["max_window_layers"])  # in the published file; the class has no such field
        sliding = [window is not None and not rotates for rotates in rotary]
    elif name == "gemma2":
        fields.only("sliding_window_size", window)  # early spelling, beside the one that counts
        sliding = [i % 2 == 0 for i in range(n)]
    elif name == "gemma3_text":
        key = "sliding_window_pattern"
        period = fields.integer(key if key in fields else f"_{key}", 6, most=MAX_LAYERS)
        fields.ignore([key, f"_{key}"])
        sliding = [(i + 1) % period != 0 for i in range(n)]
    else:
        sliding = [window is not None] * n
    return [SLIDING if s else FULL for s in sliding]


def _gemma(fields: Fields, config: ModelConfig) -> ModelConfig:
    fields.only("use_bidirectional_attention", False)
    fields.ignore(["hidden_act"])  # the class reads hidden_activation alone
    attention_softcap: float | None = None
    if config.family == "gemma2":
        attention_softcap = fields.number_or_none("attn_logit_softcapping", 50.0)
        logit_softcap = fields.number_or_none("final_logit_softcapping", 30.0)
    else:
        fields.only("attn_logit_softcapping")  # the class has it, but its attention drops it
        logit_softcap = fields.number_or_none("final_logit_softcapping")
    scalar = fields.number("query_pre_attn_scalar", 256, most=MAX_WIDTH)
    return dataclasses.replace(
        config,
        activation=fields.choice("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS),
        attention_scale=scalar**-0.5,
        embed_scale=math.sqrt(config.width),
        attention_softcap=attention_softcap,
        logit_softcap=logit_softcap,
    )


def _refuse_known(fields: Fields) -> None:
    """Fields of many files that are harmless with one value, and maths we lack with any other."""
    quantized = "a quantized checkpoint, not supported; take one in bfloat16 or float32"
    for name in ("quantization_config", "compression_config", "quantization"):
        fields.only(name, why=quantized)
    for name in ("is_encoder_decoder", "add_cross_attention", "rope_interleaved", "use_mrope"):
        fields.only(name, False)
    fields.only("pruned_heads", {})
