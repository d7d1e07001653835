"""The loop: rounds of draft, verify and commit, compiled as a whole.

    propose -> forward(last token + draft) -> verify -> rewind what was refused -> observe

A round commits between one token and the whole draft and one more. Plain decoding is the round of
`NoDrafter`. Each round runs the narrowest of a few compiled widths that holds the longest draft of
the batch, so a round without a draft costs what a plain step does.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.cache import pin
from jaxinfer.config import ModelConfig
from jaxinfer.model import Params, forward, head
from jaxinfer.sampling import (
    STREAM_DRAFT,
    STREAM_SAMPLE,
    History,
    SamplingRows,
    process_logits,
    row_keys,
)
from jaxinfer.sharding import Layout
from jaxinfer.speculative.drafter import Draft, Drafter
from jaxinfer.speculative.pace import Pace
from jaxinfer.speculative.verify import VERIFIERS, Accepted
from jaxinfer.steps import State
from jaxinfer.xla import only_if


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What happened so far, a row."""

    drafted: jax.Array  # [B] i32, tokens offered and judged
    widths: jax.Array  # [W] i32, rounds of the whole batch at each width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that changes while a batch is generated; donated from call to call."""

    state: State
    drafter: Any  # the drafter's own state
    pace: Pace
    counts: Counts


@dataclasses.dataclass(frozen=True)
class Plan:
    """How rounds are run: what is compiled in."""

    verifier: str  # of VERIFIERS
    widths: tuple[int, ...]  # T of a verifying forward, ascending; the last holds a whole draft
    # Exact mode: every forward has this T, whatever the draft; then a token's logits are the same
    # bits however many came with it, as long as the cache is written first (`Kernels`). None: a
    # forward has the round's width.
    canonical: int | None = None


# The old run is dead after each call: donating it lets the cache be updated where it lies.
@partial(jax.jit, static_argnames=("config", "width"), donate_argnames=("run",))
def prefill(params: Params, run: Run, drafter: Drafter, *, config: ModelConfig, width: int) -> Run:
    """Put the next `width` prompt tokens of every row into the cache, all but the last of each."""
    state = run.state
    start = state.cache.lengths
    slots = start[:, None] + jnp.arange(width)
    tokens = jnp.take_along_axis(state.tokens, slots, axis=1, mode="clip")
    num_new = jnp.clip(state.prompt - 1 - start, 0, width)
    hidden, cache = forward(params, tokens, num_new, state.cache, config=config)
    state = dataclasses.replace(state, cache=cache)
    own = drafter.observe(run.drafter, state.history, num_new, hidden)
    return pin(dataclasses.replace(run, state=state, drafter=own), cache.kernels.layout)


@partial(jax.jit, static_argnames=("config", "plan"), donate_argnames=("run",))
def rounds(
    params: Params,
    run: Run,
    rows: SamplingRows,
    drafter: Drafter,
    max_new: jax.Array,  # [] i32
    *,
    config: ModelConfig,
    plan: Plan,
) -> Run:
    """Rounds until a row has `max_new` more tokens, or none goes on; a done row stays as it is."""
    before = run.state.num_tokens

    def running(run: Run) -> jax.Array:
        state = run.state
        room = jnp.all(state.done | (state.num_tokens < state.tokens.shape[1]))
        return room & ~jnp.all(state.done) & (jnp.max(state.num_tokens - before) < max_new)

    step = partial(_round, params, rows, drafter, config=config, plan=plan)
    return pin(jax.lax.while_loop(running, step, run), run.state.cache.kernels.layout)


