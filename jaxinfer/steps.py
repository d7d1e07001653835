"""The jitted steps: prefill, decode, score; with their state, shape buckets and compile counting.

Invariant: the cache holds every committed token except the last one. So prefill feeds all of the
prompt but its last token and needs no logits, and a decode step feeds the last token and commits
the next. Shapes come in few sizes (`bucket`), so that a second prompt compiles nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.cache import KVCache
from jaxinfer.config import ModelConfig
from jaxinfer.model import Params, forward, forward_with_states, head
from jaxinfer.sampling import (
    STREAM_SAMPLE,
    History,
    SamplingRows,
    choose,
    process_logits,
)

PREFILL_WIDTHS = (16, 64, 256, 512)  # T; a longer prompt takes several chunks of the last
MIN_CAPACITY = 128  # S, then doubling


def bucket(count: int, sizes: tuple[int, ...]) -> int:
    """The smallest size that holds `count`, else the largest."""
    return next((s for s in sizes if count <= s), sizes[-1])


def capacity_for(tokens: int) -> int:
    """Cache slots for so many tokens: 128, 256, 512, ..."""
    return max(MIN_CAPACITY, 1 << (tokens - 1).bit_length())


class LogProbs(NamedTuple):
    """Log-probabilities of the model itself, before any processing, at the slot of each token."""

    chosen: jax.Array  # [B,S] f32
    top: jax.Array  # [B,S,k] f32, largest first
    top_ids: jax.Array  # [B,S,k] i32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that changes while a batch is generated; donated from step to step."""

    tokens: jax.Array  # [B,S] i32, committed: prompt then output
    num_tokens: jax.Array  # [B] i32, how many of them
    prompt: jax.Array  # [B] i32, how many of those are the prompt
    limit: jax.Array  # [B] i32, a row ends with this many tokens
    done: jax.Array  # [B] bool
    cache: KVCache  # lengths == num_tokens - 1 once the prompt is in
    logprobs: LogProbs | None  # None where no row asked for them

    @property
    def history(self) -> History:
        """What stands before the next token."""
        return History(self.tokens, self.num_tokens, self.prompt)

    def grow(self, capacity: int) -> State:
        """A copy with room for `capacity` tokens a row."""
        extra = capacity - self.tokens.shape[1]

        def pad(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))

        return dataclasses.replace(
            self,
            tokens=pad(self.tokens),
            cache=self.cache.grow(capacity),
            logprobs=jax.tree.map(pad, self.logprobs),
        )


# The old state is dead after each step: donating it lets the cache be updated where it lies.
@partial(jax.jit, static_argnames=("config", "width"), donate_argnames=("state",))
def prefill(params: Params, state: State, *, config: ModelConfig, width: int) -> State:
    """Put the next `width` prompt tokens of every row into the cache, all but the last of each."""
    start = state.cache.lengths
    slots = start[:, None] + jnp.arange(width)
    tokens = jnp.take_along_axis(state.tokens, slots, axis=1, mode="clip")
    num_new = jnp.clip(state.prompt - 1 - start, 0, width)
    _, cache = forward(params, tokens, num_new, state.cache, config=config)
    return dataclasses.replace(state, cache=cache)


@partial(jax.jit, static_argnames=("config", "width"), donate_argnames=("state",))
def decode(
    params: Params,
    state: State,
    rows: SamplingRows,
    max_steps: jax.Array,  # [] i32
    *,
    config: ModelConfig,
    width: int,
) -> State:
    """Commit up to `max_steps` tokens a row, in one compiled loop; a done row stays as it is.

    `width` is how many columns are fed, of which the first is the token: 1, but 2 where one row
    alone is the backend's slow path.
    """

    def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        i, state = carry
        last = jnp.take_along_axis(state.tokens, state.cache.lengths[:, None], axis=1)
        tokens = jnp.pad(last, [(0, 0), (0, width - 1)])
        num_new = jnp.where(state.done, 0, 1)
        hidden, cache = forward(params, tokens, num_new, state.cache, config=config)
        logits = head(params, hidden, config=config)[:, 0]
        scores = process_logits(logits, rows, state.history)
        token = choose(scores, rows, state.num_tokens, STREAM_SAMPLE)
        return i + 1, commit(dataclasses.replace(state, cache=cache), token, logits, rows)

    def running(carry: tuple[jax.Array, State]) -> jax.Array:
        i, state = carry
        return (i < max_steps) & ~jnp.all(state.done)

    return jax.lax.while_loop(running, step, (jnp.int32(0), state))[1]


def commit(state: State, token: jax.Array, logits: jax.Array, rows: SamplingRows) -> State:
    """Append token [B] to the rows that are not done, and end those that it ends."""
    b = jnp.arange(token.shape[0])
    slot = jnp.where(state.done, state.tokens.shape[1], state.num_tokens)  # done: dropped
    num_tokens = state.num_tokens + ~state.done
    ended = jnp.any(token[:, None] == rows.stop_ids, axis=1) | (num_tokens >= state.limit)
    logprobs = state.logprobs
    if logprobs is not None:
        logp = jax.nn.log_softmax(logits, axis=-1)
        top, top_ids = jax.lax.top_k(logp, logprobs.top.shape[-1])
        logprobs = LogProbs(
            logprobs.chosen.at[b, slot].set(logp[b, token], mode="drop"),
            logprobs.top.at[b, slot].set(top, mode="drop"),
            logprobs.top_ids.at[b, slot].set(top_ids, mode="drop"),
        )
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[b, slot].set(token, mode="drop"),
        num_tokens=num_tokens,
        done=state.done | ended,
        logprobs=logprobs,
    )


@partial(jax.jit, static_argnames=("config", "layers"), donate_argnames=("cache",))
def logits_and_states(
    params: Params,
    tokens: jax.Array,  # [B,T]
    num_new: jax.Array,  # [B]
    cache: KVCache,
    *,
    config: ModelConfig,
    layers: tuple[int, ...],
) -> tuple[jax.Array, dict[int, jax.Array], KVCache]:
    """Logits [B,T,V] of every position, and the residual stream [B,T,D] behind `layers`."""
    hidden, cache, states = forward_with_states(
        params, tokens, num_new, cache, config=config, layers=layers
    )
    return head(params, hidden, config=config), states, cache


@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def score(
    params: Params,
    tokens: jax.Array,  # [B,T]
    targets: jax.Array,  # [B,T], the tokens that follow
    num_new: jax.Array,  # [B]
    cache: KVCache,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, KVCache]:
    """Log-probability [B,T] f32 of each target; logits exist for a few positions at a time."""
    hidden, cache = forward(params, tokens, num_new, cache, config=config)

    def few(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = chunk  # [B,16,D], [B,16]
        logits = head(params, hidden, config=config)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    def split(x: jax.Array) -> jax.Array:  # [B,T,...] -> [T/16,B,16,...]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, PREFILL_WIDTHS[0], *x.shape[2:]), 1, 0)

    scores = jnp.moveaxis(jax.lax.map(few, (split(hidden), split(targets))), 0, 1)
    return scores.reshape(targets.shape), cache


@partial(jax.jit, static_argnames=("capacity",))
def grow(state: State, *, capacity: int) -> State:
    """A copy with room for `capacity` tokens a row."""
    return state.grow(capacity)


def enable_compile_cache(folder: Path) -> None:
    """Keep compiled programs in `folder` across processes, unless the user chose a folder."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Many small programs make up a first token; each is worth keeping.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that gains an entry for every program compiled inside the `with` block."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(kwargs.get("fun_name", "?")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
