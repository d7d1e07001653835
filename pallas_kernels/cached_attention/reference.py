"""The definition of `cached_attention` in plain jax.numpy: what every kernel is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cached_attention_reference(
    q: jax.Array,  # [B,T,N,H]
    k: jax.Array,  # [B,K,S,H]
    v: jax.Array,  # [B,K,S,H]
    start: jax.Array,  # [B] int32
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> jax.Array:  # [B,T,N,H]
    """See `cached_attention`; scores and softmax are computed in float32."""
    batch, num_new, num_heads, head_dim = q.shape
    num_kv, slots = k.shape[1], k.shape[2]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    grouped = q.reshape(batch, num_new, num_kv, num_heads // num_kv, head_dim)
    scores = jnp.einsum(
        "btkgh,bksh->bkgts", grouped, k, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)

    query = start[:, None, None] + jnp.arange(num_new)[:, None]  # [B,T,1] absolute position
    slot = jnp.arange(slots)
    visible = slot <= query  # [B,T,S]; a token sees itself, so no row is ever fully masked
    if window is not None:
        visible &= slot > query - window
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)

    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum(
        "bkgts,bksh->btkgh", weights, v, precision=precision, preferred_element_type=jnp.float32
    )
    return out.reshape(q.shape).astype(q.dtype)
