"""What a drafter is: something cheap that guesses the next tokens. It can be wrong, not harmful.

A new one subclasses `Drafter` and writes `propose`; one with a memory of its own writes `init` and
`observe` too. All three are traced into the loop, so they are jax code without host round trips.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.errors import InvalidArgument
from jaxinfer.sampling import History, SamplingRows

MAX_AUTO_DRAFT = 7  # num_draft="auto" offers at most this many; eight rows are one tile on CPU


class Draft(NamedTuple):
    """Guesses of the next tokens, M of them a row."""

    tokens: jax.Array  # [B,M] i32
    num: jax.Array  # [B] i32 in 0..M, how many are offered; the others are ignored
    probs: jax.Array | None = None  # [B,M,V] f32, what each was drawn from; None: point masses
    kind: jax.Array | None = None  # [B] i32, which of the drafter's `kinds`; None: the first


class Drafter(struct.PyTreeNode, kw_only=True):
    """Base class; subclasses become frozen dataclasses and pytrees.

    Weights are ordinary fields, so that they reach the compiled loop as arguments. A field that is
    no array is declared with `static`, as `num_draft` is.
    """

    # How many tokens a round offers at most; "auto": as many as pay, by measurement.
    num_draft: int | Literal["auto"] = struct.field(pytree_node=False, default="auto")

    def __init_subclass__(cls, **options: Any) -> None:
        length = cls.__dict__.get("num_draft", static(None))
        if not isinstance(length, dataclasses.Field) or length.metadata.get("pytree_node", True):
            raise InvalidArgument(
                f"{cls.__name__}.num_draft: write `num_draft: int = static(3)`, it is compiled in"
            )
        super().__init_subclass__(**options)

    @property
    def max_draft(self) -> int:
        """M, the static width of a draft."""
        return MAX_AUTO_DRAFT if self.num_draft == "auto" else self.num_draft

    @property
    def draws(self) -> bool:
        """Whether a draft carries `probs`, the distributions it was drawn from."""
        return False

    @property
    def kinds(self) -> tuple[float, ...]:
        """Kinds of drafts that deserve more or less trust: of each, how likely a token is kept as
        long as none was judged. num_draft="auto" keeps count of each by itself."""
        return (2 / 3,)

    def init(self, batch: int, capacity: int) -> Any:
        """State for so many rows of at most `capacity` tokens: a pytree, handed on and donated."""
        return ()

    def observe(
        self, state: Any, context: History, num_new: jax.Array, hidden: jax.Array | None
    ) -> Any:
        """The target has read more: a chunk of the prompt, or the accepted part of a round.

        Args:
          state: the drafter's own.
          context: all that is committed; the last token of a row is not yet read.
          num_new: [B] i32, how many tokens the target read now.
          hidden: [B,T,D], its states behind the final norm for those, from 0 to num_new[b].

        Returns:
          The state; its structure, shapes and dtypes do not change.
        """
        return state

    def propose(
        self, state: Any, context: History, rows: SamplingRows, want: jax.Array, keys: jax.Array
    ) -> tuple[Draft, Any]:
        """Guess what follows `context`.

        Args:
          state: the drafter's own.
          context: all that is committed.
          rows: how each row is sampled; `process_logits` applies it.
          want: [B] i32 in 0..M, offer no more than this.
          keys: [B,M] random keys, one a token, for drafters that draw (`choose` takes them).

        How many are offered, and of which kind, may depend on all that came before, never on the
        guesses themselves: a drafter that stops where it was unsure of what it drew would bias
        rejection and block.

        Returns:
          The draft, and the state.
        """
        raise InvalidArgument(f"{type(self).__name__}.propose is missing: a drafter must have it")


def static(default: Any) -> Any:
    """A field of a Drafter that is no array: it is part of the compiled program."""
    return struct.field(pytree_node=False, default=default)


class NoDrafter(Drafter, kw_only=True):
    """Plain decoding: a round that offers nothing and commits one token."""

    num_draft: int = struct.field(pytree_node=False, default=0)

    def propose(
        self, state: Any, context: History, rows: SamplingRows, want: jax.Array, keys: jax.Array
    ) -> tuple[Draft, Any]:
        """Nothing."""
        return Draft(jnp.zeros((want.shape[0], 0), jnp.int32), jnp.zeros_like(want)), state
