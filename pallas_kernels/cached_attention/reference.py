"""The definition of `cached_attention` in plain jax.numpy, and its backend "xla"."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.digits import split
from pallas_kernels.whole_dot import whole_dot


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
    whole: bool = False,
) -> jax.Array:  # [B,T,N,H]
    """See `cached_attention`; scores and softmax are computed in float32."""
    k_cache, k_scale = _dense(k_cache, k_scale, block_table, None if whole else q.dtype)
    v_cache, v_scale = _dense(v_cache, v_scale, block_table, None if whole else q.dtype)
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
    if k_scale is None:
        scores = jnp.einsum("btkgh,bksh->bkgts", grouped, k_cache, **exact)
    else:
        rows = jnp.moveaxis(grouped, 1, 3)  # [B,K,G,T,H]
        scores = _scores(rows, k_cache) * k_scale[:, :, None, None]
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

    weights = jax.nn.softmax(scores, axis=-1)
    weights = weights if whole else weights.astype(q.dtype)
    if k is None:  # a query behind num_new may see nothing at all
        weights = jnp.where(visible[:, None, None], weights, 0)
    held = weights[..., :slots]
    if v_scale is not None:
        flat = _values(held * v_scale[:, :, None, None], v_cache)
    else:
        # Rows and heads as one axis: XLA:CPU (jaxlib 0.10) refuses this product of bfloat16 with
        # two batch axes where it writes the result transposed.
        flat = jnp.einsum(
            "nxs,nsh->nxh",
            held.reshape(batch * num_kv, -1, slots),
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
    cache: jax.Array, scale: jax.Array | None, table: jax.Array | None, dtype: jnp.dtype | None
) -> tuple[jax.Array, jax.Array | None]:
    """[B,K,S,H] of a cache that may lie in pages, in `dtype` where it is int8; None: left as int8,
    with its scales [B,K,S]."""
    if scale is not None and dtype is not None:
        cache, scale = (cache * scale[..., None]).astype(dtype), None
    if table is not None:
        cache = _rows(cache, table)
        scale = None if scale is None else _rows(scale, table)
    return cache, scale


def _rows(pages: jax.Array, table: jax.Array) -> jax.Array:
    """[B,K,S,...] of pages [P,K,page,...]."""
    found = jnp.moveaxis(pages[table], 2, 1)  # [B,K,M,page,...]
    return found.reshape(*found.shape[:2], -1, *found.shape[4:])


def _scores(q: jax.Array, codes: jax.Array) -> jax.Array:
    """q [B,K,G,T,H] times int8 keys [B,K,S,H]: [B,K,G,T,S] f32."""
    heads = math.prod(q.shape[:2])
    rows, keys = q.reshape(heads, -1, q.shape[-1]), codes.reshape(heads, *codes.shape[2:])
    return _whole(rows, keys, 2).reshape(*q.shape[:-1], -1)


def _values(weights: jax.Array, codes: jax.Array) -> jax.Array:
    """weights [B,K,G,T,S] times int8 values [B,K,S,H]: [B,K,G,T,H] f32."""
    slots, width = codes.shape[2:]
    # A long sum in pieces: XLA:CPU takes 4,096 slots in a third of the time, 256 by 256.
    piece = next((n for n in (256, 128) if slots % n == 0), slots)
    rows = weights.reshape(math.prod(weights.shape[:2]), -1, slots // piece, piece)
    y = _whole(
        jnp.moveaxis(rows, 2, 1).reshape(-1, rows.shape[1], piece),
        codes.reshape(-1, piece, width),
        1,
    )
    y = jnp.sum(y.reshape(len(rows), -1, *y.shape[1:]), axis=1)
    return y.reshape(*weights.shape[:-1], width)


def _whole(x: jax.Array, codes: jax.Array, axis: int) -> jax.Array:
    """x [n,R,i] times int8 numbers [n,...] along this axis of theirs, by products of whole numbers:
    [n,R,o] f32."""
    first, second, unit = split(x.astype(jnp.float32), -1)
    both = jnp.concatenate([first, second], axis=1)  # rows of one product
    sums = whole_dot(both, codes, (((2,), (axis,)), ((0,), (0,))))
    high, low = jnp.split(sums.astype(jnp.float32), 2, axis=1)
    return (high + low / 254) * unit
