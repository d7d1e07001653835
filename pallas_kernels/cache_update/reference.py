"""The definition of `cache_update` as a scatter, and its backend "xla"."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def cache_update_reference(
    caches: Sequence[jax.Array],  # each [B,K,S,H] or [B,K,S], or pages [P,K,page,H] or [P,K,page]
    new: Sequence[jax.Array],  # each [B,T,K,H] or [B,T,K]
    start: jax.Array,  # [B] int32
    num_new: jax.Array,  # [B] int32
    block_table: jax.Array | None = None,  # [B,M] int32
) -> tuple[jax.Array, ...]:
    """See `cache_update`."""
    size = caches[0].shape[2]
    t = jnp.arange(new[0].shape[1])
    position = start[:, None] + t  # [B,T]
    rows = jnp.arange(new[0].shape[0])[:, None]
    if block_table is not None:
        last = block_table.shape[1] - 1
        rows = jnp.take_along_axis(block_table, jnp.minimum(position // size, last), axis=1)
    # Slot S lies outside: those writes are dropped, so padding never touches a live slot.
    slots = jnp.where(t < num_new[:, None], position % size, size)
    return tuple(
        cache.at[rows, :, slots].set(x, mode="drop") for cache, x in zip(caches, new, strict=True)
    )
