"""What a user may ask of sampling, and the ONE logits pipeline that every path goes through.

    scores = process_logits(logits, rows, history)   # plain decoding, drafting and verifying alike
    token  = choose(scores, rows, keys)

Order, that of transformers: padded ids and min_tokens, penalties, bias, temperature, top-k, top-p,
min-p. Each step is skipped at run time (`only_if`) when no row asks for it, so changing a
parameter never compiles anything. Nothing sorts the vocabulary: the k-th largest score and the
nucleus are found by bisection on the bits of the scores, which is exact and needs only sums, so it
works on a vocabulary spread over chips.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import InvalidArgument
from jaxinfer.xla import once, only_if

MAX_LOGPROBS = 20  # alternatives a token; more would make the output larger than the cache
MAX_STOP = 64  # stop strings, and stop token ids, a row
MAX_BIAS = 1024  # logit_bias entries a row
MAX_N = 128  # samples of one prompt
# Random streams: what is drawn from one never tells anything of the others.
STREAM_SAMPLE, STREAM_DRAFT, STREAM_ACCEPT, STREAM_RESIDUAL = range(4)
NUM_STREAMS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Fields are checked when the object is made (InvalidArgument)."""

    max_tokens: int = 256  # at most this many new tokens
    min_tokens: int = 0  # no end token before this many; a stop string still ends the text
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # keep the k likeliest; 0 keeps all
    top_p: float = 1.0  # keep the smallest set with this mass (arXiv 1904.09751)
    min_p: float = (
        0.0  # keep tokens at least this times as likely as the likeliest (arXiv 2407.01082)
    )
    repetition_penalty: float = 1.0  # divides positive logits of seen tokens (arXiv 1909.05858)
    presence_penalty: float = 0.0  # subtracted once from the logit of a generated token
    frequency_penalty: float = 0.0  # subtracted for each time it was generated
    logit_bias: Mapping[int, float] | None = None  # added to the logits of these token ids
    stop: str | Sequence[str] = ()  # the text ends before the first of these
    stop_token_ids: Sequence[int] = ()  # end the sequence like the model's own end token
    ignore_eos: bool = False  # the model's own end tokens are ordinary ones
    seed: int | None = None  # None: a new one every time
    n: int = 1  # samples a prompt
    logprobs: int | None = None  # None: none; 0: of the chosen token; k: and of the k likeliest

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(_sequence("stop", stop)))
        stop_ids = _sequence("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", tuple(stop_ids))
        _whole("max_tokens", self.max_tokens, 1, 2**30)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _real("temperature", self.temperature, 0.0, 100.0)
        _whole("top_k", self.top_k, 0, 2**31 - 1)
        _real("top_p", self.top_p, 0.0, 1.0)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _real("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _real("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**32 - 1)
        _whole("n", self.n, 1, MAX_N)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP or len(self.stop_token_ids) > MAX_STOP:
            raise InvalidArgument(f"at most {MAX_STOP} stop strings and stop token ids")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= 1024:
                raise InvalidArgument(f"stop={text!r}: a stop string has 1 to 1024 characters")
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0, 2**31 - 1)
        bias = self.logit_bias or {}
        if not isinstance(bias, Mapping) or len(bias) > MAX_BIAS:
            raise InvalidArgument(f"logit_bias: a mapping with at most {MAX_BIAS} entries")
        for token, value in bias.items():
            _whole("logit_bias id", token, 0, 2**31 - 1)
            _real(f"logit_bias[{token}]", value, -1e4, 1e4)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | np.integer)
        or not low <= value <= high
    ):
        raise InvalidArgument(f"{name}={value!r}: must be a whole number from {low} to {high}")


def _real(name: str, value: object, low: float, high: float) -> None:
    real = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
        raise InvalidArgument(f"{name}={value!r}: must be a number from {low:g} to {high:g}")


def _sequence(name: str, value: object) -> Sequence:
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise InvalidArgument(f"{name}={value!r}: must be a list")
    return value


