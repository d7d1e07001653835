"""The logits pipeline against a float64 definition of each step, and the draws against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.errors import InvalidArgument
from jaxinfer.sampling import (
    History,
    SamplingParams,
    choose,
    row_keys,
    sampling_rows,
)
from jaxinfer.sampling import process_logits as over_positions
from jaxinfer.testing import tiny_llm


@jax.jit
def process_logits(logits, rows, history):
    """Of one position a row: [B,V] -> [B,V]."""
    return over_positions(logits[:, None], rows, history)[:, 0]


def rows_of(params, stop_ids=(), vocab_limit=1 << 30, seeds=None, samples=None):
    return sampling_rows(
        params,
        samples=samples or [0] * len(params),
        seeds=seeds or [p.seed or 0 for p in params],
        stop_ids=[stop_ids] * len(params),
        vocab_limit=vocab_limit,
    )


def history_of(tokens, prompt):
    padded = np.full((len(tokens), 16), 3, np.int32)  # what lies behind the length must not count
    for b, row in enumerate(tokens):
        padded[b, : len(row)] = row
    lengths = jnp.array([len(t) for t in tokens], jnp.int32)
    return History(jnp.asarray(padded), lengths, jnp.asarray(prompt, jnp.int32))


def defined(logits, p: SamplingParams, tokens, prompt, stop_ids, vocab_limit):
    """The distribution as the docstrings define it, for one row, in float64, with sorting."""
    x = np.asarray(logits, np.float64).copy()
    x[vocab_limit:] = -np.inf
    if len(tokens) - prompt < p.min_tokens:
        x[list(stop_ids)] = -np.inf
    for t in set(tokens):
        x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
    for t in set(tokens[prompt:]):
        x[t] -= p.presence_penalty + p.frequency_penalty * tokens[prompt:].count(t)
    for t, value in (p.logit_bias or {}).items():
        x[t] += value
    if p.temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    x /= p.temperature
    if p.top_k:
        x[x < np.sort(x)[::-1][min(p.top_k, len(x)) - 1]] = -np.inf
    prob = np.exp(x - x.max())
    prob /= prob.sum()
    if p.top_p < 1:
        order = np.argsort(-prob)
        before = np.concatenate([[0], np.cumsum(prob[order])[:-1]])
        cut = order[before >= p.top_p]  # the token that crosses top_p stays
        prob[[i for i in cut if i != order[0]]] = 0
    prob[prob < p.min_p * prob.max()] = 0
    return prob / prob.sum()


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 1000]),
    top_p=st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    min_tokens=st.sampled_from([0, 3]),
    logit_bias=st.sampled_from([None, {3: 2.0, 7: -5.0}]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(params=st.lists(PARAMS, min_size=3, max_size=3), seed=st.integers(0, 10**6))
def test_pipeline_is_its_definition(params, seed):
    """Rows with different parameters in one batch, each against the definition."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, 19)).astype(np.float32) * 2
    tokens, prompt = [[1, 4, 4], [2, 3, 5, 5, 5, 8], [0]], [2, 2, 1]
    rows = rows_of(params, stop_ids=(0, 6), vocab_limit=17)
    scores = process_logits(jnp.asarray(logits), rows, history_of(tokens, prompt))
    got = np.asarray(jax.nn.softmax(scores, axis=-1), np.float64)
    for b, p in enumerate(params):
        want = defined(logits[b], p, tokens[b], prompt[b], (0, 6), 17)
        if p.temperature == 0:  # the point mass at the largest score
            assert np.argmax(np.asarray(scores[b])) == np.argmax(want)
        else:
            np.testing.assert_array_equal(got[b] > 0, want > 1e-38)
            np.testing.assert_allclose(got[b], want, atol=2e-6)


def test_equal_scores_are_cut_together_and_the_nucleus_is_never_empty():
    logits = jnp.array([[1.0, 1.0, 0.0, -1.0]])
    for p, kept in [
        (SamplingParams(temperature=1, top_k=1), [1, 1, 0, 0]),
        (SamplingParams(temperature=1, top_p=0.0), [1, 1, 0, 0]),
        (SamplingParams(temperature=1, top_k=3), [1, 1, 1, 0]),
        (SamplingParams(temperature=1, min_p=1.0), [1, 1, 0, 0]),
    ]:
        scores = process_logits(logits, rows_of([p]), history_of([[0]], [1]))
        np.testing.assert_array_equal(np.isfinite(np.asarray(scores[0])), np.array(kept, bool))


