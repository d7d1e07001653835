"""Verification never changes the distribution: enumerated without sampling noise, then drawn."""

from __future__ import annotations

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxinfer.sampling import (
    STREAM_DRAFT,
    SamplingParams,
    choose,
    probabilities,
    row_keys,
    sampling_rows,
)
from jaxinfer.speculative import verify as verify_rules
from jaxinfer.speculative.drafter import Draft
from jaxinfer.speculative.verify import (
    VERIFIERS,
    Accepted,
    block_keep,
    exact,
    leading_run,
    longest_prefix,
    rejection_keep,
    residual,
)

CASES = [(vocab, size) for vocab in (2, 3, 4) for size in (1, 2, 3)]


def tree(rng, vocab, depth, sharp):
    """A distribution behind every prefix of up to `depth` tokens; some with zeros."""
    out = {}
    for n in range(depth + 1):
        for prefix in itertools.product(range(vocab), repeat=n):
            p = rng.dirichlet(np.full(vocab, sharp))
            if rng.random() < 0.3:
                p[rng.integers(vocab)] = 0
            out[prefix] = p / p.sum()
    return out


JUDGES = {"rejection": (rejection_keep, leading_run), "block": (block_keep, longest_prefix)}


def rounds(rule, p, q, drafts):
    """What a round may do, for every outcome of the chances that the rule takes: (its probability
    [n] for each draft, how many are kept [n], the law [n,V] of the token behind them)."""
    n, size = drafts.shape
    num = jnp.full((n,), size)
    if rule == "exact":  # the chances are the samples y_i from p_i
        samples = np.array(list(itertools.product(range(p.shape[-1]), repeat=size + 1)))
        tokens, kept = with_samples(
            np.repeat(samples, n, axis=0), np.tile(drafts, (len(samples), 1))
        )
        behind = np.take_along_axis(tokens, kept[:, None], axis=1)
        follows = np.eye(p.shape[-1])[behind[:, 0]].reshape(len(samples), n, -1)
        for y, k, law in zip(samples, kept.reshape(len(samples), n), follows, strict=True):
            yield p[:, range(size + 1), y].prod(axis=1), k, law
        return
    keep, count = JUDGES[rule]
    chance, ratio = keep(jnp.array(p), jnp.array(q), jnp.array(drafts), num)
    for passed in itertools.product((False, True), repeat=size):
        kept = count(jnp.broadcast_to(jnp.array(passed), (n, size)), num)
        follows = residual(jnp.array(p), jnp.array(q), ratio, kept, num)
        yield (
            np.where(passed, chance, 1 - chance).prod(axis=1),
            np.asarray(kept),
            np.asarray(follows),
        )


