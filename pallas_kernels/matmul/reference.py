"""The definition of `matmul` in plain jax.numpy, and its backend "xla"."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def matmul_reference(
    x: jax.Array,  # [M,I]
    w: jax.Array,  # [I,O] int8, or [I/2,O] uint8
    scale: jax.Array,  # [I/g,O] float32
    zero: jax.Array | None = None,  # [I/g,O] float32
) -> jax.Array:  # [M,O]
    """See `matmul`; the weights are widened first."""
    weights = _dequantize(w, scale, zero).astype(x.dtype)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.dot(x, weights, precision=exact, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _dequantize(w: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """[I,O] float32."""
    if w.dtype == jnp.uint8:
        pairs = jnp.stack([w << 4, w], axis=1).view(jnp.int8) >> 4  # [I/2,2,O], signs kept
        w = pairs.reshape(-1, w.shape[1])
    grouped = w.astype(jnp.float32).reshape(len(scale), -1, w.shape[1])
    if zero is not None:
        grouped -= zero[:, None]
    return (grouped * scale[:, None]).reshape(w.shape)
