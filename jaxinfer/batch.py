"""One batch of token ids from prefill to its last token, as the host sees it. Text comes later."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import cache, memory, steps
from jaxinfer.attend import Kernels, Store
from jaxinfer.config import ModelConfig
from jaxinfer.errors import InvalidArgument
from jaxinfer.model import Params, forward
from jaxinfer.outputs import Stats, TokenLogprob
from jaxinfer.requests import Request
from jaxinfer.sampling import MAX_LOGPROBS, sampling_rows
from jaxinfer.sharding import Layout, put
from jaxinfer.speculative import round as speculative
from jaxinfer.speculative.costs import Costs
from jaxinfer.speculative.drafter import Drafter
from jaxinfer.speculative.pace import new_pace
from jaxinfer.speculative.speculation import Speculation
from pallas_kernels import Impl, UnsupportedError


class New(NamedTuple):
    """What a look at a running row finds."""

    token_ids: list[int]
    drafted: list[bool]  # which of them a draft had offered


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights and what is needed to run them."""

    params: Params = dataclasses.field(repr=False)
    config: ModelConfig
    dtype: jnp.dtype  # of activations, and of the cache unless `store` says otherwise
    layout: Layout
    vocab_limit: int  # ids from here on pad the logits
    impl: Impl = "xla"  # of the attention kernels
    store: Store | None = None  # how the cache is kept, see `Kernels`

    @property
    def devices(self) -> list[jax.Device]:
        """Where the weights lie."""
        return sorted(jax.tree.leaves(self.params)[0].sharding.device_set, key=lambda d: d.id)

    def kernels(self, exact: bool = False) -> Kernels:
        """How attention writes and reads a cache of this model."""
        return Kernels(
            self.impl,
            write_first=exact,
            layout=self.layout,
            store=self.store,
            whole=self.layout.platform == "cpu",
        )

    def check_kernels(self) -> None:
        """Raise InvalidArgument where the kernels asked for do not cover this model."""
        if self.impl in ("xla", "auto"):  # one covers everything, the other gives way to it
            return
        rows = self.layout.parts("B")

        def step(width: int, params: Params) -> None:
            held = cache.init_cache(
                self.config, rows, cache.MAX_BLOCK, self.dtype, kernels=self.kernels()
            )
            num_new = jnp.full((rows,), width)
            tokens = jnp.zeros((rows, width), jnp.int32)
            forward(params, tokens, num_new, held, config=self.config)

        try:
            for width in (1, cache.MAX_BLOCK):
                jax.eval_shape(partial(step, width), self.params)
        except UnsupportedError as error:
            raise InvalidArgument(f"kernels={self.impl!r}: {error}") from error

    @property
    def own_device(self) -> jax.Device:
        """The first of the devices that belongs to this process."""
        return next(d for d in self.devices if d.process_index == jax.process_index())

    def new_cache(self, batch: int, capacity: int, *, exact: bool = False) -> cache.KVCache:
        """An empty cache, refused with OutOfMemory where it cannot fit."""
        self.require_cache(batch, capacity)
        return self.empty_cache(batch, capacity, exact=exact)

    def empty_cache(self, batch: int, capacity: int, *, exact: bool = False) -> cache.KVCache:
        """An empty cache, or under `jax.eval_shape` its shapes."""
        return cache.init_cache(self.config, batch, capacity, self.dtype, self.kernels(exact))

    def require_cache(self, batch: int, capacity: int) -> None:
        """Raise OutOfMemory unless there is room for such a cache."""
        memory.require(
            cache.cache_bytes(self.config, batch, capacity, self.dtype, self.store)
            // (self.layout.parts("B") * self.layout.parts("K")),
            f"a cache of {batch} rows x {capacity} tokens",
            "fewer prompts at once, shorter prompts or fewer max_tokens",
            self.devices,
        )

    def place(self, tree: Any) -> Any:
        """Values of the host bound to the model's devices, as every result of a step is: else the
        first call would be another program than the next. What lies there stays as it is."""
        if self.layout.mesh:
            return jax.tree.map(put, tree, cache.shardings(tree, self.layout))
        return jax.device_put(tree, self.devices[0])

    def narrow(self, batch: int) -> int:
        """The cheapest T for one token a row: XLA:CPU runs a bfloat16 matrix times one row ten
        times slower than times two."""
        alone = batch == 1 and self.devices[0].platform == "cpu"
        return 2 if alone and self.dtype == jnp.bfloat16 else 1

    def rows(self, count: int) -> int:
        """Batch size that holds `count` rows."""
        return batch_rows(count, self.layout)


