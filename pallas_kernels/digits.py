"""Floats as pairs of int8 numbers: products of whole numbers are what XLA:CPU is fast with."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def split(x: jax.Array, axes: int | tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x f32 as (a + b / 254) * unit, with a and b int8 and one unit, kept, for all along `axes`.

    Both digits hold x to 1/64,516 of the largest along the axes, a alone to 1/254. A product of
    either with int8 numbers is exact as long as int32 holds the sum. Where x holds a NaN or an
    infinity, the unit is one too.
    """
    unit = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / 127
    unit = jnp.where(unit == 0, 1, unit)
    x = x / unit
    first = jnp.round(x)
    return first.astype(jnp.int8), jnp.round((x - first) * 254).astype(jnp.int8), unit
