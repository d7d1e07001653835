"""A second, smaller model that drafts, with a cache of its own (arXiv 2211.17192, 2302.01318)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.attend import XLA, Kernels
from jaxinfer.cache import KVCache, init_cache
from jaxinfer.config import ModelConfig
from jaxinfer.model import Params, forward, head
from jaxinfer.sampling import History, SamplingRows, choose, probabilities, process_logits
from jaxinfer.speculative.drafter import Draft, Drafter, static
from jaxinfer.speculative.vocab import VocabMap

CATCH_UP = 16  # T of the forwards that read what the drafter has not seen yet
STEP = 2  # T of a drafting forward: after a full acceptance two tokens are unread


class DraftState(NamedTuple):
    """What the drafter has read; S' slots a row."""

    tokens: jax.Array  # [B,S'] i32, the committed text in the drafter's own ids
    num: jax.Array  # [B] i32, how many of them
    taken: jax.Array  # [B] i32, how many of the target's tokens they stand for
    cache: KVCache  # a prefix of those tokens, at most all but the last


class ModelDrafter(Drafter, kw_only=True):
    """Drafts with any model; `drafters.model_drafter` makes one from an LLM.

    It samples from its own distribution behind the same logits pipeline as the target, so that
    penalties, bias and cuts mean the same to both.
    """

    params: Params
    vocab: VocabMap
    config: ModelConfig = static(None)
    dtype: Any = static(None)
    kernels: Kernels = static(XLA)

    @property
    def draws(self) -> bool:
        """Its drafts carry probs."""
        return True

    def init(self, batch: int, capacity: int) -> DraftState:
        """Room for every token; for several pieces a token where the vocabularies differ."""
        slots = capacity if self.vocab.own.shape[1] == 1 else 2 * capacity
        zero = jnp.zeros((batch,), jnp.int32)
        return DraftState(
            tokens=jnp.zeros((batch, slots), jnp.int32),
            num=zero,
            taken=jnp.zeros_like(zero),
            cache=init_cache(self.config, batch, slots, self.dtype, kernels=self.kernels),
        )

    def observe(
        self, state: DraftState, context: History, num_new: jax.Array, hidden: jax.Array | None
    ) -> DraftState:
        """Forget the refused part of the draft and take the committed tokens in; see Drafter.

        A prompt is read at once, in the chunks of the target; after a round `propose` reads.
        """
        # The target read the last token and the accepted drafts, which were fed here one for one.
        lengths = jnp.minimum(state.cache.lengths, state.num + num_new - 1)
        lengths = jnp.maximum(lengths, 0)
        state = state._replace(cache=dataclasses.replace(state.cache, lengths=lengths))
        width = hidden.shape[1] if hidden is not None else CATCH_UP
        state = self._take(state, context, width)
        # Where it has no word for what came last, it speaks again behind the word before.
        lengths = jnp.clip(state.num - 1, 0, state.cache.lengths)
        state = state._replace(cache=dataclasses.replace(state.cache, lengths=lengths))
        if width < CATCH_UP:
            return state
        return self._read(state, state.num > 0, width)

    def propose(
        self,
        state: DraftState,
        context: History,
        rows: SamplingRows,
        want: jax.Array,
        keys: jax.Array,
    ) -> tuple[Draft, DraftState]:
        """See Drafter; the drafts of a greedy row are greedy."""
        size = want.shape[0], self.max_draft
        state = self._take(state, context, CATCH_UP)  # a prompt of one token has no prefill
        room = min(state.tokens.shape[1], self.config.max_len)
        want = jnp.where(state.num + want <= room, want, 0)  # past its own context it is silent
        state = self._read(state, want > 0, CATCH_UP)
        b = jnp.arange(size[0])
        vocab = self.vocab.own.shape[0]
        first = state.num

        def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            state, history, tokens, probs = carry
            lag = state.num - state.cache.lengths  # 1, or 2 behind a full acceptance
            goes_on = i < want
            state, hidden = self._feed(state, jnp.where(goes_on, lag, 0), STEP)
            last = jnp.take_along_axis(hidden, jnp.maximum(lag - 1, 0)[:, None, None], axis=1)
            scores = process_logits(self._logits(last, vocab), rows, history)
            key = jax.lax.dynamic_slice_in_dim(keys, i, 1, axis=1)
            token = choose(scores, rows, key)[:, 0]
            probs = jax.lax.dynamic_update_slice_in_dim(probs, probabilities(scores, rows), i, 1)
            tokens = tokens.at[:, i].set(token)
            at = jnp.where(goes_on, history.length, history.tokens.shape[1])
            own = jnp.where(goes_on, state.num, state.tokens.shape[1])
            history = history._replace(
                tokens=history.tokens.at[b, at].set(token, mode="drop"),
                length=history.length + goes_on,
            )
            state = state._replace(
                tokens=state.tokens.at[b, own].set(self.vocab.own[token, 0], mode="drop"),
                num=state.num + goes_on,
            )
            return state, history, tokens, probs

        empty = jnp.zeros(size, jnp.int32), jnp.zeros((*size, vocab), jnp.float32)
        state, _, tokens, probs = jax.lax.fori_loop(
            0, jnp.max(want), step, (state, context, *empty)
        )
        return Draft(tokens, want, probs), state._replace(num=first)

    def _logits(self, hidden: jax.Array, vocab: int) -> jax.Array:
        """Logits [B,T,V] over the target's ids; what the drafter cannot say has -inf."""
        own = head(self.params, hidden, config=self.config)  # [B,T,U]
        if self.vocab.target is None:  # nothing moves: on a mesh each device keeps its part
            missing = max(0, vocab - own.shape[2])
            return jnp.pad(
                own[..., :vocab], [(0, 0), (0, 0), (0, missing)], constant_values=-jnp.inf
            )
        nothing = jnp.full((*own.shape[:2], vocab), -jnp.inf)
        return nothing.at[..., self.vocab.target].set(own, mode="drop")

    def _take(self, state: DraftState, context: History, width: int) -> DraftState:
        """Spell the committed tokens that are new in the drafter's ids, `width` at a time."""
        b = jnp.arange(state.num.shape[0])[:, None, None]
        t = jnp.arange(width)

        def some(state: DraftState) -> DraftState:
            slots = state.taken[:, None] + t
            ids = jnp.take_along_axis(context.tokens, slots, axis=1, mode="clip")
            new = slots < context.length[:, None]  # [B,T]
            pieces = jnp.where(new[..., None], self.vocab.own[ids], -1)  # [B,T,E]
            count = (pieces >= 0).sum(-1)
            before = jnp.cumsum(count, axis=1) - count
            at = (state.num[:, None] + before)[..., None] + jnp.arange(pieces.shape[-1])
            at = jnp.where(pieces >= 0, at, state.tokens.shape[1])
            return state._replace(
                tokens=state.tokens.at[b, at].set(pieces, mode="drop"),
                num=state.num + count.sum(1),
                taken=state.taken + new.sum(1),
            )

        return jax.lax.while_loop(lambda s: jnp.any(s.taken < context.length), some, state)

    def _read(self, state: DraftState, rows: jax.Array, width: int) -> DraftState:
        """Feed what is unread of `rows` [B] but for the last two tokens, which `propose` feeds."""

        def unread(state: DraftState) -> jax.Array:
            rest = jnp.where(rows, state.num - state.cache.lengths, 0)
            fits = state.num <= state.tokens.shape[1]
            return jnp.where(fits & (rest > STEP), rest - 1, 0)

        def some(state: DraftState) -> DraftState:
            return self._feed(state, jnp.minimum(unread(state), width), width)[0]

        return jax.lax.while_loop(lambda s: jnp.any(unread(s) > 0), some, state)

    def _feed(
        self, state: DraftState, num_new: jax.Array, width: int
    ) -> tuple[DraftState, jax.Array]:
        """Read num_new [B] tokens; hidden states [B,width,D]."""
        slots = state.cache.lengths[:, None] + jnp.arange(width)
        tokens = jnp.take_along_axis(state.tokens, slots, axis=1, mode="clip")
        hidden, cache = forward(self.params, tokens, num_new, state.cache, config=self.config)
        return state._replace(cache=cache), hidden
