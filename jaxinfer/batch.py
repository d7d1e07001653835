"""The loop: one batch of token ids from prefill to its last token. Text is no concern of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer import cache, memory, sharding, steps
from jaxinfer.config import ModelConfig
from jaxinfer.model import Params
from jaxinfer.outputs import TokenLogprob
from jaxinfer.requests import Request
from jaxinfer.sampling import MAX_LOGPROBS, sampling_rows


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights and what is needed to run them."""

    params: Params
    config: ModelConfig
    dtype: jnp.dtype  # of activations and cache
    mesh: Mesh | None
    vocab_limit: int  # ids from here on pad the logits

    @property
    def devices(self) -> list[jax.Device]:
        """Where the weights lie."""
        return sorted(jax.tree.leaves(self.params)[0].devices(), key=lambda d: d.id)

    def new_cache(self, batch: int, capacity: int) -> cache.KVCache:
        """An empty cache, refused with OutOfMemory where it cannot fit."""
        self.require_cache(batch, capacity)
        where = sharding.sharding("BKSH", self.mesh) if self.mesh else None
        return cache.init_cache(self.config, batch, capacity, self.dtype, where)

    def require_cache(self, batch: int, capacity: int) -> None:
        """Raise OutOfMemory unless there is room for such a cache."""
        memory.require(
            cache.cache_bytes(self.config, batch, capacity, self.dtype),
            f"a cache of {batch} rows x {capacity} tokens",
            "fewer prompts at once, shorter prompts or fewer max_tokens",
            self.devices,
        )

    def rows(self, count: int) -> int:
        """Batch size that holds `count` rows: a power of two, and a multiple of the data axis."""
        data = self.mesh.shape["data"] if self.mesh else 1
        return data * (1 << (-(-count // data) - 1).bit_length())


class Batch:
    """Rows that run together. Call `prefill`, then `advance` until all have ended."""

    def __init__(self, model: Model, requests: Sequence[Request]) -> None:
        self.model = model
        self.requests = requests
        self.started = time.perf_counter()
        self.first_token_seconds = self.prefill_seconds = self.decode_seconds = 0.0
        idle = dataclasses.replace(requests[0], prompt=[0], limit=1)  # pads the batch, never runs
        rows = [*requests, *[idle] * (model.rows(len(requests)) - len(requests))]
        self._lengths = np.array([len(r.prompt) for r in rows])
        self._done = np.array([len(r.prompt) >= r.limit for r in rows])
        self._limit = np.array([r.limit for r in rows])

        capacity = steps.capacity_for(max(min(r.limit, len(r.prompt) + 64) for r in rows))
        tokens = np.zeros((len(rows), capacity), np.int32)
        for b, r in enumerate(rows):
            tokens[b, : len(r.prompt)] = r.prompt
        self.state = steps.State(
            tokens=jnp.asarray(tokens),
            num_tokens=jnp.asarray(self._lengths, jnp.int32),
            prompt=jnp.asarray(self._lengths, jnp.int32),
            limit=jnp.asarray(self._limit, jnp.int32),
            done=jnp.asarray(self._done),
            cache=model.new_cache(len(rows), capacity),
            logprobs=self._logprobs(len(rows), capacity),
        )
        self.sampling = sampling_rows(
            [r.params for r in rows],
            samples=[r.sample for r in rows],
            seeds=[r.seed for r in rows],
            stop_ids=[r.stop_ids for r in rows],
            vocab_limit=model.vocab_limit,
        )

    def _logprobs(self, batch: int, capacity: int) -> steps.LogProbs | None:
        asked = [r.params.logprobs for r in self.requests if r.params.logprobs is not None]
        if not asked:
            return None
        top = (batch, capacity, min(MAX_LOGPROBS, self.model.config.vocab_size))
        return steps.LogProbs(
            jnp.zeros(top[:2], jnp.float32), jnp.zeros(top, jnp.float32), jnp.zeros(top, jnp.int32)
        )

    def prefill(self) -> None:
        """Put the prompts into the cache, in chunks of a few fixed widths."""
        begin = time.perf_counter()
        longest, fed = int(self._lengths.max()) - 1, 0  # the last token waits for the first step
        while fed < longest:
            width = steps.bucket(longest - fed, steps.PREFILL_WIDTHS)
            self.state = steps.prefill(
                self.model.params, self.state, config=self.model.config, width=width
            )
            fed += width
        jax.block_until_ready(self.state)
        self.prefill_seconds = time.perf_counter() - begin

    def advance(self, max_steps: int) -> list[list[int]]:
        """Run up to `max_steps` steps; the new token ids of each request."""
        begin = time.perf_counter()
        before = self._lengths
        room = self.state.tokens.shape[1] - int(before[~self._done].max(initial=0))
        if room <= 0:
            self._grow()
            room = self.state.tokens.shape[1] - int(before.max())
        self.state = steps.decode(
            self.model.params,
            self.state,
            self.sampling,
            jnp.int32(min(max_steps, room)),
            config=self.model.config,
            width=self._decode_width(),
        )
        tokens, self._lengths, self._done = jax.device_get(
            (self.state.tokens, self.state.num_tokens, self.state.done)
        )
        now = time.perf_counter()
        self.decode_seconds += now - begin
        if not self.first_token_seconds:
            self.first_token_seconds = now - self.started
        spans = zip(tokens, before, self._lengths, strict=True)
        return [row[a:b].tolist() for row, a, b in spans][: len(self.requests)]

    def _decode_width(self) -> int:
        # XLA:CPU runs a bfloat16 matrix times one row ten times slower than times two.
        alone = self.state.tokens.shape[0] == 1 and self.model.devices[0].platform == "cpu"
        return 2 if alone and self.model.dtype == jnp.bfloat16 else 1

    def _grow(self) -> None:
        capacity = 2 * self.state.tokens.shape[1]
        self.model.require_cache(self.state.tokens.shape[0], capacity)
        self.state = steps.grow(self.state, capacity=capacity)

    def stop(self, row: int) -> None:
        """End a row early: its text met a stop string."""
        self._done = self._done.copy()
        self._done[row] = True
        self.state = dataclasses.replace(self.state, done=jnp.asarray(self._done))

    def logprobs(self, row: int, count: int) -> list[TokenLogprob] | None:
        """Log-probabilities of the first `count` new tokens of a row, if it asked for them."""
        request = self.requests[row]
        if request.params.logprobs is None or self.state.logprobs is None:
            return None
        # Whole rows to the host first: a slice on the device is a program a length.
        row_of = jax.tree.map(
            lambda x: np.asarray(x)[row], (self.state.tokens, self.state.logprobs)
        )
        new = slice(len(request.prompt), len(request.prompt) + count)
        ids = row_of[0][new].tolist()
        chosen, top, top_ids = (x[new].tolist() for x in row_of[1])
        k = request.params.logprobs
        return [
            TokenLogprob(i, c, dict(zip(ti[:k], t[:k], strict=True)))
            for i, c, t, ti in zip(ids, chosen, top, top_ids, strict=True)
        ]