def _round(
    params: Params,
    rows: SamplingRows,
    drafter: Drafter,
    run: Run,
    *,
    config: ModelConfig,
    plan: Plan,
) -> Run:
    state, pace = run.state, run.pace
    # One token always comes from the target, so a draft is worth one less than what is left.
    left = jnp.minimum(state.limit, state.tokens.shape[1]) - state.num_tokens - 1
    want = jnp.where(state.done, 0, jnp.clip(left, 0, drafter.max_draft))
    if drafter.num_draft == "auto":
        want = jnp.minimum(want, pace.before(want, state.done))
    # An exact verifier compares with the plain sample: a drafter that uses its noise agrees more.
    stream = STREAM_SAMPLE if plan.verifier == "exact" else STREAM_DRAFT
    at = state.num_tokens[:, None] + jnp.arange(drafter.max_draft)
    keys = row_keys(rows, at, stream, state.num_tokens)
    draft, own = drafter.propose(run.drafter, state.history, rows, want, keys)
    # A draft ends before an id that is none: whoever wrote the drafter, it does no harm.
    known = (draft.tokens >= 0) & (draft.tokens < config.vocab_size)
    whole = jnp.cumprod(known, axis=1, dtype=jnp.int32).sum(axis=1)
    draft = draft._replace(
        num=jnp.clip(jnp.minimum(draft.num, whole), 0, want),
        probs=None if plan.verifier == "exact" else draft.probs,  # it does not look at them
    )
    kind = jnp.zeros_like(want) if draft.kind is None else draft.kind
    kind = jnp.clip(kind, 0, len(drafter.kinds) - 1)
    if drafter.num_draft == "auto":
        most = pace.after(draft.num, kind, state.done)
        draft = draft._replace(num=jnp.minimum(draft.num, most))

    longest = jnp.max(draft.num, initial=0) + 1
    which = jnp.searchsorted(jnp.asarray(plan.widths), longest)
    none = jnp.zeros_like(want)
    hidden = jnp.zeros((want.shape[0], plan.widths[-1], config.width), _dtype(params))
    outcome = state, none, none, hidden
    for i, width in enumerate(plan.widths):
        verify = partial(_verify, params, rows, draft, config=config, plan=plan, width=width)
        outcome = only_if(which == i, verify, outcome)
    state, num_new, num_accepted, hidden = outcome

    judged = jnp.minimum(num_accepted + 1, draft.num)
    counts = Counts(
        drafted=run.counts.drafted + draft.num,
        widths=run.counts.widths.at[which].add(1),
    )
    after = Run(
        state=state,
        drafter=drafter.observe(own, state.history, num_new, hidden),
        pace=pace.update(num_accepted, judged, kind),
        counts=counts,
    )
    return pin(after, state.cache.kernels.layout)


def _dtype(params: Params) -> jnp.dtype:
    """Of the residual stream: that of the embedding."""
    return params["embed"]["table"].dtype


def _verify(
    params: Params,
    rows: SamplingRows,
    draft: Draft,
    before: tuple[State, jax.Array, jax.Array, jax.Array],
    *,
    config: ModelConfig,
    plan: Plan,
    width: int,
) -> tuple[State, jax.Array, jax.Array, jax.Array]:
    """Judge a draft whose longest row has width - 1 tokens at most, and commit what is kept.

    Takes the state, and room for what it returns beside it: how many tokens [B] it gained, how many
    of those were drafted, and the target's hidden states [B,widest,D] of the tokens it read.
    """
    state, *_ = before
    size = min(width - 1, draft.tokens.shape[1])
    draft = Draft(
        draft.tokens[:, :size],
        draft.num,
        None if draft.probs is None else draft.probs[:, :size],
    )
    # The draft stands behind the committed tokens: what is refused there is overwritten later.
    tokens = _write(state.tokens, state.num_tokens, draft.tokens, draft.num)
    slots = state.cache.lengths[:, None] + jnp.arange(width)
    fed = jnp.take_along_axis(tokens, slots, axis=1, mode="clip")
    num_fed = jnp.where(state.done, 0, 1 + draft.num)

    chunk = plan.canonical or width
    cache, parts = state.cache, []
    for first in range(0, width, chunk):
        few = jnp.clip(num_fed - first, 0, chunk)
        here = slice(first, first + chunk)
        hidden, cache = forward(params, fed[:, here], few, cache, config=config)
        logits = head(params, hidden, config=config)
        if plan.canonical is None:
            logits = logits[:, : size + 1]  # width may be more, where one row is slower than two
        history = History(tokens, state.num_tokens + first, state.prompt)
        scores = process_logits(logits, rows, history)
        logp = scores if state.logprobs is None else jax.nn.log_softmax(logits, axis=-1)
        parts.append((hidden, scores, logp))
    hidden, scores, logp = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))

    verify = VERIFIERS[plan.verifier]
    kept = verify(scores[:, : size + 1], draft, rows, state.num_tokens)
    state, num_new = _commit(state, tokens, kept, logp, rows)
    cache = cache.rewind(num_fed - num_new)
    pad = [(0, 0), (0, plan.widths[-1] - width), (0, 0)]
    return (
        dataclasses.replace(state, cache=cache),
        num_new,
        jnp.minimum(kept.num_accepted, num_new),
        jnp.pad(hidden, pad),
    )


