"""Quantized weights: an array type, and the products that hide it from the model.

A weight is a plain array or a `Quantized`; `project`, `lookup` and `scores` take either, so no
layer asks which it has. int8 by channel: w = values * scale, rounded to nearest, one scale an
output (arXiv 2208.07339 calls it row-wise absmax).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

Recipe = Literal["int8"]
Dims = tuple[tuple[int, ...], tuple[int, ...]]  # contracted axes of either side


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight in eight bits."""

    values: jax.Array  # the weight's own shape, int8
    scale: jax.Array  # f32, the weight's shape without the axes that a product sums over
    dtype: Any = dataclasses.field(metadata={"static": True})  # that it stands for

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape


Weight: TypeAlias = jax.Array | Quantized


def quantize(w: jax.Array, inputs: tuple[int, ...]) -> Quantized:
    """`w` in int8, with a scale for each of its outputs: what is not among the axes `inputs`."""
    x = w.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=inputs, keepdims=True)
    scale = jnp.where(most > 0, most / 127, 1)
    values = jnp.round(x / scale).astype(jnp.int8)
    return Quantized(values, jnp.squeeze(scale, inputs), w.dtype)


def project(x: jax.Array, w: Weight, num_in: int = 1) -> jax.Array:
    """x [B,T,*in] times w [*in,*out] -> [B,T,*out] float32."""
    dims = tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))
    if isinstance(w, Quantized):
        return _dot(x, w.values.astype(x.dtype), dims) * w.scale
    return _dot(x, w, dims)


def lookup(table: Weight, tokens: jax.Array) -> jax.Array:
    """Rows [*tokens,D] of a table [V,D]."""
    if isinstance(table, Quantized):
        rows = table.values[tokens] * table.scale[tokens][..., None]
        return rows.astype(table.dtype)
    return table[tokens]


def scores(table: Weight, x: jax.Array) -> jax.Array:
    """Product [B,T,V] float32 of every row of a table [V,D] with x [B,T,D]."""
    # Weight first: eight rows take XLA:CPU a fifth less time than the other way round.
    dims = (1,), (2,)
    if isinstance(table, Quantized):
        y = _dot(table.values.astype(x.dtype), x, dims) * table.scale[:, None, None]
    else:
        y = _dot(table, x, dims)
    return jnp.moveaxis(y, 0, -1)


def _dot(a: jax.Array, b: jax.Array, contract: Dims) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
