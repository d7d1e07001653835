"""Public entry of `cached_attention`: checks its arguments and picks a backend."""

from __future__ import annotations

from typing import Literal

import jax

from pallas_kernels.cached_attention.reference import cached_attention_reference

Impl = Literal["auto", "xla"]


class UnsupportedError(ValueError):
    """An argument that the chosen backend does not cover; the message says what it covers."""


def cached_attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    k_cache: jax.Array,
    v_cache: jax.Array,
    start: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> jax.Array:
    """Causal grouped-query attention of T new tokens a row over a cache of S slots and each other.

    The new keys and values come beside the cache and need not be in it: writing them there is then
    nobody's input, and can be done in place. Or they are in it already, and k and v are None.

    Slot s of the cache holds the latest position p with p mod S == s, so a cache may be a ring. A
    ring must keep window + T slots, and a cache without a window every position.

    Args:
      q: [B,T,N,H] queries; query t of row b stands at position start[b] + t.
      k, v: [B,T,K,H] keys and values of the new tokens, or None where the cache holds them; K
        divides N.
      k_cache, v_cache: [B,K,S,H]; slots that hold nothing are ignored, but must be finite.
      start: [B] int32, tokens in front of the new ones.
      scale: multiplies q.k before the softmax.
      window: a query sees this many tokens, its own included; None: all up to its own.
      softcap: cap * tanh(score / cap) on the scaled scores (Gemma 2, arXiv 2408.00118).
      impl: "xla" is the reference; "auto" picks the best backend here, today always "xla".

    Returns:
      [B,T,N,H] in the dtype of q.

    Raises:
      UnsupportedError: shapes that do not fit together, or an `impl` that does not exist.
    """
    if impl not in ("auto", "xla"):
        raise UnsupportedError(f"impl={impl!r}: this op has 'auto' and 'xla'")
    if q.ndim != 4 or k_cache.ndim != 4 or k_cache.shape != v_cache.shape:
        raise UnsupportedError(
            f"q {q.shape} must be [B,T,N,H], k_cache {k_cache.shape} and v_cache {v_cache.shape}"
            " [B,K,S,H]"
        )
    batch, num_new, num_heads, head_dim = q.shape
    num_kv = k_cache.shape[1]
    if k_cache.shape[::3] != (batch, head_dim) or num_heads % num_kv:
        raise UnsupportedError(
            f"q {q.shape} and k_cache {k_cache.shape} differ in B or H, or K does not divide N"
        )
    for name, new in (("k", k), ("v", v)):
        if new is not None and new.shape != (batch, num_new, num_kv, head_dim):
            raise UnsupportedError(f"{name} {new.shape} must be [B,T,K,H]")
    if (k is None) != (v is None):
        raise UnsupportedError("k and v come together, or neither does")
    if start.shape != q.shape[:1]:
        raise UnsupportedError(f"start {start.shape} must be [B] = {q.shape[:1]}")
    if window is not None and window < 1:
        raise UnsupportedError(f"window={window}: a query sees at least itself, so 1 or more")
    return cached_attention_reference(
        q, k, v, k_cache, v_cache, start, scale=scale, window=window, softcap=softcap
    )
