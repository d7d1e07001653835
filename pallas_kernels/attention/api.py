"""Public entry of `attention`: checks its arguments and picks a backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.cached_attention.reference import cached_attention_reference
from pallas_kernels.chips import Blocks
from pallas_kernels.dispatch import Impl, UnsupportedError


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array | None = None,
    num_new: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    impl: Impl = "auto",
    blocks: Blocks | None = None,
) -> jax.Array:
    """Causal grouped-query attention of a prompt, or of a piece of one, over all keys so far.

    The same function as `cached_attention` over a dense cache that holds the new keys already; its
    kernels are made for many queries, and read the keys again for every few hundred of them.

    Args:
      q: [B,T,N,H] queries; query t of row b stands at position start[b] + t.
      k, v: [B,K,S,H] keys and values in the dtype of q; K divides N. Slot s holds the latest
        position p with p mod S == s: a ring must keep window + T slots.
      start: [B] int32, tokens in front of the new ones; None: 0.
      num_new: [B] int32 in 0..T, how many of a row's tokens are real; None: all. A pallas backend
        computes nothing behind them and reads no key that no query sees. The result behind them is
        of no meaning.
      scale: multiplies q.k before the softmax.
      window: a query sees this many tokens, its own included; None: all up to its own.
      softcap: cap * tanh(score / cap) on the scaled scores (Gemma 2, arXiv 2408.00118).
      impl, blocks: as of `cached_attention`.

    Returns:
      [B,T,N,H] in the dtype of q.

    Raises:
      UnsupportedError: shapes that do not fit together, or that `impl` does not cover.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise UnsupportedError(
            f"q {q.shape} must be [B,T,N,H], k {k.shape} and v {v.shape} [B,K,S,H]"
        )
    if k.shape[::3] != q.shape[::3] or q.shape[2] % k.shape[1]:
        raise UnsupportedError(
            f"q {q.shape} and k {k.shape} differ in B or H, or K does not divide N"
        )
    if 0 in (*q.shape, *k.shape) or v.dtype != k.dtype:
        raise UnsupportedError(
            f"q {q.shape}, k {k.dtype} {k.shape}, v {v.dtype}: no axis may be empty, and k and v"
            " have one dtype"
        )
    dispatch.check_integers(start=start, num_new=num_new)
    batch, tokens = q.shape[:2]
    start = jnp.zeros((batch,), jnp.int32) if start is None else start
    num_new = jnp.full((batch,), tokens, jnp.int32) if num_new is None else num_new
    for name, given in (("start", start), ("num_new", num_new)):
        if given.shape != (batch,):
            raise UnsupportedError(f"{name} {given.shape} must be {(batch,)}")
    if window is not None and window < 1:
        raise UnsupportedError(f"window={window}: a query sees at least itself, so 1 or more")

    options: Any = {"scale": scale, "window": window, "softcap": softcap}

    def xla() -> jax.Array:
        return cached_attention_reference(q, None, None, k, v, start, num_new, **options)

    def pallas_tpu() -> jax.Array:
        from pallas_kernels.attention.tpu import attention_tpu

        return attention_tpu(q, k, v, start, num_new, blocks=blocks, **options)

    def pallas_gpu() -> jax.Array:
        from pallas_kernels.attention.gpu import attention_gpu

        return attention_gpu(q, k, v, start, num_new, blocks=blocks, **options)

    backends = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
    return dispatch.run("attention", impl, backends)