class SamplingRows(NamedTuple):
    """`SamplingParams` of a batch as arrays: a pytree, so that values never compile anything."""

    temperature: jax.Array  # [B] f32; 0 marks a greedy row
    top_k: jax.Array  # [B] i32; 0: all
    top_p: jax.Array  # [B] f32
    min_p: jax.Array  # [B] f32
    repetition: jax.Array  # [B] f32
    presence: jax.Array  # [B] f32
    frequency: jax.Array  # [B] f32
    bias_ids: jax.Array  # [B,C] i32; V and beyond: no entry
    bias: jax.Array  # [B,C] f32
    stop_ids: jax.Array  # [B,E] i32; -1: no entry
    min_tokens: jax.Array  # [B] i32
    seed: jax.Array  # [B] u32
    sample: jax.Array  # [B] i32, which of the n samples of its prompt
    vocab_limit: jax.Array  # [] i32; ids from here on pad the logits and are never chosen


def sampling_rows(
    params: Sequence[SamplingParams],
    *,
    samples: Sequence[int],
    seeds: Sequence[int],
    stop_ids: Sequence[Sequence[int]],
    vocab_limit: int,
) -> SamplingRows:
    """Arrays for B rows; `samples`, `seeds` and `stop_ids` (end tokens too) are a row's own."""

    def column(dtype: type, get: Callable[[SamplingParams], float]) -> jax.Array:
        return jnp.asarray(np.array([get(p) for p in params], dtype))

    width = _room(max(len(p.logit_bias or ()) for p in params))
    bias_ids = np.full((len(params), width), 2**31 - 1, np.int32)
    bias = np.zeros((len(params), width), np.float32)
    ends = np.full((len(params), _room(max(map(len, stop_ids)))), -1, np.int32)
    for b, p in enumerate(params):
        entries = p.logit_bias or {}
        bias_ids[b, : len(entries)] = list(entries.keys())
        bias[b, : len(entries)] = list(entries.values())
        ends[b, : len(stop_ids[b])] = stop_ids[b]
    return SamplingRows(
        temperature=column(np.float32, lambda p: p.temperature),
        top_k=column(np.int32, lambda p: p.top_k),
        top_p=column(np.float32, lambda p: p.top_p),
        min_p=column(np.float32, lambda p: p.min_p),
        repetition=column(np.float32, lambda p: p.repetition_penalty),
        presence=column(np.float32, lambda p: p.presence_penalty),
        frequency=column(np.float32, lambda p: p.frequency_penalty),
        bias_ids=jnp.asarray(bias_ids),
        bias=jnp.asarray(bias),
        stop_ids=jnp.asarray(ends),
        min_tokens=column(np.int32, lambda p: p.min_tokens),
        seed=jnp.asarray(np.array(seeds, np.uint32)),
        sample=jnp.asarray(np.array(samples, np.int32)),
        vocab_limit=jnp.asarray(vocab_limit, jnp.int32),
    )


def greedy_rows(batch: int, vocab_limit: int) -> SamplingRows:
    """Rows without an end or a wish, to measure and to trace with."""
    return sampling_rows(
        [SamplingParams()] * batch,
        samples=[0] * batch,
        seeds=[0] * batch,
        stop_ids=[()] * batch,
        vocab_limit=vocab_limit,
    )


def _room(count: int) -> int:
    """A few fixed widths, so that the number of entries rarely compiles anything."""
    return next(w for w in (8, 128, MAX_BIAS) if count <= w)


class History(NamedTuple):
    """The tokens that stand before the one being chosen."""

    tokens: jax.Array  # [B,S] i32, prompt then output; what stands behind `length` is no part of it
    length: jax.Array  # [B] i32, how many of them count
    prompt: jax.Array  # [B] i32, how many of those are the prompt


