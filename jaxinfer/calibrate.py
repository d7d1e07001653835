"""Measures what a round of each width costs here, with the very programs that will run."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.batch import Model, new_run
from jaxinfer.sampling import STREAM_SAMPLE, SamplingRows, greedy_rows, row_keys
from jaxinfer.speculative import round as speculative
from jaxinfer.speculative.costs import Costs
from jaxinfer.speculative.drafter import Drafter, NoDrafter
from jaxinfer.speculative.speculation import Speculation

RUNS = 5  # of each width, after one that may compile
MANY = 12  # tokens of a call that runs rounds one after the other; or two rounds, if wider
LEAST = 0.1  # of a call of one round: what a round takes at least, whatever is taken off
PROMPT = 16  # tokens, all the same one: any n-gram of them has been seen


def measure(model: Model, speculation: Speculation, batch: int, capacity: int) -> Costs:
    """Seconds of a round of each width, for batches of this size; some sixty rounds at most."""
    drafter, plan = speculation.drafter, speculation.plan(model.narrow(batch))
    # All lengths cost the same and tokens are worth something: a draft is as long as it may be.
    even = Costs((1.0,) * len(plan.widths))
    start = min(PROMPT, capacity // 2)
    run = new_run(
        model,
        speculation,
        plan,
        even,
        prompts=[[0] * start] * batch,
        limits=[capacity] * batch,
        capacity=capacity,
        logprobs=False,
    )
    rows, drafter = model.place((greedy_rows(batch, model.vocab_limit), drafter))

    def one_call(room: int, max_new: int) -> float:
        """Seconds of rounds until a row has max_new more tokens, of `room` that it may have."""
        nonlocal run
        lengths = jnp.full((batch,), start, jnp.int32)
        state = dataclasses.replace(
            run.state,
            tokens=jnp.zeros_like(run.state.tokens),
            num_tokens=lengths,
            limit=lengths + room,
            done=jnp.zeros((batch,), bool),
            cache=dataclasses.replace(run.state.cache, lengths=lengths - 1),
        )
        counts = dataclasses.replace(run.counts, widths=jnp.zeros_like(run.counts.widths))
        run = dataclasses.replace(run, state=state, counts=counts)
        run = jax.block_until_ready(model.place(run))
        begin = time.perf_counter()
        run = jax.block_until_ready(
            speculative.rounds(
                model.params,
                run,
                rows,
                drafter,
                np.int32(max_new),
                config=model.config,
                plan=plan,
            )
        )
        return time.perf_counter() - begin

    empty = _draft_seconds(NoDrafter(), run, rows, 0)  # what a call costs, not what it does

    def drafting_seconds(run: speculative.Run) -> tuple[float, float]:
        none, full = (_draft_seconds(drafter, run, rows, n) for n in (0, drafter.max_draft))
        return max(none - empty, 0.0), max(full - empty, 0.0)

    draft = drafting_seconds(run)
    single = [_median(partial(one_call, width, 1)) for width in plan.widths]
    nothing = _median(partial(one_call, 1, 0))
    room = capacity - start
    tokens = min(max(MANY, plan.widths[-1] + 1), room)
    many = statistics.median(one_call(room, tokens) for _ in range(3))
    rounds = jax.device_get(run.counts.widths).tolist()
    call = max(nothing, call_seconds(single, many, rounds))
    most = max(1, plan.widths[-1] - 1)
    drafting = [draft[0] + (draft[1] - draft[0]) * (w - 1) / most for w in plan.widths]
    verify = tuple(max(a - call - b, LEAST * a) for a, b in zip(single, drafting, strict=True))
    # In a text without a repetition a fallback asks its second drafter, which may cost much more.
    unlike = jnp.broadcast_to(jnp.arange(capacity) % model.vocab_limit, run.state.tokens.shape)
    state = dataclasses.replace(run.state, tokens=unlike.astype(jnp.int32))
    other = drafting_seconds(model.place(dataclasses.replace(run, state=state)))
    return Costs(verify, (max(draft[0], other[0]), max(draft[1], other[1])))


def call_seconds(single: Sequence[float], many: float, rounds: Sequence[int]) -> float:
    """What a call costs beside its rounds; 0 where it cannot be told.

    More than to enter and to leave: a round alone finds threads asleep.

    Args:
      single: seconds of a call of one round, of each width.
      many: seconds of one call of several rounds.
      rounds: how many of each width those were; one alone tells nothing.
    """
    count = sum(rounds)
    if count < 2:
        return 0.0
    apart = sum(n * seconds for n, seconds in zip(rounds, single, strict=True))
    return max(apart - many, 0.0) / (count - 1)


def _draft_seconds(drafter: Drafter, run: speculative.Run, rows: SamplingRows, want: int) -> float:
    """Seconds of one `propose`."""
    wanted = np.full(rows.seed.shape, want, np.int32)

    def propose() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(_propose(drafter, run, rows, wanted))
        return time.perf_counter() - begin

    return _median(propose)


@jax.jit
def _propose(drafter: Drafter, run: speculative.Run, rows: SamplingRows, want: jax.Array) -> Any:
    state = run.state
    at = state.num_tokens[:, None] + jnp.arange(drafter.max_draft)
    keys = row_keys(rows, at, STREAM_SAMPLE)
    # A few small results: a state that came back would be a copy of it.
    draft, _ = drafter.propose(run.drafter, state.history, rows, want, keys)
    return draft.num, draft.tokens


def _median(run: Callable[[], float]) -> float:
    run()
    return statistics.median(run() for _ in range(RUNS))