def _commit(
    state: State, tokens: jax.Array, kept: Accepted, logp: jax.Array, rows: SamplingRows
) -> tuple[State, jax.Array]:
    """Append what is kept to the rows that are not done, up to a row's end; and how many [B]."""
    size = kept.tokens.shape[1]
    t = jnp.arange(size)
    ends = jnp.any(kept.tokens[:, :, None] == rows.stop_ids[:, None], axis=-1)  # [B,T]
    to_end = jnp.min(jnp.where(ends, t, size), axis=1) + 1  # the end token is part of the text
    left = state.limit - state.num_tokens
    count = jnp.minimum(jnp.minimum(kept.num_accepted + 1, to_end), left)
    count = jnp.where(state.done, 0, count)
    num_tokens = state.num_tokens + count
    drafted = t < kept.num_accepted[:, None]
    logprobs = state.logprobs
    if logprobs is not None:
        logp = logp[:, :size]
        top, top_ids = _top_k(logp, logprobs.top.shape[-1], state.cache.kernels.layout)
        chosen = jnp.take_along_axis(logp, kept.tokens[..., None], axis=-1)[..., 0]
        logprobs = jax.tree.map(
            lambda old, new: _write(old, state.num_tokens, new, count),
            logprobs,
            type(logprobs)(chosen, top, top_ids),
        )
    return dataclasses.replace(
        state,
        tokens=_write(tokens, state.num_tokens, kept.tokens, count),
        drafted=_write(state.drafted, state.num_tokens, drafted, count),
        num_tokens=num_tokens,
        done=state.done | ((count == to_end) & (count > 0)) | (num_tokens >= state.limit),
        logprobs=logprobs,
    ), count


def _top_k(logp: jax.Array, k: int, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """The k largest [B,T,k] of logp [B,T,V], and their ids; of each device's part first, since XLA
    has a top-k of whole rows only."""
    along = layout.along("V")
    if layout.mesh is None or along is None:
        return jax.lax.top_k(logp, k)
    width = logp.shape[-1] // layout.parts("V")

    def some(logp: jax.Array) -> tuple[jax.Array, jax.Array]:
        top, ids = jax.lax.top_k(logp, min(k, width))
        return top, ids + width * jax.lax.axis_index(along)

    cut = layout.spec("BTV")
    parts = jax.shard_map(some, mesh=layout.mesh, in_specs=cut, out_specs=(cut, cut))
    found, ids = parts(logp)  # [B,T,parts * k]
    top, where = jax.lax.top_k(found, k)
    return top, jnp.take_along_axis(ids, where, axis=-1)


def _write(old: jax.Array, at: jax.Array, new: jax.Array, num: jax.Array) -> jax.Array:
    """`old` [B,S,...] with the first num[b] of `new` [B,T,...] at slots at[b] .. of each row."""
    t = jnp.arange(new.shape[1])
    slots = jnp.where(t < num[:, None], at[:, None] + t, old.shape[1])  # slot S: dropped
    return old.at[jnp.arange(old.shape[0])[:, None], slots].set(new, mode="drop")