def process_logits(logits: jax.Array, rows: SamplingRows, history: History) -> jax.Array:
    """Scores [B,T,V] f32 of the processed distribution (log-probabilities up to a constant a row).

    Position t of row b has history.length[b] + t tokens before it: to judge a draft, put it behind
    the history's end. Ids that may not be chosen have -inf. Greedy rows are processed too, but not
    tempered or cut: their distribution is the point mass at the largest score (`probabilities`).
    """
    length = history.length[:, None] + jnp.arange(logits.shape[1])  # [B,T]
    ids = jnp.arange(logits.shape[-1])
    scores = jnp.where(ids < rows.vocab_limit, logits.astype(jnp.float32), -jnp.inf)
    early = length - history.prompt[:, None] < rows.min_tokens[:, None]  # [B,T]
    penalized = (rows.repetition != 1) | (rows.presence != 0) | (rows.frequency != 0)
    sampled = rows.temperature > 0
    cut = sampled & ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0))

    def process(scores: jax.Array) -> jax.Array:
        scores = _when(early, lambda s: _hold_back_end(s, rows, early), scores)
        scores = _when(penalized, lambda s: _penalize(s, rows, history, length), scores)
        scores = _when(rows.bias != 0, lambda s: _add_bias(s, rows), scores)
        # Relative to the largest, which stays 0: a tiny temperature cannot divide it to infinity.
        divisor = _over_positions(jnp.where(sampled, rows.temperature, 1))
        tempered = (scores - scores.max(-1, keepdims=True)) / divisor
        scores = jnp.where(_over_positions(sampled), tempered, scores)
        keep = _over_positions(~cut)
        return _when(cut, lambda s: jnp.where(keep, s, _truncate(s, rows)), scores)

    asked = early.any() | penalized.any() | (rows.bias != 0).any() | sampled.any()
    return _when(asked, process, scores)  # where all is greedy and nothing asked: as they are


def _over_positions(x: jax.Array) -> jax.Array:
    """[B] -> [B,1,1], beside scores [B,T,V]."""
    return x[:, None, None]


def _when(rows: jax.Array, step: Callable[[jax.Array], jax.Array], scores: jax.Array) -> jax.Array:
    """Run `step` only if some row asks for it; the others come out of it as they went in."""
    return only_if(jnp.any(rows), step, scores)


def _hold_back_end(scores: jax.Array, rows: SamplingRows, early: jax.Array) -> jax.Array:
    b = jnp.arange(scores.shape[0])[:, None, None]
    t = jnp.arange(scores.shape[1])[:, None]
    held = early[:, :, None] & (rows.stop_ids >= 0)[:, None]  # [B,T,E]
    ids = jnp.where(held, rows.stop_ids[:, None], scores.shape[-1])
    return scores.at[b, t, ids].set(-jnp.inf, mode="drop")


def _penalize(
    scores: jax.Array, rows: SamplingRows, history: History, length: jax.Array
) -> jax.Array:
    # Counted anew from the tokens at every step: there are no counters that a refused draft or a
    # reused row could leave wrong.
    slot = jnp.arange(history.tokens.shape[1])
    b = jnp.arange(scores.shape[0])[:, None]
    zero = jnp.zeros(scores.shape[::2], jnp.int32)  # [B,V]

    def one(scores: jax.Array, length: jax.Array) -> jax.Array:  # [B,V], [B]
        known = slot < length[:, None]
        written = known & (slot >= history.prompt[:, None])
        seen = zero.at[b, history.tokens].add(known.astype(jnp.int32)) > 0
        count = zero.at[b, history.tokens].add(written.astype(jnp.int32))
        factor = jnp.where(seen, rows.repetition[:, None], 1.0)
        scores = jnp.where(scores > 0, scores / factor, scores * factor)
        return scores - rows.frequency[:, None] * count - rows.presence[:, None] * (count > 0)

    return jax.vmap(one, in_axes=1, out_axes=1)(scores, length)


def _add_bias(scores: jax.Array, rows: SamplingRows) -> jax.Array:
    b = jnp.arange(scores.shape[0])[:, None]
    bias = jnp.zeros(scores.shape[::2]).at[b, rows.bias_ids].add(rows.bias, mode="drop")
    return scores + bias[:, None]