@pytest.mark.parametrize("vocab", [16, 4096])
def test_draws_follow_the_distribution(vocab):
    """Chi-square of 200,000 draws; bins of little mass are pooled."""
    from scipy import stats

    rng = np.random.default_rng(0)
    logits = rng.normal(size=vocab).astype(np.float32) * 1.5
    p = SamplingParams(temperature=0.8, top_p=0.95, seed=5)
    draws, chunk = 200_000, 500
    rows = rows_of([p] * chunk)
    draw = jax.jit(
        lambda position: choose(
            over_positions(
                jnp.broadcast_to(logits, (chunk, 1, vocab)),
                rows,
                history_of([[0]] * chunk, [1] * chunk),
            ),
            rows,
            row_keys(rows, position[:, None], 0),
        )[:, 0]
    )
    counts = np.zeros(vocab)
    for at in range(0, draws, chunk):
        counts += np.bincount(np.asarray(draw(jnp.arange(at, at + chunk))), minlength=vocab)
    want = defined(logits, p, [0], 1, (), vocab) * draws
    assert counts[want == 0].sum() == 0
    order = np.argsort(want)
    bins = np.cumsum(want[order]) // 20
    pooled = [np.bincount(bins.astype(int), weights=x[order]) for x in (counts, want)]
    used = pooled[1] > 0
    assert stats.chisquare(pooled[0][used], pooled[1][used]).pvalue > 0.01


def test_noise_depends_on_seed_sample_position_and_stream_alone():
    p = SamplingParams(temperature=1.0)
    rows = rows_of([p] * 4, seeds=[1, 1, 2, 1], samples=[0, 1, 0, 0])

    def keys(positions, stream, start=None):
        at = jnp.array(positions)[:, None]
        return jax.random.key_data(row_keys(rows, at, stream, start))[:, 0]

    plain = keys([7, 7, 7, 7], 0)
    assert (plain[0] == plain[3]).all()
    assert (plain[0] != plain[1]).any()
    assert (plain[0] != plain[2]).any()
    assert (plain[0] != keys([8, 7, 7, 7], 0)[0]).any()
    assert (plain[0] != keys([7, 7, 7, 7], 1)[0]).any()
    # A plain sample is the same in every round; what a round draws for itself never comes again.
    one, two = jnp.array([5] * 4), jnp.array([6] * 4)
    assert (keys([7, 7, 7, 7], 0, one) == keys([7, 7, 7, 7], 0, two)).all()
    for stream in (1, 2, 3):
        assert (keys([7] * 4, stream, one) != keys([7] * 4, stream, two)).any(axis=1).all()


def test_greedy_rows_beside_sampled_ones_are_untouched():
    llm = tiny_llm()
    greedy = llm.generate("abc", max_tokens=12, ignore_eos=True).token_ids
    mixed = llm.generate(
        ["abc", "abc"],
        [
            SamplingParams(max_tokens=12, ignore_eos=True),
            SamplingParams(max_tokens=12, ignore_eos=True, temperature=2.0, top_k=5, seed=1),
        ],
    )
    assert mixed[0].token_ids == greedy
    assert mixed[1].token_ids != greedy


def test_end_tokens_by_the_dozen():
    llm = tiny_llm()
    out = llm.generate("abc", max_tokens=3, stop_token_ids=list(range(60)), min_tokens=3)
    assert all(i >= 60 for i in out.token_ids)


BAD = [
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": 1.5},
    {"max_tokens": True},
    {"max_tokens": 2**31},
    {"min_tokens": -1},
    {"min_tokens": 11, "max_tokens": 10},
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": 1e9},
    {"temperature": "hot"},
    {"top_k": -1},
    {"top_k": 2.0},
    {"top_p": -0.1},
    {"top_p": 1.1},
    {"min_p": 1.1},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": -1.0},
    {"presence_penalty": 1e9},
    {"frequency_penalty": float("nan")},
    {"seed": -1},
    {"seed": 2**32},
    {"n": 0},
    {"n": 1000},
    {"logprobs": -1},
    {"logprobs": 10_000},
    {"stop": ""},
    {"stop": ["a"] * 1000},
    {"stop": [1]},
    {"stop": b"x"},
    {"stop": 5},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": list(range(1000))},
    {"stop_token_ids": "ab"},
    {"stop_token_ids": 5},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {1: float("inf")}},
    {"logit_bias": {"a": 1.0}},
    {"logit_bias": [1]},
    {"logit_bias": dict.fromkeys(range(5000), 1.0)},
]


@pytest.mark.parametrize("fields", BAD, ids=lambda f: "-".join(f))
def test_bad_parameters_are_refused_by_name(fields):
    with pytest.raises(InvalidArgument) as error:
        SamplingParams(**fields)
    assert "\n" not in str(error.value)
    assert any(name in str(error.value) for name in fields) or "stop" in str(error.value)
