"""`ModelConfig` out of the JSON that `dataclasses.asdict` wrote, every field checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from jaxinfer.checkpoint.fields import MAX_LAYERS, MAX_LEN, MAX_WIDTH, Fields
from jaxinfer.config import LayerConfig, ModelConfig, Rope
from jaxinfer.errors import CorruptFile

SIZES = {  # fields that count something are at least 1
    *("vocab_size", "width", "hidden", "num_heads", "num_kv_heads", "head_dim", "max_len"),
    *("dim", "window"),
}


def from_fields(fields: Fields | None, where: str) -> ModelConfig:
    """Raises CorruptFile for a missing, mistyped or impossible field."""
    if fields is None:
        raise CorruptFile(f"{where}: config is missing")
    fields.only("checkpoint_heads", None, why="not what a checkpoint holds")
    config = _build(ModelConfig, fields)
    if config.num_heads % config.num_kv_heads:
        raise fields.corrupt("num_kv_heads", f"a divisor of num_heads = {config.num_heads}")
    if config.attention_scale <= 0:
        raise fields.corrupt("attention_scale", "a number above 0")
    for layer in config.layers:
        _check_rope(layer.rope, config.head_dim, fields)
    return config


def _check_rope(rope: Rope | None, head_dim: int, fields: Fields) -> None:
    if rope is None:
        return
    if rope.dim > head_dim or rope.dim % 2:
        raise fields.corrupt("layers", f"rope.dim even and at most head_dim = {head_dim}")
    if rope.scaling == "factors" and len(rope.factors) != rope.dim // 2:
        raise fields.corrupt("layers", f"rope.factors of length {rope.dim // 2}")
    stretched = rope.scaling in ("llama3", "yarn")
    if rope.theta <= 1 or rope.factor <= 0 or (stretched and rope.original_max_len < 1):
        raise fields.corrupt("layers", "rope.theta above 1, rope.factor above 0 and their context")
    if rope.scaling == "llama3" and rope.high_freq_factor == rope.low_freq_factor:
        raise fields.corrupt("layers", "rope.high_freq_factor above rope.low_freq_factor")
    if rope.scaling == "yarn" and not 0 < rope.beta_slow <= rope.beta_fast:
        raise fields.corrupt("layers", "0 < rope.beta_slow <= rope.beta_fast")


def _build(kind: Any, fields: Fields) -> Any:
    hints = typing.get_type_hints(kind)
    values = {f.name: _value(fields, f.name, hints[f.name]) for f in dataclasses.fields(kind)}
    fields.refuse_rest()
    return kind(**values)


def _value(fields: Fields, name: str, hint: Any) -> Any:
    """The field as its type annotation in config.py says."""
    if typing.get_origin(hint) is types.UnionType:  # X | None
        if fields.get(name) is None:
            return None
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        return fields.choice(name, None, {word: word for word in typing.get_args(hint)})
    if hint is bool:
        return fields.flag(name, None)  # type: ignore[arg-type]
    if hint is int:
        most = MAX_LEN if name in ("max_len", "window", "original_max_len") else MAX_WIDTH * 16
        return fields.integer(name, least=1 if name in SIZES else 0, most=most)
    if hint is float:
        value = fields.get(name)
        if value == 0 and not isinstance(value, bool):
            return 0.0
        return fields.number(name)
    if hint is str:
        value = fields.get(name)
        if not isinstance(value, str):
            raise fields.corrupt(name, "a text")
        return value
    if hint is Rope:
        return _build(Rope, Fields(fields.get(name), fields.where, f"{fields.prefix}{name}."))
    items = fields.get(name)
    if not isinstance(items, list) or len(items) > MAX_WIDTH:
        raise fields.corrupt(name, "a list")
    if typing.get_args(hint)[0] is LayerConfig:
        if not 1 <= len(items) <= MAX_LAYERS:
            raise fields.corrupt(name, f"a list of 1 to {MAX_LAYERS} layers")
        return tuple(
            _build(LayerConfig, Fields(item, fields.where, f"{fields.prefix}{name}[{i}]."))
            for i, item in enumerate(items)
        )
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and x > 0 for x in items):
        raise fields.corrupt(name, "a list of numbers above 0")
    return tuple(float(x) for x in items)
