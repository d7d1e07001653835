"""How many tokens to draft: as many as pay, by a round's cost here and what this text accepts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

PRIOR_ACCEPTED, PRIOR_JUDGED = 2.0, 3.0  # before anything is seen: two of three are kept
MEMORY = 0.9  # weight of the past after a round; a few dozen tokens are remembered


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pace:
    """Running acceptance of each row, and the machine's costs.

    If each drafted token is kept with probability a, a round that offers m commits
    1 + a + .. + a^m tokens (arXiv 2211.17192). The length with the most tokens of the batch a
    second wins; 0 is a length like any other.
    """

    accepted: jax.Array  # [B] f32, drafted tokens kept, older ones counting less
    judged: jax.Array  # [B] f32, kept or refused
    verify_seconds: jax.Array  # [M+1] f32, of a round that verifies m tokens
    draft_seconds: jax.Array  # [M+1] f32, of drafting m tokens

    def before(self, possible: jax.Array, done: jax.Array) -> jax.Array:
        """Length to ask the drafter for [], if it could offer `possible` [B]."""
        return self._best(possible, done, self.verify_seconds + self.draft_seconds)

    def after(self, offered: jax.Array, done: jax.Array) -> jax.Array:
        """Length to verify [], of the `offered` [B]: drafting is paid for."""
        return self._best(offered, done, self.verify_seconds)

    def _best(self, possible: jax.Array, done: jax.Array, seconds: jax.Array) -> jax.Array:
        rate = (self.accepted + PRIOR_ACCEPTED) / (self.judged + PRIOR_JUDGED)  # [B]
        m = jnp.arange(seconds.shape[0])
        kept = jnp.cumsum(rate[:, None] ** m, axis=1)  # [B,M+1] tokens a round of m commits
        index = jnp.minimum(m, possible[:, None])
        tokens = jnp.where(done[:, None], 0, jnp.take_along_axis(kept, index, axis=1))
        return jnp.argmax(tokens.sum(0) / seconds).astype(jnp.int32)

    def update(self, num_accepted: jax.Array, judged: jax.Array) -> Pace:
        """After a round. A row that was offered nothing drifts back to the prior."""
        return dataclasses.replace(
            self,
            accepted=MEMORY * self.accepted + num_accepted,
            judged=MEMORY * self.judged + judged,
        )


def new_pace(batch: int, verify_seconds: jax.Array, draft_seconds: jax.Array) -> Pace:
    """Nothing seen yet; costs [M+1] in seconds, of 0 to M drafted tokens."""
    zero = jnp.zeros((batch,), jnp.float32)
    return Pace(zero, jnp.zeros_like(zero), verify_seconds, draft_seconds)
