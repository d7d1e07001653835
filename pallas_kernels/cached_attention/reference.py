"""The definition of `cached_attention` in plain jax.numpy: what every kernel is compared with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def cached_attention_reference(
    q: jax.Array,  # [B,T,N,H]
    k: jax.Array | None,  # [B,T,K,H]
    v: jax.Array | None,  # [B,T,K,H]
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
    query = start[:, None] + jnp.arange(num_new)  # [B,T] absolute positions, of the new keys too
    # Slot s holds the latest position p < end with p mod S == s; below 0 there is none yet.
    end = start[:, None] if k is not None else start[:, None] + num_new
    key = end - 1 - (end - 1 - jnp.arange(slots)) % slots  # [B,S]
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, k_cache, **exact)
    if k is not None:
        new = jnp.einsum("btkgh,bukh->bkgtu", grouped, k, **exact)
        scores = jnp.concatenate([scores, new], axis=-1)  # [B,K,G,T,S+T]
        key = jnp.concatenate([key, query], axis=1)
    scores *= scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)

    key = key[:, None]  # [B,1,S(+T)]; a query sees its own key at least: never nothing
    visible = (key >= 0) & (key <= query[:, :, None])
    if window is not None:
        visible &= key > query[:, :, None] - window
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)

    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    # Rows and heads as one axis: XLA:CPU (jaxlib 0.10) refuses this product of bfloat16 with two
    # batch axes where it writes the result transposed.
    flat = jnp.einsum(
        "nxs,nsh->nxh",
        weights[..., :slots].reshape(batch * num_kv, -1, slots),
        v_cache.reshape(batch * num_kv, slots, head_dim),
        **exact,
    )
    out = jnp.moveaxis(flat.reshape(batch, num_kv, -1, num_new, head_dim), 3, 1)  # [B,T,K,G,H]
    if v is not None:
        out += jnp.einsum("bkgtu,bukh->btkgh", weights[..., slots:], v, **exact)
    return out.reshape(q.shape).astype(q.dtype)
