"""The state of a batch, its shape buckets, the jitted steps for research, and compile counting.

Invariant: the cache holds every committed token except the last one. So prefill feeds all of the
prompt but its last token and needs no logits, and a round feeds the last token and commits the
next (`speculative/round.py`). Shapes come in few sizes (`bucket`), so that a second prompt compiles
nothing.
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

from jaxinfer.cache import MAX_BLOCK, KVCache, pin
from jaxinfer.config import ModelConfig
from jaxinfer.model import Params, forward, forward_with_states, head
from jaxinfer.sampling import History

PREFILL_WIDTHS = (16, 64, 256, MAX_BLOCK)  # T; a longer prompt takes several chunks of the last
MIN_CAPACITY = 128  # S, of a cache


def bucket(count: int, sizes: tuple[int, ...]) -> int:
    """The smallest size that holds `count`, else the largest."""
    return next((s for s in sizes if count <= s), sizes[-1])


def capacity_for(tokens: int) -> int:
    """Cache slots for so many tokens: 128, 256, 512, 768, 1024, 1536, 2048, 3072, ...

    Attention reads all of them, so a long cache is filled to two thirds at least; a short one
    doubles, since each size is a program to compile.
    """
    size = max(MIN_CAPACITY, 1 << (tokens - 1).bit_length())
    less = 3 * size // 4
    return less if size >= 1024 and tokens <= less else size


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
    drafted: jax.Array  # [B,S] bool, which tokens were a draft
    cache: KVCache  # lengths == num_tokens - 1 once the prompt is in
    logprobs: LogProbs | None  # None where no row asked for them

    @property
    def history(self) -> History:
        """What stands before the next token."""
        return History(self.tokens, self.num_tokens, self.prompt)

    def grow(self, config: ModelConfig, capacity: int) -> State:
        """A copy with room for `capacity` tokens a row."""
        extra = capacity - self.tokens.shape[1]

        def pad(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))

        return dataclasses.replace(
            self,
            tokens=pad(self.tokens),
            drafted=pad(self.drafted),
            cache=self.cache.grow(config, capacity),
            logprobs=jax.tree.map(pad, self.logprobs),
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
    return head(params, hidden, config=config), states, pin(cache, cache.kernels.layout)


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
    return pin((scores.reshape(targets.shape), cache), cache.kernels.layout)


@partial(jax.jit, static_argnames=("config", "capacity"))
def grow(state: State, *, config: ModelConfig, capacity: int) -> State:
    """A copy with room for `capacity` tokens a row."""
    return pin(state.grow(config, capacity), state.cache.kernels.layout)


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
