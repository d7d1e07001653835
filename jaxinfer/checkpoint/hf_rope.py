"""The rotary embedding that a config.json asks for, in the spelling of transformers 4 or 5.

transformers 4: `rope_theta`, and `rope_scaling` = null or {type | rope_type, factor, ...}.
transformers 5: `rope_parameters` = {rope_theta, rope_type, factor, ...}; Gemma 3 nests one such
object a layer type. Where both stand in a file, the more deeply nested value counts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxinfer.checkpoint.fields import MAX_LEN, Fields
from jaxinfer.config import Rope

Scaling = Literal["none", "linear", "llama3", "yarn"]
SCALINGS: dict[str, Scaling] = {
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
}
MAX_FACTOR = 1e6
MAX_THETA = 1e15


def rope_from_hf(
    config: Fields,
    *,
    head_dim: int,
    max_len: int,
    default_theta: float,
    phi3: bool = False,
) -> Rope:
    """The one rope of a model whose layers share it.

    Args:
      config: the fields of config.json.
      head_dim: H.
      max_len: `max_position_embeddings`, the original context where nothing else says it.
      default_theta: the family's base where the file names none.
      phi3: may rotate only the leading channels of a head, and takes no scaling (what it calls
        yarn or su is longrope).
    """
    old, new = config.table("rope_scaling"), config.table("rope_parameters")
    outer = {"rope_theta": config.get("rope_theta", default_theta)}
    outer["partial_rotary_factor"] = config.get("partial_rotary_factor", 1.0)
    values = outer | dict(new.values if new else {}) | dict(old.values if old else {})
    if "original_max_position_embeddings" in config:  # stands outside in Phi-3; counts over inside
        values["original_max_position_embeddings"] = config.get("original_max_position_embeddings")
    config.ignore(["original_max_position_embeddings"])
    name = "rope_scaling." if old else "rope_parameters." if new else ""
    fields = Fields(values, config.where, config.prefix + name)
    return _rope(fields, head_dim, max_len, phi3=phi3)


def gemma3_ropes_from_hf(config: Fields, *, head_dim: int, max_len: int) -> dict[str, Rope]:
    """Layer type -> rope: Gemma 3 gives its sliding layers a base of their own, never scaled."""
    outer = {"full_attention": config.get("rope_theta", 1e6)}
    outer["sliding_attention"] = config.get("rope_local_base_freq", 1e4)
    old, new = config.table("rope_scaling"), config.table("rope_parameters")
    ropes = {}
    for layer_type, theta in outer.items():
        nested = new.table(layer_type) if new else None
        values = {"rope_theta": theta} | dict(nested.values if nested else {})
        if old and layer_type == "full_attention":
            values |= old.values
        name = "rope_scaling." if old else f"rope_parameters.{layer_type}." if nested else ""
        fields = Fields(values, config.where, config.prefix + name)
        ropes[layer_type] = _rope(fields, head_dim, max_len)
    if new:
        new.refuse_rest()  # flat parameters: transformers would not see them here
    return ropes


def context(max_len: int, rope: Rope | None) -> int:
    """Tokens that the model can read: yarn is switched on by stretching an unchanged `max_len`."""
    if rope is None or rope.scaling != "yarn":
        return max_len
    return max(max_len, min(int(rope.original_max_len * rope.factor), MAX_LEN))


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """What yarn multiplies cos and sin by, where the file does not say (arXiv 2309.00071, 3.4)."""

    def gain(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return gain(mscale) / gain(mscale_all_dim)
    return gain(1.0)


def _rope(fields: Fields, head_dim: int, max_len: int, *, phi3: bool = False) -> Rope:
    """One rope from one flat object that holds everything about it."""
    key = "rope_type" if "rope_type" in fields else "type"
    fields.ignore(["rope_type", "type", "finetuned"])
    scaling = fields.choice(key, "default", {"default": SCALINGS["default"]} if phi3 else SCALINGS)
    theta = fields.number("rope_theta", least=2.0, most=MAX_THETA)
    share = fields.number("partial_rotary_factor", 1.0, most=1.0)
    if share != 1 and not phi3:
        raise fields.unsupported("partial_rotary_factor", "not supported for this family")
    dim = int(head_dim * share)
    if dim % 2 or not dim:
        raise fields.corrupt(
            "partial_rotary_factor", f"an even part of a head's {head_dim} channels"
        )
    # Where nothing is scaled the original context has no part in the maths; Phi-3 writes it anyway.
    original = fields.integer("original_max_position_embeddings", max_len, most=MAX_LEN)
    rope = Rope(theta=theta, dim=dim, scaling=scaling)
    if scaling == "linear":
        rope = dataclasses.replace(rope, factor=fields.number("factor", most=MAX_FACTOR))
    elif scaling == "llama3":
        rope = _llama3(fields, rope, original)
    elif scaling == "yarn":
        rope = _yarn(fields, rope, original, max_len)
    fields.refuse_rest()
    return rope


def _llama3(fields: Fields, rope: Rope, original: int) -> Rope:
    low = fields.number("low_freq_factor", most=MAX_FACTOR)
    high = fields.number("high_freq_factor", most=MAX_FACTOR)
    if high <= low:
        raise fields.corrupt("high_freq_factor", f"more than low_freq_factor, {low:g}")
    return dataclasses.replace(
        rope,
        factor=fields.number("factor", most=MAX_FACTOR),
        original_max_len=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(fields: Fields, rope: Rope, original: int, max_len: int) -> Rope:
    factor = fields.number_or_none("factor", most=MAX_FACTOR) or max_len / original
    mscale = fields.number_or_none("mscale", most=MAX_FACTOR)
    mscale_all_dim = fields.number_or_none("mscale_all_dim", most=MAX_FACTOR)
    gain = fields.number_or_none("attention_factor", most=MAX_FACTOR)
    fast = fields.number_or_none("beta_fast", most=MAX_FACTOR) or 32.0
    slow = fields.number_or_none("beta_slow", most=MAX_FACTOR) or 1.0
    if fast <= slow:
        raise fields.corrupt("beta_fast", f"more than beta_slow, {slow:g}")
    return dataclasses.replace(
        rope,
        factor=factor,
        original_max_len=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=fields.flag("truncate", True),
        attention_factor=gain or yarn_attention_factor(factor, mscale, mscale_all_dim),
    )
