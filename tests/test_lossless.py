"""Tokens that come out of the whole loop follow the target's law, for every drafter and verifier.

V = 16, and a drafter that likes what the target does not: only narrow vocabularies show a draft
that shares its noise with the residual; then V = 4096. One ragged batch holds every group of
sampling parameters.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxinfer.batch import new_run
from jaxinfer.generate import LLM
from jaxinfer.sampling import History, SamplingParams, process_logits, sampling_rows
from jaxinfer.speculative import round as loop
from jaxinfer.speculative import verify
from jaxinfer.speculative.costs import Costs
from jaxinfer.speculative.fallback import FallbackDrafter
from jaxinfer.speculative.ngram import NGramDrafter
from jaxinfer.speculative.self_drafter import SelfDrafter
from jaxinfer.speculative.speculation import Speculation
from jaxinfer.testing import tiny_llm

V, ROWS = 16, 2000  # vocabulary, batch
WIDE, WIDE_ROWS = 4096, 250
TOKENS = {V: 3, WIDE: 1}  # whose joint law is compared, by vocabulary
PROMPTS = ([3, 5, 3, 5, 3], [7, 2, 2])
PARAMS = {
    "temperature": SamplingParams(temperature=1.3),
    "top-k": SamplingParams(temperature=1.0, top_k=5),
    "top-p": SamplingParams(temperature=1.0, top_p=0.8),
    "min-p": SamplingParams(temperature=1.2, min_p=0.1),
    "penalties": SamplingParams(
        temperature=1.0, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3
    ),
}
GROUPS = list(itertools.product(PARAMS, range(len(PROMPTS))))
DRAFTERS = ["ngram", "opposite", "self", "fallback", "other vocabulary"]


@pytest.fixture(scope="module")
def llm():
    return tiny_llm(vocab_size=V, seed=3)


@pytest.fixture(scope="module")
def laws(llm):
    return all_laws(llm)


def all_laws(llm):
    """The joint law [V,V,V] of the first tokens of each group, without any loop."""
    return {group: law(llm, PARAMS[group[0]], PROMPTS[group[1]]) for group in GROUPS}


def law(llm, params, prompt):
    joint, vocab = np.ones(1), llm.config.vocab_size
    for size in range(TOKENS[vocab]):
        texts = [[*prompt, *prefix] for prefix in itertools.product(range(vocab), repeat=size)]
        count, length = len(texts), len(texts[0])
        logits = llm.forward(texts).logits[:, length - 1 : length]
        rows = sampling_rows(
            [params] * count,
            samples=[0] * count,
            seeds=[0] * count,
            stop_ids=[()] * count,
            vocab_limit=vocab,
        )
        lengths = jnp.full((count,), length)
        history = History(jnp.asarray(texts), lengths, jnp.full((count,), len(prompt)))
        scores = np.asarray(process_logits(logits, rows, history)[:, 0], np.float64)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        joint = (joint[:, None] * p / p.sum(-1, keepdims=True)).reshape((vocab,) * (size + 1))
        joint = joint.reshape(-1)
    return joint.reshape((vocab,) * TOKENS[vocab])


def drafter(name, llm):
    config = dataclasses.replace(llm.config, tied=False)
    params = {**llm.params, "head": {"table": -llm.params["embed"]["table"]}}
    opposite = LLM(params, config, llm.tokenizer, dtype=llm.model.dtype)
    model = llm.speculation(opposite).drafter
    return {
        "ngram": NGramDrafter(min_ngram=1),
        "opposite": model,
        "self": llm.speculation(SelfDrafter(layers=(0,))).drafter,
        "fallback": FallbackDrafter(first=NGramDrafter(), second=model),
        "other vocabulary": llm.speculation(tiny_llm(llm.config.vocab_size - 5, seed=5)).drafter,
    }[name].replace(num_draft=3)


def draw(llm, found, verifier, draws):
    """First tokens [draws,TOKENS] of each group, out of the loop that `generate` runs."""
    vocab = llm.config.vocab_size
    size, count = (ROWS if vocab == V else WIDE_ROWS), TOKENS[vocab]
    speculation = Speculation(found)
    plan = dataclasses.replace(speculation.plan(1), verifier=verifier)
    each = size // len(GROUPS)
    groups = [group for group in GROUPS for _ in range(each)]
    prompts = [PROMPTS[i] for _, i in groups]
    rows = sampling_rows(
        [PARAMS[name] for name, _ in groups],
        samples=[0] * size,
        seeds=[GROUPS.index(group) for group in groups],
        stop_ids=[()] * size,
        vocab_limit=vocab,
    )
    max_new = 1 if count == 1 else 99  # every row has one after a round; more, once all have ended
    where = np.array([len(p) for p in prompts])[:, None] + np.arange(count)
    got = []
    for first in range(0, draws, each):
        run = new_run(
            llm.model,
            speculation,
            plan,
            Costs((1.0,) * len(plan.widths)),
            prompts=prompts,
            limits=[len(p) + count + 2 for p in prompts],  # room for whole drafts
            capacity=16,
            logprobs=False,
        )
        run = loop.prefill(llm.params, run, found, config=llm.config, width=16)
        samples = jnp.asarray(np.tile(np.arange(first, first + each), len(GROUPS)), jnp.int32)
        rows = rows._replace(sample=samples)
        run = loop.rounds(
            llm.params, run, rows, found, jnp.int32(max_new), config=llm.config, plan=plan
        )
        tokens = np.take_along_axis(np.asarray(run.state.tokens), where, axis=1)
        got.append(tokens.reshape(len(GROUPS), each, count))
    assert int(run.counts.drafted.sum()) > 0
    return dict(zip(GROUPS, np.concatenate(got, axis=1), strict=True))


def pvalue(tokens, law):
    """Chi-square of the joint law; cells are lumped until each expects twenty draws."""
    cells = np.ravel_multi_index(tokens.T, law.shape)
    law = law.reshape(-1)
    counts = np.bincount(cells, minlength=law.size).astype(float)
    assert counts[law == 0].sum() == 0  # what is cut never comes
    want = law * counts.sum()
    order = np.argsort(want)
    bins = (np.cumsum(want[order]) // 20).astype(int)
    got, expected = (np.bincount(bins, weights=x[order]) for x in (counts, want))
    used = expected > 0
    return stats.chisquare(got[used], expected[used] * got.sum() / expected.sum()).pvalue


def refused(values):
    """Those that Holm's procedure refuses at 0.01."""
    ordered = sorted(values.items(), key=lambda item: item[1])
    for i, (_, p) in enumerate(ordered):
        if p > 0.01 / (len(ordered) - i):
            return ordered[:i]
    return ordered


