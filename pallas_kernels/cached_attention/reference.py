"""The definition of `cached_attention` in plain jax.numpy: what every kernel is compared with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def cached_attention_reference(
    q: jax.Array,  # [B,T,N,H]
    k: jax.Array,  # [B,T,K,H]
    v: jax.Array,  # [B,T,K,H]
    k_cache: jax.Array,  # [B,K,S,H]
    v_cache: jax.Array,  # [B,K,S,H]
    start: jax.Array,  # [B] int32
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> jax.Array:  # [B,T,N,H]
    """See `cached_attention`; scores and softmax are computed in float32."""
    batch, num_new, num_heads, head_dim = q.shape
    num_kv, slots = k_cache.shape[1], k_cache.shape[2]
    exact: dict[str, Any] = {"preferred_element_type": jnp.float32}
    if q.dtype == jnp.float32:
        exact["precision"] = jax.lax.Precision.HIGHEST

    grouped = q.reshape(batch, num_new, num_kv, num_heads // num_kv, head_dim)
    old = jnp.einsum("btkgh,bksh->bkgts", grouped, k_cache, **exact)
    new = jnp.einsum("btkgh,bukh->bkgtu", grouped, k, **exact)
    scores = jnp.concatenate([old, new], axis=-1) * scale  # [B,K,G,T,S+T]
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)

    t = jnp.arange(num_new)
    query = start[:, None] + t  # [B,T] absolute positions of the queries, and of the new keys
    slot = jnp.broadcast_to(jnp.arange(slots), (batch, slots))
    key = jnp.concatenate([slot, query], axis=1)[:, None]  # [B,1,S+T]
    held = jnp.concatenate([slot < start[:, None], jnp.ones_like(query, bool)], axis=1)[:, None]
    # A query sees what the cache holds and the new keys up to its own: never nothing.
    visible = held & (key <= query[:, :, None])  # [B,T,S+T]
    if window is not None:
        visible &= key > query[:, :, None] - window
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)

    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bksh->btkgh", weights[..., :slots], v_cache, **exact)
    out += jnp.einsum("bkgtu,bukh->btkgh", weights[..., slots:], v, **exact)
    return out.reshape(q.shape).astype(q.dtype)
