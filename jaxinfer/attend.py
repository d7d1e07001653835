"""Where the model meets the attention kernels: one place that writes to the cache and reads it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxinfer.errors import InvalidArgument
from jaxinfer.sharding import ONE_DEVICE, Layout
from jaxinfer.xla import once
from pallas_kernels import Impl, attention, cache_update, cached_attention

Store = Literal["int8", "fp8"]
STORED: dict[Store | None, Any] = {None: None, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
LARGEST: dict[Store, float] = {"int8": 127.0, "fp8": 448.0}
Arrays = tuple[jax.Array, ...]

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
    store: Store | None = None
    """Keys and values are kept in eight bits, with a scale a token and head; None: as they are."""
    whole: bool = False
    """With "xla", few tokens read an int8 cache by products of whole numbers: a CPU's fast way."""


XLA = Kernels()


def check_store(store: Store | None) -> None:
    """Raise InvalidArgument where a cache cannot be kept so."""
    if store not in STORED:
        raise InvalidArgument(f"cache_dtype={store!r:.40}: None, int8 or fp8")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Arrays,
    start: jax.Array,
    num_new: jax.Array,
    *,
    kernels: Kernels,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[jax.Array, Arrays]:
    """Attention of new tokens over the cache and each other; they join the cache.

    Args:
      q: [B,T,N,H].
      k, v: [B,T,K,H], already rotated.
      cache: keys and values [B,K,S,H], a ring where the layer has a window; and where they are kept
        in eight bits their scales [B,K,S] f32.
      start: [B] int32, tokens in the cache.
      num_new: [B] int32, how many of the T are real.
      kernels, scale, window, softcap: static; see `pallas_kernels.cached_attention`.

    Returns:
      y [B,T,N,H], and the cache.
    """
    step = partial(
        _attend,
        kernels=kernels,
        options={"scale": scale, "window": window, "softcap": softcap},
    )
    if kernels.layout.mesh is not None:  # a device sees its own heads and rows: nothing is sent
        heads, rows = map(kernels.layout.spec, ("BTNH", "B"))
        held = tuple(kernels.layout.spec("BKSH"[: x.ndim]) for x in cache)
        step = jax.shard_map(
            step,
            mesh=kernels.layout.mesh,
            in_specs=(heads, heads, heads, held, rows, rows),
            out_specs=(heads, held),
            check_vma=False,  # a Pallas call does not say how its results vary
        )
    return step(q, k, v, cache, start, num_new)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Arrays,
    start: jax.Array,
    num_new: jax.Array,
    *,
    kernels: Kernels,
    options: Any,
) -> tuple[jax.Array, Arrays]:
    impl, store = kernels.impl, kernels.store
    stored: Arrays = (k, v)
    new: tuple[jax.Array | None, jax.Array | None] = k, v
    if store is not None:
        (k, k_scale), (v, v_scale) = (_store(x, store) for x in stored)
        stored = k, v, k_scale, v_scale
        new = _widen(k, k_scale, q.dtype), _widen(v, v_scale, q.dtype)
    # There is no GPU kernel that writes, and none at all that knows fp8: XLA's scatter does.
    writer: Impl = "xla" if impl == "pallas_gpu" or store == "fp8" else impl
    beside = impl == "xla" and not kernels.write_first
    if not beside:
        cache, new = cache_update(cache, stored, start, num_new, impl=writer), (None, None)
    keys, values, *scales = cache
    few = q.shape[1] <= FEW
    options = options | {"num_new": num_new, "impl": impl}
    # The kernel of GPUs takes but few queries over int8.
    if scales and few and store == "int8" and impl != "pallas_gpu":
        options |= {"k_scale": scales[0], "v_scale": scales[1], "whole": kernels.whole}
    elif scales:  # the kernels multiply by scales of int8 alone, and only for few tokens
        keys, values = (
            _widen(x, by, q.dtype) for x, by in zip((keys, values), scales, strict=True)
        )
    if few or beside:
        y = cached_attention(q, *new, keys, values, start, **options)
    else:
        y = attention(q, keys, values, start, **options)
    y = once(y)  # a quantized product reads it twice: for the largest, and to round
    if beside:
        # The cache is written once it has been read: XLA would else copy it to be safe.
        cache = cache_update(cache, stored, _after(start, y), num_new, impl=writer)
    return y, cache


def _store(x: jax.Array, store: Store) -> tuple[jax.Array, jax.Array]:
    """Keys or values [B,T,K,H] in eight bits, and their scales [B,T,K] f32."""
    x = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x), axis=-1)
    scale = most / LARGEST[store]
    scale = jnp.where(scale == 0, 1, scale)
    x = x / scale[..., None]
    return (jnp.round(x) if store == "int8" else x).astype(STORED[store]), scale


def _widen(codes: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What codes [...,H] stand for, with their scales [...]."""
    return (codes.astype(jnp.float32) * scale[..., None]).astype(dtype)


def _after(start: jax.Array, y: jax.Array) -> jax.Array:
    """`start` [B] unchanged, but not there before y [B,T,N,H] is: adds a zero that only y tells."""
    return start + (y[:, 0, 0, 0] > jnp.inf).astype(start.dtype)
