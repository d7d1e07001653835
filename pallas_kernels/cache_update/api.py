"""Public entry of `cache_update`: checks its arguments and picks a backend."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.cache_update.reference import cache_update_reference
from pallas_kernels.dispatch import Impl, UnsupportedError

Arrays = tuple[jax.Array, ...]


def cache_update(
    caches: Sequence[jax.Array],
    new: Sequence[jax.Array],
    start: jax.Array,
    num_new: jax.Array,
    *,
    block_table: jax.Array | None = None,
    impl: Impl = "auto",
) -> Arrays:
    """Write the tokens start[b] .. start[b] + num_new[b] - 1 of every row b into its caches.

    Position p goes to slot p mod S, or into a page. Every other slot keeps its bits. Under `jit`
    with the caches donated nothing is copied; a pallas backend moves only the few aligned blocks of
    slots that hold the new ones.

    Args:
      caches: what is kept together, such as (k, v) or (k, v, k_scale, v_scale): each [B,K,S,H] or,
        a number a slot, [B,K,S].
      new: the same, in their caches' dtypes, [B,T,K,H] or [B,T,K].
      start: [B] int32. A row may wrap around once: the cache is then a ring.
      num_new: [B] int32 in 0..T, at most S; what stands behind is not written and may be anything.
      block_table: [B,M] int32: the caches are pages [P,K,page,H] (and [P,K,page]), and positions
        i*page .. of row b lie in page block_table[b,i]. No two rows write to one page; a row
        without new tokens writes to none.
      impl: as of `cached_attention`.

    Returns:
      The caches.

    Raises:
      UnsupportedError: shapes or dtypes that do not fit together, or that `impl` does not cover.
    """
    if len(caches) != len(new) or not caches:
        raise UnsupportedError(f"{len(caches)} caches and {len(new)} new: as many, and some")
    if min(x.ndim for x in (*caches, *new)) < 3 or 0 in (*caches[0].shape, *new[0].shape):
        raise UnsupportedError("caches and new have 3 or 4 axes each, none of them empty")
    dispatch.check_integers(start=start, num_new=num_new, block_table=block_table)
    batch, tokens, num_kv = new[0].shape[:3]
    for cache, given in zip(caches, new, strict=True):
        rows, _, slots = caches[0].shape[:3]
        width = cache.shape[3:]
        if cache.shape != (rows, num_kv, slots, *width) or cache.ndim not in (3, 4):
            raise UnsupportedError(f"cache {cache.shape} must be {(rows, num_kv, slots)} or .. H")
        if given.shape != (batch, tokens, num_kv, *width) or given.dtype != cache.dtype:
            raise UnsupportedError(
                f"new {given.dtype} {given.shape} must be {cache.dtype}"
                f" {(batch, tokens, num_kv, *width)}"
            )
        if block_table is None and rows != batch:
            raise UnsupportedError(f"new {given.shape} does not fit cache {cache.shape}")
    for name, given in (("start", start), ("num_new", num_new)):
        if given.shape != (batch,):
            raise UnsupportedError(f"{name} {given.shape} must be {(batch,)}")
    if block_table is not None and (block_table.ndim != 2 or len(block_table) != batch):
        raise UnsupportedError(f"block_table {block_table.shape} must be [B,M] with B={batch}")

    if block_table is None:
        new = [x[:, : caches[0].shape[2]] for x in new]  # more cannot be real
    else:  # where nothing is held it may name no page
        block_table = jnp.clip(block_table, 0, caches[0].shape[0] - 1)

    def xla() -> Arrays:
        return cache_update_reference(caches, new, start, num_new, block_table)

    def pallas_tpu() -> Arrays:
        from pallas_kernels.cache_update.tpu import cache_update_tpu

        return cache_update_tpu(caches, new, start, num_new, block_table)

    return dispatch.run("cache_update", impl, {"xla": xla, "pallas_tpu": pallas_tpu})