def _truncate(scores: jax.Array, rows: SamplingRows) -> jax.Array:
    """top-k, then top-p of what is left, then min-p. Equal scores are kept or cut together."""
    order = _ordered_bits(scores)  # [B,T,V] u32
    k = jnp.where(rows.top_k > 0, rows.top_k, scores.shape[-1]).astype(jnp.float32)
    kept = order >= _largest_threshold(order, jnp.ones_like(scores), _over_positions(k))
    weight = jnp.where(kept, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    # Never the whole mass: rounding could leave it out of reach. top_p 0 still keeps the likeliest.
    top_p = _over_positions(rows.top_p)
    mass = jnp.where(top_p < 1, top_p * weight.sum(-1, keepdims=True), 0.0)
    nucleus = order >= _largest_threshold(order, weight, mass)
    kept &= nucleus | (top_p >= 1)
    kept &= weight >= _over_positions(rows.min_p)  # the likeliest has weight 1
    return jnp.where(kept, scores, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest_threshold(order: jax.Array, weight: jax.Array, need: jax.Array) -> jax.Array:
    """Largest t [...,1] such that the weight of {order >= t} is at least `need`, never empty."""
    top = order.max(-1, keepdims=True)

    def bit(i: jax.Array, t: jax.Array) -> jax.Array:
        raised = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        enough = jnp.where(order >= raised, weight, 0.0).sum(-1, keepdims=True) >= need
        return jnp.where(enough, raised, t)

    t = jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(top))
    return jnp.minimum(t, top)


def probabilities(scores: jax.Array, rows: SamplingRows) -> jax.Array:
    """The distribution [B,T,V] that scores stand for; of a greedy row the point mass."""
    best = jax.nn.one_hot(_largest(scores), scores.shape[-1], dtype=scores.dtype)
    return jnp.where(_over_positions(rows.temperature > 0), jax.nn.softmax(scores, axis=-1), best)


def choose(scores: jax.Array, rows: SamplingRows, keys: jax.Array) -> jax.Array:
    """Draw token ids [B,T] i32 from scores [B,T,V]: the largest, or by the Gumbel-max trick.

    `keys` [B,T] are random keys, see `row_keys`.
    """

    def noisy(scores: jax.Array) -> jax.Array:
        draw = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[-1:])))
        return jnp.where(_over_positions(rows.temperature > 0), scores + draw(keys), scores)

    return _largest(_when(rows.temperature > 0, noisy, scores))


def _largest(scores: jax.Array) -> jax.Array:
    """Argmax [B,T] i32 of scores [B,T,V]. In two steps, since XLA:CPU vectorises no argmax: a
    fifth of its time."""
    ids = jnp.arange(scores.shape[-1])
    # Else XLA:CPU writes the largest out as wide as the scores.
    here = scores == once(scores.max(-1))[..., None]
    return jnp.where(here, ids, scores.shape[-1] - 1).min(-1).astype(jnp.int32)


def row_keys(
    rows: SamplingRows, position: jax.Array, stream: int, start: jax.Array | None = None
) -> jax.Array:
    """Random keys [B,T] for the tokens at `position` [B,T].

    They depend on (seed, sample, position, stream) only: not on the neighbours, the batch or how
    many tokens were tried before. A round of speculation gives its `start` [B] too, since what it
    draws for a position it does not reach must not come again in the next round.
    """

    def key(seed: jax.Array, sample: jax.Array, position: jax.Array, start: jax.Array) -> jax.Array:
        words = jnp.stack([seed, sample.astype(jnp.uint32)])
        k = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), position)
        when = jnp.zeros_like(start) if stream == STREAM_SAMPLE else start
        return jax.random.fold_in(k, NUM_STREAMS * when + stream)

    start = jnp.zeros_like(rows.seed) if start is None else start
    over_positions = jax.vmap(key, in_axes=(None, None, 0, None))
    return jax.vmap(over_positions)(rows.seed, rows.sample, position, start)