def with_samples(tokens, drafts):
    """What the exact rule commits where the target says `tokens`, and how many drafts of it."""
    rows = sampling_rows(
        [SamplingParams()] * len(tokens),
        samples=[0] * len(tokens),
        seeds=[0] * len(tokens),
        stop_ids=[()] * len(tokens),
        vocab_limit=2,
    )
    draft = Draft(jnp.array(drafts), jnp.full((len(drafts),), drafts.shape[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_rules, "choose", lambda *_: jnp.array(tokens))
        kept = exact(jnp.zeros((*tokens.shape, 2)), draft, rows, jnp.zeros((len(tokens),), int))
    return np.asarray(kept.tokens), np.asarray(kept.num_accepted)


def emitted(rule, target, drafted, vocab, size):
    """Law of the first size + 1 tokens: a round, then plain samples for what it left out."""
    drafts = np.array(list(itertools.product(range(vocab), repeat=size)))

    def along(law, count):
        return np.array([[law[tuple(x[:i])] for i in range(count)] for x in drafts])

    p, q = along(target, size + 1), along(drafted, size)
    weight = np.prod(np.take_along_axis(q, drafts[..., None], axis=-1)[..., 0], axis=1)
    begun = {}  # what a round commits, and how likely
    for chance, kept, follows in rounds(rule, p, q, drafts):
        for x, k, masses in zip(drafts, kept, (weight * chance)[:, None] * follows, strict=True):
            for y in np.flatnonzero(masses):
                start = (*x[:k].tolist(), int(y))
                begun[start] = begun.get(start, 0.0) + masses[y]
    law = dict.fromkeys(itertools.product(range(vocab), repeat=size + 1), 0.0)
    for start, mass in begun.items():
        for rest in itertools.product(range(vocab), repeat=size + 1 - len(start)):
            whole = start + rest
            plain = [target[whole[:i]][whole[i]] for i in range(len(start), size + 1)]
            law[whole] += mass * np.prod(plain)
    return law


@pytest.mark.parametrize("rule", list(VERIFIERS))
def test_enumerated_in_float64(rule):
    with jax.enable_x64(True):
        for vocab, size in CASES:
            rng = np.random.default_rng(vocab * 10 + size)
            for sharp in (0.3, 2.0):
                target, drafted = (tree(rng, vocab, size, sharp) for _ in range(2))
                law = emitted(rule, target, drafted, vocab, size)
                for tokens, mass in law.items():
                    want = np.prod([target[tokens[:i]][t] for i, t in enumerate(tokens)])
                    assert abs(mass - want) < 1e-12, (vocab, size, tokens)


def fresh(p, q, ratio, kept, num):
    """A plain draw where a draft was refused."""
    return p[jnp.arange(len(kept)), kept]


def lenient(*args):
    """Keeps more than p/q."""
    keep, ratio = rejection_keep(*args)
    return jnp.sqrt(keep), ratio


@pytest.mark.parametrize(
    ("rule", "where", "name", "fault"),
    [
        ("rejection", sys.modules[__name__], "residual", fresh),
        ("block", sys.modules[__name__], "residual", fresh),
        ("rejection", JUDGES, "rejection", (lenient, leading_run)),
        ("rejection", JUDGES, "rejection", (rejection_keep, longest_prefix)),
        ("block", JUDGES, "block", (block_keep, leading_run)),
        ("exact", verify_rules, "leading_run", longest_prefix),
    ],
)
def test_the_enumeration_sees_a_fault(rule, where, name, fault, monkeypatch):
    change = monkeypatch.setitem if where is JUDGES else monkeypatch.setattr
    change(where, name, fault)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        target, drafted = (tree(rng, 3, 2, 1.0) for _ in range(2))
        law = emitted(rule, target, drafted, 3, 2)
        want = {t: np.prod([target[t[:i]][x] for i, x in enumerate(t)]) for t in law}
        assert max(abs(law[t] - want[t]) for t in law) > 1e-3


def biased(scores, draft, rows, position):
    """Deliberately wrong: a fresh plain draw where the draft is refused."""
    kept = VERIFIERS["rejection"](scores, draft, rows, position)
    fresh = exact(scores, draft, rows, position)
    here = jnp.arange(kept.tokens.shape[1]) == kept.num_accepted[:, None]
    return Accepted(jnp.where(here, fresh.tokens, kept.tokens), kept.num_accepted)


def pvalue(verify, vocab, draws, probs=True, temperature=1.0):
    """Chi-square of the first token of a round whose drafter likes what the target does not."""
    rng = np.random.default_rng(1)
    target = jnp.asarray(rng.normal(size=vocab).astype(np.float32) * 1.5)
    chunk, size = max(250, min(5000, 2_000_000 // vocab)), 2
    params = [SamplingParams(temperature=temperature, seed=3)] * chunk

    @jax.jit
    def first(target, samples):  # both arguments: XLA would spend half a minute folding constants
        rows = sampling_rows(
            params,
            samples=[0] * chunk,
            seeds=[3] * chunk,
            stop_ids=[()] * chunk,
            vocab_limit=vocab,
        )._replace(sample=samples)
        scores = jnp.broadcast_to(target / temperature, (chunk, size + 1, vocab))
        own = -scores[:, :size]  # draft = the target's logits, negated
        position = jnp.full((chunk,), 5)
        keys = row_keys(rows, position[:, None] + jnp.arange(size), STREAM_DRAFT, position)
        draft = Draft(
            choose(own, rows, keys),
            jnp.full((chunk,), size),
            probabilities(own, rows) if probs else None,
        )
        if not probs:  # a point mass may depend on anything but the target's noise
            draft = draft._replace(tokens=jnp.broadcast_to(jnp.arange(size), (chunk, size)))
        kept = verify(scores, draft, rows, position)
        return kept.tokens[:, 0]

    counts = np.zeros(vocab)
    for at in range(0, draws, chunk):
        counts += np.bincount(
            np.asarray(first(target, jnp.arange(at, at + chunk))), minlength=vocab
        )
    want = np.asarray(jax.nn.softmax(target / temperature), np.float64)
    want *= counts.sum() / want.sum()
    order = np.argsort(want)
    bins = (np.cumsum(want[order]) // 20).astype(int)
    got, expected = (np.bincount(bins, weights=x[order]) for x in (counts, want))
    used = expected > 0
    return stats.chisquare(got[used], expected[used]).pvalue


@pytest.mark.parametrize(
    ("vocab", "draws"),  # two cores draw a thousand of the wide vocabulary in a second or two
    [(16, 200_000), (4096, 20_000), pytest.param(4096, 200_000, marks=pytest.mark.slow)],
)
def test_draws_follow_the_target(vocab, draws):
    """Holm-corrected over the verifiers, with distributions and with point masses."""
    found = sorted(
        pvalue(VERIFIERS[rule], vocab, draws, probs)
        for rule in VERIFIERS
        for probs in (True, False)
    )
    for i, p in enumerate(found):
        assert p > 0.01 / (len(found) - i), found


def test_a_biased_verifier_is_found_out():
    assert pvalue(biased, 16, 50_000) < 1e-6


def test_a_token_without_probability_is_never_kept(monkeypatch):
    """`u <= p` would keep it where u is 0; so would a division by q."""
    monkeypatch.setattr(verify_rules, "_uniform", lambda rows, at, draft: jnp.zeros((4096, 1)))
    rows = sampling_rows(
        [SamplingParams(temperature=1.0)] * 4096,
        samples=range(4096),
        seeds=[0] * 4096,
        stop_ids=[()] * 4096,
        vocab_limit=4,
    )
    scores = jnp.broadcast_to(jnp.array([-jnp.inf, 0.0, 0.0, -jnp.inf]), (4096, 2, 4))
    position = jnp.arange(4096)
    draft = Draft(jnp.zeros((4096, 1), jnp.int32), jnp.ones((4096,), jnp.int32))
    for verify in VERIFIERS.values():
        kept = verify(scores, draft, rows, position)
        assert int(kept.num_accepted.sum()) == 0
        assert set(np.asarray(kept.tokens[:, 0]).tolist()) == {1, 2}
