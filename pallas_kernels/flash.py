"""What the flash kernels of TPU and GPU share: how queries are folded, and partial results joined.

Letters: B batch, T new tokens, N query heads, K kv heads, G = N / K, H head width, R query rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Sums(NamedTuple):
    """Softmax in progress, and what a split leaves behind."""

    acc: Any  # [heads,R,H] float32, sum of exp(score - top) * v
    top: Any  # [heads,R,1] float32
    total: Any  # [heads,R,1] float32, sum of exp(score - top)


def fold(q: jax.Array, num_kv: int) -> jax.Array:
    """[B,T,N,H] -> [B,K,T*G,H]: the heads that share keys are rows of one matrix."""
    batch, tokens, num_heads, head_dim = q.shape
    grouped = q.reshape(batch, tokens, num_kv, num_heads // num_kv, head_dim)
    return jnp.swapaxes(grouped, 1, 2).reshape(batch, num_kv, -1, head_dim)


def unfold(out: jax.Array, tokens: int) -> jax.Array:
    """[B,K,T*G,H] -> [B,T,N,H]."""
    batch, num_kv, _, head_dim = out.shape
    grouped = out.reshape(batch, num_kv, tokens, -1, head_dim)
    return jnp.swapaxes(grouped, 1, 2).reshape(batch, tokens, -1, head_dim)


def join(parts: Sums) -> jax.Array:
    """[B,K,R,H] float32 of splits [splits,B,K,R,...]: each weighs as much as its exponentials."""
    top = jnp.max(parts.top, axis=0)
    weight = jnp.exp(parts.top - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weight * parts.total, axis=0)
    return jnp.sum(weight * parts.acc, axis=0) / jnp.where(total == 0.0, 1.0, total)


def steps_for(tokens: int, blocks: int, keys: int, window: int | None) -> int:
    """Blocks that `tokens` queries may have to visit."""
    return blocks if window is None else min(blocks, (window + tokens - 2) // keys + 1) + 1
