"""Which drafted tokens are kept, and what follows them: three rules that never change the output.

Each is `(scores [B,M+1,V], draft, rows, position [B]) -> Accepted`, where scores come out of the
one logits pipeline and the token at scores[:, t] has the absolute position `position + t`. A greedy
row's distribution is a point mass, so the same rules hold for it without a special case.
Letters: M drafted tokens, p the target's distributions, q the drafter's, x the draft.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.sampling import (
    STREAM_ACCEPT,
    STREAM_RESIDUAL,
    STREAM_SAMPLE,
    SamplingRows,
    choose,
    probabilities,
    row_keys,
)
from jaxinfer.speculative.drafter import Draft


class Accepted(NamedTuple):
    """What a round commits."""

    tokens: jax.Array  # [B,M+1] i32: accepted drafts, then one more token; behind it is padding
    num_accepted: jax.Array  # [B] i32 in 0..M


def exact(scores: jax.Array, draft: Draft, rows: SamplingRows, position: jax.Array) -> Accepted:
    """Sample from the target as plain decoding would; keep the draft as far as it says the same.

    The token at the first mismatch is the sample itself, so every token is drawn as it would have
    been without a draft, with the same noise: the output is that of plain decoding, token for
    token, whatever the drafter is. A drafter that uses the noise too (`propose` gets the same
    keys) agrees more often (arXiv 2408.07978).
    """
    at = _positions(position, scores)
    tokens = choose(scores, rows, row_keys(rows, at, STREAM_SAMPLE))
    return Accepted(tokens, leading_run(tokens[:, :-1] == draft.tokens, draft.num))


def rejection(scores: jax.Array, draft: Draft, rows: SamplingRows, position: jax.Array) -> Accepted:
    """Keep x with probability min(1, p(x)/q(x)), one after the other (arXiv 2211.17192)."""
    return _judge(scores, draft, rows, position, rejection_keep, leading_run)


def block(scores: jax.Array, draft: Draft, rows: SamplingRows, position: jax.Array) -> Accepted:
    """Judge the draft as a whole, which keeps at least as many tokens (arXiv 2403.10444)."""
    return _judge(scores, draft, rows, position, block_keep, longest_prefix)


VERIFIERS = {"exact": exact, "rejection": rejection, "block": block}


def rejection_keep(
    p: jax.Array, q: jax.Array, tokens: jax.Array, num: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Probability [B,M] that each draft passes, and the weight [B,M+1] of p in what is left: 1."""
    px, qx = _at(p[:, :-1], tokens), _at(q, tokens)
    keep = jnp.where(px < qx, px / jnp.where(qx > 0, qx, 1), px > 0)  # never where p is 0
    return keep, jnp.ones(p.shape[:2], p.dtype)


