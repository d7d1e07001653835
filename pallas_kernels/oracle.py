"""What the ops mean, in NumPy float64, token by token: judges every backend, "xla" too.

Nothing here is shared with a backend: loops over rows, heads and queries, and keys by position.
"""

from __future__ import annotations

import numpy as np


def attention(
    q: np.ndarray,  # [B,T,N,H]
    k: np.ndarray,  # [B,K,S,H], by slot
    v: np.ndarray,
    start: np.ndarray,  # [B]
    num_new: np.ndarray,  # [B]
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    ancestors: np.ndarray | None = None,  # [T,T] bool
) -> np.ndarray:  # [B,T,N,H] float64, 0 behind num_new
    """Both attention ops."""
    groups, slots = q.shape[2] // k.shape[1], k.shape[2]
    tokens = q.shape[1]
    tree = np.tril(np.ones((tokens, tokens), bool)) if ancestors is None else ancestors
    depth = tree.sum(axis=1) - 1
    out = np.zeros(q.shape, np.float64)
    for b, t in np.argwhere(np.arange(tokens) < np.asarray(num_new)[:, None]):
        old = [(p, p) for p in range(start[b])]  # position, and the place it counts as
        new = [(start[b] + u, start[b] + depth[u]) for u in range(tokens) if tree[t, u]]
        here = start[b] + depth[t]
        near = [p for p, place in old + new if window is None or place > here - window]
        at = np.array(near) % slots
        for n in range(q.shape[2]):
            keys, values = (x[b, n // groups, at].astype(np.float64) for x in (k, v))
            score = keys @ q[b, t, n].astype(np.float64) * scale
            if softcap is not None:
                score = softcap * np.tanh(score / softcap)
            weight = np.exp(score - score.max())
            out[b, t, n] = weight @ values / weight.sum()
    return out


def dense(
    cache: np.ndarray, scale: np.ndarray | None = None, table: np.ndarray | None = None
) -> np.ndarray:
    """[B,K,S,H] float64 of a cache [B,K,S,H], or pages [P,K,page,H] and their table [B,M]."""
    numbers = cache.astype(np.float64)
    if scale is not None:
        numbers *= scale.astype(np.float64)[..., None]
    if table is None:
        return numbers
    return np.stack([np.concatenate(list(numbers[pages]), axis=1) for pages in table])


def matmul(
    x: np.ndarray, w: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None
) -> np.ndarray:
    """[..,O] float64 of x [..,I], whole numbers w [I,O] and what stands for groups of inputs."""
    group = np.arange(len(w)) // (len(w) // len(scale))
    numbers = w - (0.0 if zero is None else zero.astype(np.float64)[group])
    return np.asarray(x, np.float64) @ (numbers * scale.astype(np.float64)[group])


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """The greatest |got - want| over the greatest |want|; not a number counts as infinite."""
    error = np.abs(np.asarray(got, np.float64) - want).max(initial=0.0)
    return (
        float("inf") if np.isnan(error) else float(error / max(np.abs(want).max(initial=0), 1e-30))
    )
