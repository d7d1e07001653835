"""Where the model meets the attention kernels: one place that writes to the cache and reads it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.sharding import ONE_DEVICE, Layout
from pallas_kernels import Impl, attention, cache_update, cached_attention

FEW = 32  # T, most tokens that are a decode or a verify; more are a piece of a prompt


@dataclasses.dataclass(frozen=True)
class Kernels:
    """How a cache is written and read; static."""

    impl: Impl = "xla"
    write_first: bool = False
    """With "xla", attention reads new keys from the cache and not beside it, so that a token's sum
    is the same whether it came with this forward or an earlier one. Slower on CPU. Pallas kernels
    do so always."""
    layout: Layout = ONE_DEVICE


XLA = Kernels()


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    start: jax.Array,
    num_new: jax.Array,
    *,
    kernels: Kernels,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of new tokens over the cache and each other; they join the cache.

    Args:
      q: [B,T,N,H].
      k, v: [B,T,K,H], already rotated.
      k_cache, v_cache: [B,K,S,H], a ring where the layer has a window.
      start: [B] int32, tokens in the cache.
      num_new: [B] int32, how many of the T are real.
      kernels, scale, window, softcap: static; see `pallas_kernels.cached_attention`.

    Returns:
      y [B,T,N,H], k_cache and v_cache.
    """
    step = partial(
        _attend,
        kernels=kernels,
        options={"scale": scale, "window": window, "softcap": softcap},
    )
    if kernels.layout.mesh is not None:  # a device sees its own heads and rows: nothing is sent
        heads, cache, rows = map(kernels.layout.spec, ("BTNH", "BKSH", "B"))
        step = jax.shard_map(
            step,
            mesh=kernels.layout.mesh,
            in_specs=(heads, heads, heads, cache, cache, rows, rows),
            out_specs=(heads, cache, cache),
            check_vma=False,  # a Pallas call does not say how its results vary
        )
    return step(q, k, v, k_cache, v_cache, start, num_new)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    start: jax.Array,
    num_new: jax.Array,
    *,
    kernels: Kernels,
    options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    impl = kernels.impl
    if impl == "xla" and not kernels.write_first:
        y = cached_attention(q, k, v, k_cache, v_cache, start, impl="xla", **options)
        # The cache is written once it has been read: XLA would else copy it to be safe.
        start = _after(start, y)
        k_cache, v_cache = cache_update((k_cache, v_cache), (k, v), start, num_new, impl="xla")
        return y, k_cache, v_cache
    # There is no GPU kernel that writes: XLA's scatter is one there.
    writer: Impl = "xla" if impl == "pallas_gpu" else impl
    k_cache, v_cache = cache_update((k_cache, v_cache), (k, v), start, num_new, impl=writer)
    options = options | {"num_new": num_new, "impl": impl}
    if q.shape[1] <= FEW:
        y = cached_attention(q, None, None, k_cache, v_cache, start, **options)
    else:
        y = attention(q, k_cache, v_cache, start, **options)
    return y, k_cache, v_cache


def _after(start: jax.Array, y: jax.Array) -> jax.Array:
    """`start` [B] unchanged, but not there before y [B,T,N,H] is: adds a zero that only y tells."""
    return start + (y[:, 0, 0, 0] > jnp.inf).astype(start.dtype)