def block_keep(
    p: jax.Array, q: jax.Array, tokens: jax.Array, num: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Block verification: probability h [B,M] that a prefix passes, and its weight rho [B,M+1].

    rho_0 = 1, rho_i = min(1, rho_(i-1) p(x_i)/q(x_i)); h_i = m/(m+1-rho_i) with the mass
    m = sum_y max(rho_i p(y|x_1..i) - q(y|x_1..i), 0), and h = rho at the end of the draft.
    """
    px, qx = _at(p[:, :-1], tokens), _at(q, tokens)
    step = jnp.where(qx > 0, px / jnp.where(qx > 0, qx, 1), 0)
    ratios = [jnp.ones_like(px[:, 0])] if tokens.shape[1] else [jnp.ones(p.shape[0], p.dtype)]
    for i in range(tokens.shape[1]):
        ratios.append(jnp.minimum(1, ratios[-1] * step[:, i]))
    rho = jnp.stack(ratios, axis=1)
    mass = jnp.maximum(rho[:, 1:-1, None] * p[:, 1:-1] - q[:, 1:], 0).sum(-1)  # [B,M-1]
    room = mass + 1 - rho[:, 1:-1]
    inner = jnp.where(room > 0, mass / jnp.where(room > 0, room, 1), 0)
    last = jnp.arange(1, tokens.shape[1] + 1) == num[:, None]
    padded = jnp.concatenate([inner, jnp.zeros_like(rho[:, 1:2])], axis=1)[:, : tokens.shape[1]]
    return jnp.where(last, rho[:, 1:], padded), rho


def leading_run(passed: jax.Array, num: jax.Array) -> jax.Array:
    """[B]: drafts that passed [B,M] before the first that did not, of `num` [B] offered."""
    offered = jnp.arange(passed.shape[1]) < num[:, None]
    return jnp.cumprod(passed & offered, axis=1, dtype=jnp.int32).sum(axis=1)


def longest_prefix(passed: jax.Array, num: jax.Array) -> jax.Array:
    """[B]: length of the longest prefix that passed [B,M], whichever shorter one did not."""
    m = jnp.arange(1, passed.shape[1] + 1)
    return jnp.max(jnp.where(passed & (m <= num[:, None]), m, 0), axis=1, initial=0)


def residual(
    p: jax.Array, q: jax.Array, ratio: jax.Array, accepted: jax.Array, num: jax.Array
) -> jax.Array:
    """What the token behind `accepted` [B] drafts of `num` [B] is drawn from: [B,V], sums to 1.

    max(ratio p - q, 0) where a draft was refused, p where all were kept or nothing is left over.
    """

    def pick(x: jax.Array) -> jax.Array:  # [B,T,...] -> [B,...]
        index = jnp.minimum(accepted, x.shape[1] - 1).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.take_along_axis(x, index, axis=1)[:, 0]

    p_here = pick(p)
    if not q.shape[1]:
        return p_here
    left = jnp.maximum(pick(ratio)[:, None] * p_here - pick(q), 0)
    mass = left.sum(-1, keepdims=True)
    refused = (accepted < num)[:, None] & (mass > 0)
    return jnp.where(refused, left / jnp.where(mass > 0, mass, 1), p_here)


def _judge(
    scores: jax.Array,
    draft: Draft,
    rows: SamplingRows,
    position: jax.Array,
    keep: Callable[..., tuple[jax.Array, jax.Array]],
    count: Callable[[jax.Array, jax.Array], jax.Array],
) -> Accepted:
    """`count` the drafts that pass with the chances of `keep`; the rest is the residual's."""
    p, q = probabilities(scores, rows), _drafted(draft, scores)
    chance, ratio = keep(p, q, draft.tokens, draft.num)
    num = count(_uniform(rows, position, draft) < chance, draft.num)
    left = residual(p, q, ratio, num, draft.num)
    return _emit(draft, num, left, rows, position)


def _emit(
    draft: Draft, num: jax.Array, left: jax.Array, rows: SamplingRows, position: jax.Array
) -> Accepted:
    """The accepted drafts, and a token drawn from `left` [B,V] behind them."""
    keys = row_keys(rows, (position + num)[:, None], STREAM_RESIDUAL, position)
    token = choose(jnp.log(left)[:, None], rows, keys)[:, 0]
    here = jnp.arange(draft.tokens.shape[1] + 1) == num[:, None]
    padded = jnp.pad(draft.tokens, [(0, 0), (0, 1)])
    return Accepted(jnp.where(here, token[:, None], padded), num)


def _drafted(draft: Draft, scores: jax.Array) -> jax.Array:
    """q [B,M,V]."""
    if draft.probs is not None:
        return draft.probs
    return jax.nn.one_hot(draft.tokens, scores.shape[-1], dtype=scores.dtype)


def _at(p: jax.Array, tokens: jax.Array) -> jax.Array:
    """p [B,M,V] at tokens [B,M]."""
    return jnp.take_along_axis(p, tokens[..., None], axis=-1)[..., 0]


def _positions(position: jax.Array, scores: jax.Array) -> jax.Array:
    return position[:, None] + jnp.arange(scores.shape[1])


def _uniform(rows: SamplingRows, position: jax.Array, draft: Draft) -> jax.Array:
    """u [B,M] in [0,1), one a drafted token."""
    at = position[:, None] + jnp.arange(draft.tokens.shape[1])
    keys = row_keys(rows, at, STREAM_ACCEPT, position)
    return jax.vmap(jax.vmap(jax.random.uniform))(keys)
