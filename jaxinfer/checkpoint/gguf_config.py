"""GGUF metadata and tensor shapes, as llama.cpp understands them, translated into `ModelConfig`.

Keys are `{arch}.name`; what llama.cpp knows of a family without a key (SmolLM3's layers without
rotary, Gemma 3's local base) stands here as well. Like config.json, every `{arch}.` key is read, or
known not to change the maths, or refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxinfer.checkpoint.fields import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_LEN,
    MAX_VOCAB,
    MAX_WIDTH,
    REQUIRED,
    Fields,
)
from jaxinfer.checkpoint.hf_rope import MAX_FACTOR, MAX_THETA, context, yarn_attention_factor
from jaxinfer.config import LayerConfig, ModelConfig, Rope
from jaxinfer.errors import CorruptFile, InvalidArgument

# Labels, and what the tensors say better; llama.cpp computes the same whatever they hold.
HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_used_count")
FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class Family:
    """How a GGUF architecture differs from llama."""

    window: int | None = None  # where the file gives none
    windows: Literal["none", "all", "alternating", "five to one"] = "none"
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    gemma: bool = False
    wide_layers: int = 0  # a Gemma of this many layers (27B) scales attention by (D / N)**-0.5


FAMILIES = {
    "llama": Family(windows="all"),  # Mistral too, whose window is in all layers
    "qwen2": Family(),
    "qwen3": Family(qk_norm="head"),
    "gemma2": Family(
        window=4096, windows="alternating", post_norm=True, gemma=True, wide_layers=46
    ),
    "gemma3": Family(
        windows="five to one", post_norm=True, qk_norm="head", gemma=True, wide_layers=62
    ),
    "phi3": Family(windows="all"),
    "olmo2": Family(pre_norm=False, post_norm=True, qk_norm="full"),
    "smollm3": Family(),
}


def config_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    where: str,
    rope_factors: Sequence[float] | None = None,
) -> ModelConfig:
    """Translate a GGUF file's metadata.

    Args:
      metadata: key -> Python value, or numpy array.
      shapes: tensor name -> shape, outermost dimension first: a projection is (out, in).
      where: the file, for messages.
      rope_factors: the values of the tensor rope_freqs.weight, where `shapes` has it.

    Raises:
      UnsupportedModel: an architecture, or a key that may change the maths, that we do not have.
      CorruptFile: a key of the wrong type or out of range, or keys and tensors that disagree.
    """
    general = Fields(metadata, where)
    arch = general.choice("general.architecture", REQUIRED, {name: name for name in FAMILIES})
    general.only("general.type", "model")
    prefix = f"{arch}."
    own = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    fields = Fields(own, where, prefix)
    f = FAMILIES[arch]
    width = fields.integer("embedding_length", most=MAX_WIDTH)
    heads, kv_heads, head_dim = _heads(fields, width)
    max_len = fields.integer("context_length", most=MAX_LEN)
    n = fields.integer("block_count", most=MAX_LAYERS)
    partial = arch == "phi3"
    rope = _rope(fields, head_dim, max_len, shapes, rope_factors, partial=partial)
    layers = _layers(fields, arch, n, rope)
    scale_width = width // heads if n == f.wide_layers else head_dim
    config = ModelConfig(
        family=arch,
        vocab_size=_vocab_size(shapes, width, where),
        width=width,
        hidden=fields.integer("feed_forward_length", most=MAX_WIDTH),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layers=layers,
        max_len=max(context(max_len, layer.rope) for layer in layers),
        norm_eps=_shortest(fields.number("attention.layer_norm_rms_epsilon", most=1.0)),
        pre_norm=f.pre_norm,
        post_norm=f.post_norm,
        qk_norm=f.qk_norm,
        qkv_bias="blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        activation="gelu_tanh" if f.gemma else "silu",
        attention_scale=scale_width**-0.5,
        attention_softcap=_softcap(fields, "attn_logit_softcapping", 50.0, arch == "gemma2"),
        logit_softcap=_softcap(
            fields, "final_logit_softcapping", 30.0 if arch == "gemma2" else None, f.gemma
        ),
        embed_scale=math.sqrt(width) if f.gemma else 1.0,
        tied="output.weight" not in shapes,
    )
    for name in ("expert_count", "pooling_type", "attention.layer_norm_epsilon"):
        fields.only(name, 0)
    fields.only("attention.causal", True)
    fields.only("use_parallel_residual", False)
    fields.ignore(HARMLESS)
    if arch == "gemma3":  # a text never reaches these
        fields.ignore(key for key in own if key.startswith(("vision.", "mm.")))
    fields.refuse_rest()
    return config


def _heads(fields: Fields, width: int) -> tuple[int, int, int]:
    """N, K, H."""
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(fields.get(name), (list, np.ndarray)):
            raise fields.unsupported(name, "not supported: it differs from layer to layer")
    heads = fields.integer("attention.head_count", most=MAX_HEADS)
    kv_heads = fields.integer("attention.head_count_kv", heads, most=MAX_HEADS)
    if heads % kv_heads:
        raise fields.corrupt("attention.head_count_kv", f"a divisor of head_count, {heads}")
    head_dim = fields.integer_or_none("attention.key_length", most=MAX_WIDTH)
    if head_dim is None:
        if width % heads:
            raise fields.corrupt("embedding_length", f"a multiple of head_count, {heads}")
        head_dim = width // heads
    if head_dim % 2:
        raise fields.corrupt("attention.key_length", f"an even width, not {head_dim}")
    if fields.integer("attention.value_length", head_dim, most=MAX_WIDTH) != head_dim:
        raise fields.unsupported("attention.value_length", "not supported unless as key_length")
    return heads, kv_heads, head_dim


def _vocab_size(shapes: Mapping[str, tuple[int, ...]], width: int, where: str) -> int:
    shape = shapes.get("token_embd.weight")
    if shape is None:
        raise CorruptFile(f"{where}: tensor token_embd.weight is missing")
    if len(shape) != 2 or shape[1] != width or not 0 < shape[0] <= MAX_VOCAB:
        raise CorruptFile(
            f"{where}: tensor token_embd.weight has shape {shape}; expected (vocabulary, {width})"
        )
    return shape[0]


def _softcap(fields: Fields, name: str, default: float | None, known: bool) -> float | None:
    if known:
        cap = fields.number_or_none(name, default)
        return None if cap is None else _shortest(cap)
    fields.only(name)
    return None


def _layers(fields: Fields, arch: str, n: int, rope: Rope) -> tuple[LayerConfig, ...]:
    """Windows and ropes. llama.cpp masks keys `window` or more behind: W tokens with the own."""
    f = FAMILIES[arch]
    # 0 says no window, and so does phi3's converter.
    window = fields.integer_or_none("attention.sliding_window", f.window, least=0, most=MAX_LEN)
    if f.windows == "none" and window:
        raise fields.unsupported("attention.sliding_window", "not supported for this architecture")
    local = rope
    if arch == "gemma3":
        theta = fields.number("rope.freq_base_swa", 1e4, least=2.0, most=MAX_THETA)
        local = Rope(theta=theta, dim=rope.dim)
    sliding = _sliding(fields, f, n) if window else [False] * n
    fields.ignore(["attention.sliding_window_pattern"])
    layers = [LayerConfig(window, local) if s else LayerConfig(None, rope) for s in sliding]
    if arch == "smollm3":  # every fourth layer goes without, and no key says so
        layers = [
            LayerConfig(x.window, x.rope if i % 4 != 3 else None) for i, x in enumerate(layers)
        ]
    return tuple(layers)


def _sliding(fields: Fields, f: Family, n: int) -> list[bool]:
    """Which layers have the window: a key says so by layer, or gives the period, or no key does."""
    name = "attention.sliding_window_pattern"
    given = fields.get(name)
    if isinstance(given, (list, np.ndarray)):
        if len(given) != n or not all(isinstance(g, (bool, np.bool_)) for g in given):
            raise fields.corrupt(name, f"{n} booleans, one a layer")
        return [bool(g) for g in given]
    if f.windows == "all":
        fields.only(name)
        return [True] * n
    period = fields.integer(name, 2 if f.windows == "alternating" else 6, most=MAX_LAYERS)
    return [i % period < period - 1 for i in range(n)]


def _rope(
    fields: Fields,
    head_dim: int,
    max_len: int,
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Sequence[float] | None,
    *,
    partial: bool,
) -> Rope:
    dim = fields.integer("rope.dimension_count", head_dim, least=2, most=head_dim)
    if dim % 2:
        raise fields.corrupt("rope.dimension_count", "an even number")
    if dim != head_dim and not partial:
        raise fields.unsupported("rope.dimension_count", f"not supported unless {head_dim}")
    theta = fields.number("rope.freq_base", 1e4, least=2.0, most=MAX_THETA)
    kinds: dict[str, Literal["none", "linear", "yarn"]] = {k: k for k in ("none", "linear", "yarn")}
    scaling = fields.choice("rope.scaling.type", "linear", kinds)  # linear by 1 is none
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if name in shapes:
            raise fields.unsupported("rope.scaling.type", f"longrope by tensor {name}, unsupported")
    stretch = fields.number_or_none("rope.scaling.factor", most=MAX_FACTOR)
    old_stretch = fields.number_or_none("rope.scale_linear", most=MAX_FACTOR)
    factor = _shortest(stretch or old_stretch or 1.0)
    original = fields.integer("rope.scaling.original_context_length", max_len, most=MAX_LEN)
    rope = Rope(theta=_shortest(theta), dim=dim)
    if scaling == "yarn":
        rope = _yarn(fields, rope, factor, original)
    elif scaling == "linear" and factor != 1:
        rope = dataclasses.replace(rope, scaling="linear", factor=factor)
    fields.only("rope.scaling.attn_factor", 1.0)
    fields.only("rope.scaling.alpha", 0.0)
    if FACTORS not in shapes:
        return rope
    if rope.scaling != "none":
        raise fields.unsupported("rope.scaling.type", f"not supported together with {FACTORS}")
    return dataclasses.replace(
        rope, scaling="factors", factors=_factors(fields.where, shapes, dim, rope_factors)
    )


def _factors(
    where: str, shapes: Mapping[str, tuple[int, ...]], dim: int, values: Sequence[float] | None
) -> tuple[float, ...]:
    """What Llama 3.1's scaling becomes in a GGUF file: a divisor for each frequency."""
    if values is None:
        raise InvalidArgument(f"{where}: rope_factors must hold the values of tensor {FACTORS}")
    factors = tuple(float(v) for v in values)
    if shapes[FACTORS] != (dim // 2,) or len(factors) != dim // 2:
        raise CorruptFile(
            f"{where}: tensor {FACTORS} has not {dim // 2} values, half of the channels"
        )
    if not all(0 < v < MAX_FACTOR for v in factors):  # false for NaN too
        raise CorruptFile(f"{where}: tensor {FACTORS} holds a value that is no positive number")
    return factors


def _yarn(fields: Fields, rope: Rope, factor: float, original: int) -> Rope:
    """llama.cpp's gain times its own correction comes to transformers' attention factor."""
    fields.only("rope.scaling.yarn_ext_factor", -1.0, 1.0)  # -1: not set
    most = MAX_FACTOR
    gain = fields.number_or_none("rope.scaling.yarn_attn_factor", most=most)
    log = fields.number_or_none("rope.scaling.yarn_log_multiplier", most=most)
    fast = fields.number("rope.scaling.yarn_beta_fast", 32.0, most=most)
    slow = fields.number("rope.scaling.yarn_beta_slow", 1.0, most=most)
    if fast <= slow:
        raise fields.corrupt("rope.scaling.yarn_beta_fast", f"more than yarn_beta_slow, {slow:g}")
    return dataclasses.replace(
        rope,
        scaling="yarn",
        factor=factor,
        original_max_len=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=_shortest(gain) if gain else yarn_attention_factor(factor, 1.0, log),
    )


def _shortest(x: float) -> float:
    """The decimal that a float32 was written from: 1e-06 rather than 9.999999974752427e-07."""
    return float(str(np.float32(x)))
