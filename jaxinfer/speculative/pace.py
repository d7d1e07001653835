"""How many tokens to draft: as many as pay, by a round's cost here and what this text accepts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

PRIOR_JUDGED = 3.0  # tokens that a drafter's word for itself counts as
MEMORY = 0.9  # weight of a kind's past after one more was judged; a few dozen tokens are remembered
DRIFT = 0.99  # after a round that judged none of it
FREE = 0.05  # of a plain round: where a draft costs less than that, as many are asked for as may be


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pace:
    """Running acceptance of each row by the kind of draft (`Drafter.kinds`), and the costs here.

    If each drafted token is kept with probability a, a round that offers m commits
    1 + a + .. + a^m tokens (arXiv 2211.17192). The length with the most tokens of the batch a
    second wins; 0 is a length like any other.
    """

    accepted: jax.Array  # [B,C] f32, drafted tokens kept, older ones counting less
    judged: jax.Array  # [B,C] f32, kept or refused
    prior: jax.Array  # [C] f32, the share that is kept as long as none was judged
    verify_seconds: jax.Array  # [M+1] f32, of a round that verifies m tokens
    draft_seconds: jax.Array  # [M+1] f32, of drafting m tokens

    def before(self, possible: jax.Array, done: jax.Array) -> jax.Array:
        """Length to ask the drafter for [], if it could offer `possible` [B]; the kind is not known
        yet. Where drafting costs next to nothing, `after` decides alone."""
        rate = _rate(self.accepted.sum(1), self.judged.sum(1), self.prior.mean())
        length = self._best(rate, possible, done, self.verify_seconds + self.draft_seconds)
        more = self.draft_seconds[-1] - self.draft_seconds[0]  # to look at all is paid in any case
        free = more <= FREE * self.verify_seconds[0]
        return jnp.where(free, jnp.max(possible), length)

    def after(self, offered: jax.Array, kind: jax.Array, done: jax.Array) -> jax.Array:
        """Length to verify [], of the `offered` [B] of a `kind` [B]: drafting is paid for."""
        rates = _rate(self.accepted, self.judged, self.prior)  # [B,C]
        rate = jnp.take_along_axis(rates, kind[:, None], axis=1)[:, 0]
        return self._best(rate, offered, done, self.verify_seconds)

    def _best(
        self, rate: jax.Array, possible: jax.Array, done: jax.Array, seconds: jax.Array
    ) -> jax.Array:
        m = jnp.arange(seconds.shape[0])
        kept = jnp.cumsum(rate[:, None] ** m, axis=1)  # [B,M+1] tokens a round of m commits
        index = jnp.minimum(m, possible[:, None])
        tokens = jnp.where(done[:, None], 0, jnp.take_along_axis(kept, index, axis=1))
        return jnp.argmax(tokens.sum(0) / seconds).astype(jnp.int32)

    def update(self, num_accepted: jax.Array, judged: jax.Array, kind: jax.Array) -> Pace:
        """After a round. A kind of which nothing was judged drifts back to what it began with."""
        one = jax.nn.one_hot(kind, self.prior.shape[0])  # [B,C]
        seen = one * judged[:, None]
        past = jnp.where(seen > 0, MEMORY, DRIFT)
        return dataclasses.replace(
            self,
            accepted=past * self.accepted + num_accepted[:, None] * one,
            judged=past * self.judged + seen,
        )


def _rate(accepted: jax.Array, judged: jax.Array, prior: jax.Array) -> jax.Array:
    """How likely a token is kept."""
    return (accepted + prior * PRIOR_JUDGED) / (judged + PRIOR_JUDGED)


def new_pace(
    batch: int, kinds: tuple[float, ...], verify_seconds: jax.Array, draft_seconds: jax.Array
) -> Pace:
    """Nothing seen yet; costs [M+1] in seconds, of 0 to M drafted tokens."""
    zero = jnp.zeros((batch, len(kinds)), jnp.float32)
    prior = jnp.asarray(kinds, jnp.float32)
    return Pace(zero, jnp.zeros_like(zero), prior, verify_seconds, draft_seconds)
