"""Two drafters in one: where the first has nothing to offer, the second is asked, row by row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.sampling import History, SamplingRows
from jaxinfer.speculative.drafter import Draft, Drafter


class FallbackDrafter(Drafter, kw_only=True):
    """`first` ("ngram", say), else `second` (an LLM, say). Their own num_draft do not count.

    Each is what `LLM.speculation` takes as a drafter, and a Drafter once that has seen it.
    """

    first: Any
    second: Any

    @property
    def draws(self) -> bool:
        """Whether either does; the other's drafts are then point masses in the same array."""
        return self.first.draws or self.second.draws

    @property
    def kinds(self) -> tuple[float, ...]:
        """Those of the first, then those of the second."""
        return (*self.first.kinds, *self.second.kinds)

    def parts(self) -> tuple[Drafter, Drafter]:
        """Both, of a fixed length: how much is offered is the pair's to choose, not theirs."""
        return tuple(d.replace(num_draft=self.max_draft) for d in (self.first, self.second))

    def init(self, batch: int, capacity: int) -> Any:
        """Both states."""
        return tuple(drafter.init(batch, capacity) for drafter in self.parts())

    def observe(
        self, state: Any, context: History, num_new: jax.Array, hidden: jax.Array | None
    ) -> Any:
        """Both look on."""
        parts = zip(self.parts(), state, strict=True)
        return tuple(drafter.observe(own, context, num_new, hidden) for drafter, own in parts)

    def propose(
        self, state: Any, context: History, rows: SamplingRows, want: jax.Array, keys: jax.Array
    ) -> tuple[Draft, Any]:
        """See Drafter. The second is asked for no tokens where the first has some."""
        first, second = self.parts()
        a, one = first.propose(state[0], context, rows, want, keys)
        has = a.num > 0
        b, two = second.propose(state[1], context, rows, jnp.where(has, 0, want), keys)
        tokens = jnp.where(has[:, None], a.tokens, b.tokens)
        probs = None
        if self.draws:
            probs = _where(has, a, b)
        kinds = [jnp.zeros_like(want) if d.kind is None else d.kind for d in (a, b)]
        kind = jnp.where(has, kinds[0], len(first.kinds) + kinds[1])
        return Draft(tokens, jnp.where(has, a.num, b.num), probs, kind), (one, two)


def _where(has: jax.Array, a: Draft, b: Draft) -> jax.Array:
    """Distributions [B,M,V] of a where `has` [B], else of b."""
    vocab = next(d.probs.shape[-1] for d in (a, b) if d.probs is not None)

    def of(draft: Draft) -> jax.Array:
        return jax.nn.one_hot(draft.tokens, vocab) if draft.probs is None else draft.probs

    return jnp.where(has[:, None, None], of(a), of(b))
