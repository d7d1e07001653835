"""The definition of `cached_attention` in plain jax.numpy, and its backend "xla"."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def cached_attention_reference(
    q: jax.Array,  # [B,T,N,H]
    k: jax.Array | None,  # [B,T,K,H]
    v: jax.Array | None,  # [B,T,K,H]
    k_cache: jax.Array,  # [B,K,S,H], or [P,K,page,H]
    v_cache: jax.Array,
    start: jax.Array,  # [B] int32
    num_new: jax.Array,  # [B] int32
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    k_scale: jax.Array | None = None,  # [B,K,S] float32, or [P,K,page]
    v_scale: jax.Array | None = None,
    block_table: jax.Array | None = None,  # [B,M] int32
    ancestors: jax.Array | None = None,  # [T,T] bool
) -> jax.Array:  # [B,T,N,H]
    """See `cached_attention`; scores and softmax are computed in float32."""
    k_cache = _dense(k_cache, k_scale, block_table, q.dtype)
    v_cache = _dense(v_cache, v_scale, block_table, q.dtype)
    batch, tokens, num_heads, head_dim = q.shape
    num_kv, slots = k_cache.shape[1], k_cache.shape[2]
    exact: dict[str, Any] = {"preferred_element_type": jnp.float32}
    if q.dtype == jnp.float32:
        exact["precision"] = jax.lax.Precision.HIGHEST

    grouped = q.reshape(batch, tokens, num_kv, num_heads // num_kv, head_dim)
    query = start[:, None] + jnp.arange(tokens)  # [B,T] absolute positions, of the new keys too
    # Slot s holds the latest position p < end with p mod S == s; below 0 there is none yet.
    end = (start if k is not None else start + num_new)[:, None]
    key = end - 1 - (end - 1 - jnp.arange(slots)) % slots  # [B,S]
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, k_cache, **exact)
    if k is not None:
        new = jnp.einsum("btkgh,bukh->bkgtu", grouped, k, **exact)
        scores = jnp.concatenate([scores, new], axis=-1)  # [B,K,G,T,S+T]
        key = jnp.concatenate([key, query], axis=1)
    scores *= scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)

    if ancestors is None:
        visible = _chain(query, key, window)
    else:
        visible = _tree(ancestors, start, key, window)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)

    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    if k is None:  # a query behind num_new may see nothing at all
        weights = jnp.where(visible[:, None, None], weights, 0)
    # Rows and heads as one axis: XLA:CPU (jaxlib 0.10) refuses this product of bfloat16 with two
    # batch axes where it writes the result transposed.
    flat = jnp.einsum(
        "nxs,nsh->nxh",
        weights[..., :slots].reshape(batch * num_kv, -1, slots),
        v_cache.reshape(batch * num_kv, slots, head_dim),
        **exact,
    )
    out = jnp.moveaxis(flat.reshape(batch, num_kv, -1, tokens, head_dim), 3, 1)  # [B,T,K,G,H]
    if v is not None:
        out += jnp.einsum("bkgtu,bukh->btkgh", weights[..., slots:], v, **exact)
    return out.reshape(q.shape).astype(q.dtype)


def _chain(query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """[B,T,S] bool: position query[b,t] sees key[b,s]."""
    query, key = query[:, :, None], key[:, None]
    visible = (key >= 0) & (key <= query)
    return visible if window is None else visible & (key > query - window)


def _tree(ancestors: jax.Array, start: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """[B,T,S] bool: what new token t sees, by its ancestors; a window counts along the branch."""
    depth = jnp.sum(ancestors, axis=1) - 1  # [T]
    new = key - start[:, None]  # [B,S], which new token
    among = ancestors[:, jnp.clip(new, 0, len(ancestors) - 1)]  # [T,B,S]
    place = jnp.where(new < 0, key, start[:, None] + depth[jnp.clip(new, 0)])  # [B,S]
    query = start[:, None] + depth  # [B,T]
    seen = (new < 0)[:, None] | jnp.moveaxis(among, 0, 1)  # [B,T,S]
    return seen & _chain(query, place, window)


def _dense(
    cache: jax.Array, scale: jax.Array | None, table: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """[B,K,S,H] in `dtype` of a cache that may lie in pages and may be int8."""
    if scale is not None:
        cache = (cache * scale[..., None]).astype(dtype)
    if table is None:
        return cache
    pages = jnp.moveaxis(cache[table], 2, 1)  # [B,K,M,page,H]
    return pages.reshape(*pages.shape[:2], -1, pages.shape[-1])