def batch_rows(count: int, layout: Layout) -> int:
    """Batch size that holds `count` rows: a power of two for each device along the batch."""
    parts = layout.parts("B")
    return parts * (1 << (-(-count // parts) - 1).bit_length())


def capacity_of(rows: Sequence[Request], speculation: Speculation) -> int:
    """Cache slots for these rows, to begin with.

    A row may end early, so its cache starts small and grows. A drafter's own state does not grow,
    and in exact mode a growth would come at another token than without a draft.
    """
    whole = speculation.exact or bool(jax.tree.leaves(_drafter_state(speculation.drafter, 1, 1)))
    return steps.capacity_for(
        max(r.limit if whole else min(r.limit, len(r.prompt) + 64) for r in rows)
    )


def _drafter_state(drafter: Drafter, batch: int, capacity: int) -> Any:
    """Shapes of a drafter's state; InvalidArgument where it holds what is no array."""
    try:
        return jax.eval_shape(lambda: drafter.init(batch, capacity))
    except TypeError as error:
        told = str(error).splitlines()[0]
        name = type(drafter).__name__
        raise InvalidArgument(f"{name}.init: must return a pytree of arrays: {told}") from error


def new_run(
    model: Model,
    speculation: Speculation,
    plan: speculative.Plan,
    costs: Costs,
    *,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    capacity: int,
    logprobs: bool,
) -> speculative.Run:
    """A batch before its prefill, on the model's devices; OutOfMemory where it cannot fit."""
    size = len(prompts)
    model.require_cache(size, capacity)
    state_of_drafter = _drafter_state(speculation.drafter, size, capacity)
    where = cache.shardings(state_of_drafter, model.layout)
    each = jax.tree.map(
        lambda x, cut: math.prod(cut.shard_shape(x.shape)) * x.dtype.itemsize,
        state_of_drafter,
        where,
    )
    memory.require(
        sum(jax.tree.leaves(each)),
        f"the drafter's memory of {size} rows x {capacity} tokens",
        "fewer prompts at once, shorter prompts or fewer max_tokens, or another drafter",
        model.devices,
    )
    run = make_run(
        model,
        speculation,
        plan,
        costs,
        prompts=prompts,
        limits=limits,
        capacity=capacity,
        logprobs=logprobs,
    )
    return model.place(run)


def make_run(
    model: Model,
    speculation: Speculation,
    plan: speculative.Plan,
    costs: Costs,
    *,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    capacity: int,
    logprobs: bool,
) -> speculative.Run:
    """The arrays of `new_run`; under `jax.eval_shape` nothing but their shapes."""
    size = len(prompts)
    tokens = np.zeros((size, capacity), np.int32)
    for b, prompt in enumerate(prompts):
        tokens[b, : len(prompt)] = prompt
    lengths = np.array([len(p) for p in prompts], np.int32)
    top = (size, capacity, min(MAX_LOGPROBS, model.config.vocab_size))
    state = steps.State(
        tokens=jnp.asarray(tokens),
        num_tokens=jnp.asarray(lengths),
        prompt=jnp.asarray(lengths),
        limit=jnp.asarray(limits, jnp.int32),
        done=jnp.asarray(lengths >= np.array(limits)),
        drafted=jnp.zeros((size, capacity), bool),
        cache=model.empty_cache(size, capacity, exact=speculation.exact),
        logprobs=steps.LogProbs(
            jnp.zeros(top[:2], jnp.float32), jnp.zeros(top, jnp.float32), jnp.zeros(top, jnp.int32)
        )
        if logprobs
        else None,
    )
    counts = speculative.Counts(
        drafted=jnp.zeros((size,), jnp.int32),
        widths=jnp.zeros((len(plan.widths),), jnp.int32),
    )
    drafter = speculation.drafter
    pace = new_pace(size, drafter.kinds, *costs.by_length(drafter.max_draft, plan.widths))
    return speculative.Run(state, drafter.init(size, capacity), pace, counts)


class Batch:
    """Rows that run together. Call `prefill`, then `advance` until all have ended."""

    def __init__(
        self, model: Model, requests: Sequence[Request], speculation: Speculation, costs: Costs
    ) -> None:
        self.model = model
        self.requests = requests
        self.drafter = model.place(speculation.drafter)
        self.speculation = speculation
        self.costs = costs
        self.started = time.perf_counter()
        self.first_token_seconds = self.prefill_seconds = self.decode_seconds = 0.0
        idle = dataclasses.replace(requests[0], prompt=[0], limit=1)  # pads the batch, never runs
        rows = [*requests, *[idle] * (model.rows(len(requests)) - len(requests))]
        self._lengths = np.array([len(r.prompt) for r in rows])
        self._done = np.array([len(r.prompt) >= r.limit for r in rows])
        self.plan = speculation.plan(model.narrow(len(rows)))

        self.run = new_run(
            model,
            speculation,
            self.plan,
            costs,
            prompts=[r.prompt for r in rows],
            limits=[r.limit for r in rows],
            capacity=capacity_of(rows, speculation),
            logprobs=any(r.params.logprobs is not None for r in requests),
        )
        self.sampling = model.place(
            sampling_rows(
                [r.params for r in rows],
                samples=[r.sample for r in rows],
                seeds=[r.seed for r in rows],
                stop_ids=[r.stop_ids for r in rows],
                vocab_limit=model.vocab_limit,
            )
        )

    def prefill(self) -> None:
        """Put the prompts into the cache, in chunks of a few fixed widths."""
        begin = time.perf_counter()
        longest, fed = int(self._lengths.max()) - 1, 0  # the last token waits for the first round
        while fed < longest:
            width = steps.bucket(longest - fed, steps.PREFILL_WIDTHS)
            self.run = speculative.prefill(
                self.model.params,
                self.run,
                self.drafter,
                config=self.model.config,
                width=width,
            )
            fed += width
        jax.block_until_ready(self.run)
        self.prefill_seconds = time.perf_counter() - begin

    def advance(self, max_new: int) -> list[New]:
        """Run rounds until a row has `max_new` more tokens; what is new in each request's row."""
        begin = time.perf_counter()
        before = self._lengths
        if (self._lengths[~self._done] >= self.run.state.tokens.shape[1]).any():
            self._grow()
        self.run = speculative.rounds(
            self.model.params,
            self.run,
            self.sampling,
            self.drafter,
            np.int32(max_new),
            config=self.model.config,
            plan=self.plan,
        )
        state = self.run.state
        tokens, drafted, self._lengths, self._done = jax.device_get(
            (state.tokens, state.drafted, state.num_tokens, state.done)
        )
        now = time.perf_counter()
        self.decode_seconds += now - begin
        if not self.first_token_seconds:
            self.first_token_seconds = now - self.started
        spans = [slice(a, b) for a, b in zip(before, self._lengths, strict=True)]
        rows = zip(tokens, drafted, spans, strict=True)
        new = [New(ids[span].tolist(), marks[span].tolist()) for ids, marks, span in rows]
        return new[: len(self.requests)]

    def _grow(self) -> None:
        state = self.run.state
        capacity = steps.capacity_for(state.tokens.shape[1] + 1)
        self.model.require_cache(state.tokens.shape[0], capacity)
        state = steps.grow(state, config=self.model.config, capacity=capacity)
        self.run = dataclasses.replace(self.run, state=state)

    def stop(self, row: int) -> None:
        """End a row early: its text met a stop string."""
        self._done = self._done.copy()
        self._done[row] = True
        state = dataclasses.replace(self.run.state, done=jnp.asarray(self._done))
        self.run = self.model.place(dataclasses.replace(self.run, state=state))

    def logprobs(self, row: int, count: int) -> list[TokenLogprob] | None:
        """Log-probabilities of the first `count` new tokens of a row, if it asked for them."""
        request, state = self.requests[row], self.run.state
        if request.params.logprobs is None or state.logprobs is None:
            return None
        # Whole rows to the host first: a slice on the device is a program a length.
        row_of = jax.tree.map(lambda x: np.asarray(x)[row], (state.tokens, state.logprobs))
        new = slice(len(request.prompt), len(request.prompt) + count)
        ids = row_of[0][new].tolist()
        chosen, top, top_ids = (x[new].tolist() for x in row_of[1])
        k = request.params.logprobs
        return [
            TokenLogprob(i, c, dict(zip(ti[:k], t[:k], strict=True)))
            for i, c, t, ti in zip(ids, chosen, top, top_ids, strict=True)
        ]

    def stats(self, row: int, drafted: Sequence[bool]) -> Stats:
        """Counts of a row whose new tokens are, one by one, `drafted`; and the batch's times."""
        done: speculative.Counts = jax.device_get(self.run.counts)
        draft, verify = self.costs.split(
            self.decode_seconds, done.widths.tolist(), self.plan.widths
        )
        count, accepted = len(drafted), sum(drafted)
        # A round ends with a token of the target's own, unless the text ended before it.
        rounds = count - accepted + bool(drafted and drafted[-1])
        by_position = [0] * self.speculation.drafter.max_draft
        at = 0
        for mark in drafted:
            at = at + 1 if mark else 0
            if mark:
                by_position[at - 1] += 1
        return Stats(
            prompt_tokens=len(self.requests[row].prompt),
            new_tokens=count,
            first_token_seconds=self.first_token_seconds,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            tokens_per_second=count / self.decode_seconds,
            rounds=rounds,
            drafted=int(done.drafted[row]),
            accepted=accepted,
            accepted_by_position=by_position,
            tokens_per_round=count / max(1, rounds),
            draft_seconds=draft,
            verify_seconds=verify,
        )
