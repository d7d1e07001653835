"""Public entry of `cached_attention`: checks its arguments and picks a backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.cached_attention.reference import cached_attention_reference
from pallas_kernels.chips import Blocks
from pallas_kernels.dispatch import Impl, UnsupportedError


def cached_attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    k_cache: jax.Array,
    v_cache: jax.Array,
    start: jax.Array,
    *,
    scale: float,
    num_new: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    block_table: jax.Array | None = None,
    ancestors: jax.Array | None = None,
    whole: bool = False,
    impl: Impl = "auto",
    blocks: Blocks | None = None,
) -> jax.Array:
    """Causal grouped-query attention of T new tokens a row over a cache of S slots and each other.

    For decoding and verifying: the cache is read once, however many tokens are new. They are in the
    cache already (`cache_update`), and k and v are None. Or, with "xla" alone, they come beside it:
    writing them there is then nobody's input, and can be done in place afterwards.

    Slot s of the cache holds the latest position p with p mod S == s, so a cache may be a ring. A
    ring must keep window + T slots, and a cache without a window every position.

    Args:
      q: [B,T,N,H] queries; query t of row b stands at position start[b] + t.
      k, v: [B,T,K,H] keys and values of the new tokens, or None where the cache holds them; K
        divides N. Beside an int8 cache: as it will hold them, rounded.
      k_cache, v_cache: [B,K,S,H] in the dtype of q, or int8 with scales. A pallas backend never
        looks at slots that hold nothing; "xla" demands that they are finite.
      start: [B] int32, tokens in front of the new ones.
      scale: multiplies q.k before the softmax.
      num_new: [B] int32 in 0..T, how many of a row's tokens are real; None: all. The result of the
        others is of no meaning.
      window: a query sees this many tokens, its own included; None: all up to its own.
      softcap: cap * tanh(score / cap) on the scaled scores (Gemma 2, arXiv 2408.00118).
      k_scale, v_scale: [B,K,S] float32: a slot's int8 numbers times its scale are its key or value.
      block_table: [B,M] int32, the cache is paged (arXiv 2309.06180): positions i*page .. of row b
        are page block_table[b,i] of k_cache and v_cache [P,K,page,H] (scales [P,K,page]).
      ancestors: [T,T] bool, new tokens are a tree (arXiv 2305.09781): token t sees new token u
        where ancestors[t,u], itself included, and stands at start + the number of its ancestors
        (of a window's kind too). None: a chain.
      whole: "xla" multiplies an int8 cache by whole numbers, queries and weights as two int8 digits
        each (15 bits), instead of widening it to the dtype of q, which XLA:CPU does not fuse.
      impl: "xla" is the reference, "pallas_tpu" and "pallas_gpu" never give way to it, "auto" takes
        the platform's own where it covers the arguments.
      blocks: instead of the chip's entry in `pallas_kernels.chips`.

    Returns:
      [B,T,N,H] in the dtype of q.

    Raises:
      UnsupportedError: shapes that do not fit together, or that `impl` does not cover.
    """
    if q.ndim != 4 or k_cache.ndim != 4 or k_cache.shape != v_cache.shape:
        raise UnsupportedError(
            f"q {q.shape} must be [B,T,N,H], k_cache {k_cache.shape} and v_cache {v_cache.shape}"
            " [B,K,S,H]"
        )
    if 0 in (*q.shape, *k_cache.shape) or v_cache.dtype != k_cache.dtype:
        raise UnsupportedError(
            f"q {q.shape}, k_cache {k_cache.dtype} {k_cache.shape}, v_cache {v_cache.dtype}: no"
            " axis may be empty, and both caches have one dtype"
        )
    dispatch.check_integers(start=start, num_new=num_new, block_table=block_table)
    batch, tokens, num_heads, head_dim = q.shape
    rows, num_kv, slots, width = k_cache.shape
    if width != head_dim or num_heads % num_kv or (block_table is None and rows != batch):
        raise UnsupportedError(
            f"q {q.shape} and k_cache {k_cache.shape} differ in B or H, or K does not divide N"
        )
    expected: dict[str, tuple[jax.Array | None, str, tuple[int, ...]]] = {
        "k": (k, "[B,T,K,H]", (batch, tokens, num_kv, head_dim)),
        "v": (v, "[B,T,K,H]", (batch, tokens, num_kv, head_dim)),
        "start": (start, "[B]", (batch,)),
        "num_new": (num_new, "[B]", (batch,)),
        "k_scale": (k_scale, "[B,K,S]", (rows, num_kv, slots)),
        "v_scale": (v_scale, "[B,K,S]", (rows, num_kv, slots)),
        "ancestors": (ancestors, "[T,T]", (tokens, tokens)),
    }
    for name, (given, axes, shape) in expected.items():
        if given is not None and given.shape != shape:
            raise UnsupportedError(f"{name} {given.shape} must be {axes} = {shape}")
    if block_table is not None and (block_table.ndim != 2 or len(block_table) != batch):
        raise UnsupportedError(f"block_table {block_table.shape} must be [B,M] with B={batch}")
    if (k is None) != (v is None) or (k_scale is None) != (v_scale is None):
        raise UnsupportedError("k and v come together, and so do their scales, or neither does")
    if (k_scale is None) != (k_cache.dtype != jnp.int8):
        raise UnsupportedError(f"a cache of int8 needs scales, one of {k_cache.dtype} has none")
    if k is not None and not (block_table is None and ancestors is None):
        raise UnsupportedError("k, v: with pages or a tree they must be in the cache")
    if whole and k_scale is None:
        raise UnsupportedError("whole: an int8 cache with scales")
    if window is not None and window < 1:
        raise UnsupportedError(f"window={window}: a query sees at least itself, so 1 or more")
    if ancestors is not None:
        ancestors = ancestors.astype(bool)
    if block_table is not None:  # where nothing is held it may name no page
        block_table = jnp.clip(block_table, 0, rows - 1)
    if num_new is None:
        num_new = jnp.full((batch,), tokens, jnp.int32)

    options: Any = {
        "k_scale": k_scale,
        "v_scale": v_scale,
        "block_table": block_table,
        "ancestors": ancestors,
        "scale": scale,
        "window": window,
        "softcap": softcap,
    }

    def xla() -> jax.Array:
        return cached_attention_reference(
            q, k, v, k_cache, v_cache, start, num_new, whole=whole, **options
        )

    def pallas_tpu() -> jax.Array:
        from pallas_kernels.cached_attention.tpu import cached_attention_tpu

        if k is not None:
            raise UnsupportedError("k, v: pallas_tpu reads them from the cache; use cache_update")
        return cached_attention_tpu(q, k_cache, v_cache, start, num_new, blocks=blocks, **options)

    def pallas_gpu() -> jax.Array:
        from pallas_kernels.cached_attention.gpu import cached_attention_gpu

        if k is not None:
            raise UnsupportedError("k, v: pallas_gpu reads them from the cache; use cache_update")
        return cached_attention_gpu(q, k_cache, v_cache, start, num_new, blocks=blocks, **options)

    backends = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
    return dispatch.run("cached_attention", impl, backends)