@pytest.mark.parametrize(
    ("name", "draws"),  # in the short form one drafter of each kind: each compiles three loops
    [
        *((name, 4_000) for name in ("ngram", "opposite", "fallback")),
        *(pytest.param(name, 200_000, marks=pytest.mark.slow) for name in DRAFTERS),
    ],
)
def test_the_loop_follows_the_law(llm, laws, name, draws):
    """`draws` of each of ten groups, for each verifier."""
    found = drafter(name, llm)
    values = {}
    for verifier in ("exact", "rejection", "block"):
        for group, tokens in draw(llm, found, verifier, draws).items():
            values[verifier, *group] = pvalue(tokens, laws[group])
    assert refused(values) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_wide_vocabulary(name):
    """20,000 draws of each of ten groups make 200,000 a verifier."""
    llm = tiny_llm(vocab_size=WIDE, seed=3)
    laws, found = all_laws(llm), drafter(name, llm)
    values = {}
    for verifier in ("exact", "rejection", "block"):
        for group, tokens in draw(llm, found, verifier, 20_000).items():
            values[verifier, *group] = pvalue(tokens, laws[group])
    assert refused(values) == []


def fresh_at_refusal(scores, draft, rows, position):
    """Deliberately wrong: what follows a refused draft is drawn anew, not from the residual."""
    kept = verify.rejection(scores, draft, rows, position)
    fresh = verify.exact(scores, draft, rows, position)
    here = jnp.arange(kept.tokens.shape[1]) == kept.num_accepted[:, None]
    return verify.Accepted(jnp.where(here, fresh.tokens, kept.tokens), kept.num_accepted)


def shared_noise(scores, draft, rows, position):
    """Deliberately wrong: the residual's noise is the draft's own."""
    own = verify.STREAM_RESIDUAL
    try:
        verify.STREAM_RESIDUAL = loop.STREAM_DRAFT
        return verify.rejection(scores, draft, rows, position)
    finally:
        verify.STREAM_RESIDUAL = own


@pytest.mark.parametrize("wrong", [fresh_at_refusal, shared_noise])
def test_the_same_harness_finds_a_biased_verifier(llm, laws, wrong, monkeypatch):
    monkeypatch.setitem(verify.VERIFIERS, "wrong", wrong)
    jax.clear_caches()
    got = draw(llm, drafter("opposite", llm), "wrong", 10_000)
    values = {group: pvalue(tokens, laws[group]) for group, tokens in got.items()}
    assert len(refused(values)) >= 2
    jax.clear_caches()
