"""Drafters one by one: what they offer, how they are named, and which are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_drafters import GREEDY, NAMES, PROMPTS, WARM, LastToken, drafter, ids

from jaxinfer.config import LayerConfig
from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM
from jaxinfer.sampling import (
    History,
    SamplingParams,
    choose,
    greedy_rows,
    probabilities,
    sampling_rows,
)
from jaxinfer.speculative import model_drafter
from jaxinfer.speculative.drafter import Drafter, static
from jaxinfer.speculative.fallback import FallbackDrafter
from jaxinfer.speculative.ngram import NGramDrafter
from jaxinfer.speculative.pace import new_pace
from jaxinfer.speculative.self_drafter import SelfDrafter
from jaxinfer.speculative.vocab import map_vocabularies
from jaxinfer.testing import tiny_llm, tiny_tokenizer


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


@pytest.mark.parametrize(
    ("name", "verifier"),
    [
        *((name, "auto") for name in NAMES),
        ("ngram", "rejection"),
        ("other", "exact"),
        ("other", "rejection"),
    ],
)
def test_greedy_text_is_the_same_in_the_default_mode(llm, name, verifier):
    want = llm.generate(PROMPTS, GREEDY)
    got = llm.generate(PROMPTS, GREEDY, drafter=drafter(name, llm, 5), verifier=verifier)
    assert ids(got) == ids(want)
    for o in got:
        s = o.stats
        assert s.rounds + s.accepted == s.new_tokens == 40
        assert s.accepted == sum(s.accepted_by_position) <= s.drafted
        assert s.accepted_by_position == sorted(s.accepted_by_position, reverse=True)
        assert s.tokens_per_round == pytest.approx(40 / s.rounds)
        assert s.draft_seconds + s.verify_seconds == pytest.approx(s.decode_seconds)


def test_a_drafter_that_is_the_target_is_always_right(llm):
    """Off by one in the drafter's cache, and the token behind a full acceptance would be wrong."""
    for verifier in ("exact", "rejection", "block"):
        for params in (GREEDY, WARM):
            found = drafter("same", llm, 4)
            out = llm.generate("abcab", params, drafter=found, verifier=verifier)
            s = out.stats
            assert s.accepted == s.drafted > 20, (verifier, s)


def test_a_drafter_that_is_the_target_is_right_in_every_row(llm):
    """Prompts of one token have no prefill; rows that differ in length are rewound one by one."""
    found = drafter("same", llm, 4)
    for prompts in ([[41]], [[1], [2, 3], [7] * 20, [9], [4, 4, 1], [41], [8], [30, 2]]):
        for o in llm.generate(prompts, GREEDY, drafter=found, verifier="rejection"):
            assert o.stats.accepted == o.stats.drafted > 20


def test_what_a_model_drafter_draws_from_is_what_it_tells(monkeypatch):
    """Of a model in bfloat16 too, to the bit: drawn as rounded and judged as not, a draft would
    bias `rejection` by less than draws can show."""
    llm, drawn = tiny_llm(dtype="bfloat16"), []
    found = llm.speculation(tiny_llm(seed=4, dtype="bfloat16"), num_draft=3).drafter
    tokens, lengths = jnp.zeros((1, 16), jnp.int32), jnp.asarray([5], jnp.int32)
    context, params = History(tokens, lengths, lengths), SamplingParams(temperature=0.9)
    rows = sampling_rows([params], samples=[0], seeds=[1], stop_ids=[()], vocab_limit=64)
    keys = jax.random.split(jax.random.key(0), (1, 3))

    def choose_and_note(scores, *rest):
        drawn.append(probabilities(scores, rows))
        return choose(scores, *rest)

    monkeypatch.setattr(model_drafter, "choose", choose_and_note)
    with jax.disable_jit():
        draft, _ = found.propose(found.init(1, 16), context, rows, jnp.asarray([3]), keys)
    assert len(drawn) == 3
    np.testing.assert_array_equal(draft.probs, jnp.concatenate(drawn, axis=1))


class Afresh(Drafter, kw_only=True):
    """Offers what `own` would if it read the whole text anew in every round."""

    own: Any

    @property
    def draws(self):
        return self.own.draws

    def propose(self, state, context, rows, want, keys):
        nothing = self.own.init(*context.tokens.shape)
        return self.own.propose(nothing, context, rows, want, keys)[0], state


@pytest.mark.parametrize("vocab_size", [64, 48])
def test_what_a_model_drafter_remembers_is_the_text(llm, vocab_size):
    """Of a draft refused early, late or not at all, in each row of its own, nothing is left."""
    found = llm.speculation(tiny_llm(vocab_size, seed=2), num_draft=4).drafter
    kept, afresh = (
        llm.generate(PROMPTS, WARM, drafter=own, verifier="rejection")
        for own in (found, Afresh(own=found, num_draft=4))
    )
    assert [o.stats.accepted_by_position for o in kept] == [
        o.stats.accepted_by_position for o in afresh
    ]
    assert ids(kept) == ids(afresh)
    assert all(0 < o.stats.accepted < o.stats.drafted for o in kept)


def test_another_vocabulary(llm):
    """Characters 33 .. 33+47 of 64: the drafter can say a part, and is spelled the rest."""
    other = tiny_llm(vocab_size=48, seed=2)
    found = llm.speculation(other, num_draft=4).drafter
    want = llm.generate(PROMPTS, WARM, exact=True)
    assert ids(llm.generate(PROMPTS, WARM, exact=True, drafter=found)) == ids(want)
    out = llm.generate(PROMPTS, GREEDY, drafter=found, verifier="block")
    assert ids(out) == ids(llm.generate(PROMPTS, GREEDY))
    assert sum(o.stats.drafted for o in out) > 0


def test_vocabularies_are_matched_by_what_tokens_say():
    small, large = tiny_tokenizer(8), tiny_tokenizer(12)
    found = map_vocabularies(large, small, 12, 10)  # the small one's logits are padded to 10
    assert np.asarray(found.own)[:8, 0].tolist() == list(range(8))
    assert (np.asarray(found.own)[8:] == -1).all()
    assert np.asarray(found.target).tolist() == [*range(8), 12, 12]


def test_a_vocabulary_with_nothing_in_common():
    with pytest.raises(InvalidArgument, match="shares 1 of 8 tokens with the model's"):
        map_vocabularies(tiny_tokenizer(8), tiny_tokenizer(1), 8, 1)


def test_the_drafter_of_the_readme(llm):
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    blocks = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    (source,) = (block for block in blocks if "class LastToken" in block)
    room = {"llm": llm}
    exec(source, room)
    out = llm.generate("aaaa", GREEDY, drafter=room["LastToken"]())
    assert out.stats.drafted > 0
    assert out.token_ids == llm.generate("aaaa", GREEDY).token_ids


def test_a_fallback_takes_names_and_models(llm):
    found = FallbackDrafter(first="ngram", second=tiny_llm(seed=4))
    out = llm.generate("abcabc", GREEDY, drafter=found, num_draft=3)
    assert out.token_ids == llm.generate("abcabc", GREEDY).token_ids
    assert out.stats.drafted > 0


def test_the_model_drafts_for_itself(llm):
    """Layers chosen by hand, fewer bits, or both; weights shared, and made only once."""

    def weights(wanted):
        return llm.speculation(wanted).drafter.params["layer_0"]

    assert weights("self:int8") is weights(SelfDrafter(quantize="int8", num_draft=5))
    some = llm.speculation(SelfDrafter(layers=(1,), num_draft=2)).drafter
    assert some.num_draft == 2
    assert set(some.params) == {"embed", "final_norm", "layer_0"}
    assert some.params["layer_0"] is llm.params["layer_1"]
    both = llm.speculation(SelfDrafter(layers=(1,), quantize="int8")).drafter
    assert both.config == some.config
    assert weights("self") is llm.params["layer_1"]
    for found in (SelfDrafter(layers=(1,)), SelfDrafter(quantize="int8")):
        out = llm.generate("abcabc", GREEDY, drafter=found, num_draft=3)
        assert out.token_ids == llm.generate("abcabc", GREEDY).token_ids
        assert out.stats.drafted > 0


def test_load_remembers_a_drafter(llm):
    parts = (llm.params, llm.config, llm.tokenizer)
    again = LLM(*parts, dtype=llm.model.dtype, drafter="ngram", num_draft=5)
    out = again.generate("abcabcabc", GREEDY)
    assert out.stats.drafted > 0
    assert again.generate("abcabcabc", GREEDY, drafter=None).stats.drafted == 0
    assert again.speculation("ngram").drafter.num_draft == 5
    assert again.speculation("ngram", 2).drafter.num_draft == 2
    judged = LLM(*parts, dtype=llm.model.dtype, drafter="ngram", verifier="block")
    assert judged.speculation(exact=True).verifier == "auto"
    want = llm.generate("abc", WARM).token_ids
    assert judged.generate("abc", WARM, drafter=None).token_ids == want


def test_no_draft_is_plain_decoding(llm):
    assert llm.generate("abc", GREEDY, drafter="self", num_draft=0).stats.drafted == 0
    with pytest.raises(InvalidArgument, match="too few to leave any out"):
        tiny_llm(layers=(LayerConfig(),)).generate("abc", drafter="self")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drafter": "nothing-like-this"}, "one of auto, none, ngram, self"),
        ({"drafter": 3}, "one of auto, none, ngram, self"),
        ({"drafter": "ngram", "num_draft": -1}, "num_draft=-1"),
        ({"drafter": "ngram", "num_draft": 1000}, "num_draft=1000"),
        ({"drafter": "ngram", "verifier": "lenient"}, "verifier='lenient'"),
        ({"drafter": "ngram", "verifier": "block", "exact": True}, "exact=True"),
    ],
)
def test_bad_options(llm, options, words):
    with pytest.raises(InvalidArgument, match=words):
        llm.generate("abc", GREEDY, **options)


def test_a_draft_longer_than_the_context():
    llm = tiny_llm(max_len=16)
    with pytest.raises(InvalidArgument, match="does not fit the context of 16 "):
        llm.generate("abc", max_tokens=4, drafter="ngram", num_draft=15)
    small = LLM(llm.params, llm.config, llm.tokenizer, dtype=llm.model.dtype, max_len=8)
    want = small.generate("aaa", max_tokens=5, ignore_eos=True).token_ids
    assert small.generate("aaa", max_tokens=5, ignore_eos=True, drafter="ngram").token_ids == want


class Wrong(LastToken, kw_only=True):
    """Returns one token too few, or a state that changes its shape."""

    fault: str = static("tokens")

    def init(self, batch, capacity):
        return jnp.zeros((batch,))

    def propose(self, state, context, rows, want, keys):
        draft, state = super().propose(state, context, rows, want, keys)
        if self.fault == "value":
            int(want[0])
        if self.fault == "tokens":
            draft = draft._replace(tokens=draft.tokens[:, :-1])
        if self.fault == "dtype":
            draft = draft._replace(num=draft.num.astype(jnp.float32))
        if self.fault == "probs":
            draft = draft._replace(probs=jnp.zeros((1,)))
        if self.fault == "kind":
            draft = draft._replace(kind=jnp.zeros((), jnp.int32))
        return draft, state[:, None] if self.fault == "state" else state

    def observe(self, state, context, num_new, hidden):
        return (state, state) if self.fault == "observed" else state


@pytest.mark.parametrize("fault", ["tokens", "dtype", "probs", "kind", "state", "value"])
def test_a_drafter_with_wrong_shapes_is_refused(llm, fault):
    with pytest.raises(InvalidArgument, match=r"Wrong\.propose") as refused:
        llm.generate("abc", GREEDY, drafter=Wrong(fault=fault))
    assert "\n" not in str(refused.value)


class Nameless(LastToken, kw_only=True):
    """Its state is no array."""

    def init(self, batch, capacity):
        return "nothing"


class Unsure(LastToken, kw_only=True):
    """Says that it draws, and does not say from what."""

    @property
    def draws(self):
        return True


class Fickle(LastToken, kw_only=True):
    """Counts with a field that is not declared static."""

    again: int = 2

    def propose(self, state, context, rows, want, keys):
        for _ in range(self.again):
            draft, state = super().propose(state, context, rows, want, keys)
        return draft, state


class Named(LastToken, kw_only=True):
    """Fields declared the wrong way round."""

    name: Any = 0
    table: Any = static(None)


class Short(LastToken, kw_only=True):
    """Takes fewer arguments than it is given."""

    def propose(self, state, context):
        return None


def test_a_length_must_be_static():
    words = r"Loose.num_draft: write `num_draft: int = static\(3\)`"
    with pytest.raises(InvalidArgument, match=words):

        class Loose(Drafter, kw_only=True):
            num_draft: int = 3

    with pytest.raises(InvalidArgument, match=words):

        class Loose(Drafter, kw_only=True):
            num_draft = 3


class Boastful(LastToken, kw_only=True):
    """Keeps more than all."""

    @property
    def kinds(self):
        return (1.5,)


class Sure(LastToken, kw_only=True):
    """Has one kind, and does not say so in a tuple."""

    @property
    def kinds(self):
        return 0.5


class Half(LastToken, kw_only=True):
    """Forgets its state."""

    def propose(self, state, context, rows, want, keys):
        return super().propose(state, context, rows, want, keys)[0]


class Empty(Drafter, kw_only=True):
    """Has no propose."""


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Boastful, r"Boastful.kinds=\(1.5,\)"),
        (Half, r"Half.propose: must return \(Draft, state\)"),
        (Sure, "Sure.kinds=0.5: a tuple of shares"),
        (Empty, "Empty.propose is missing"),
        (lambda: NGramDrafter(max_ngram=2, min_ngram=3), "1 <= min_ngram <= max_ngram"),
        (lambda: FallbackDrafter(first="ngram", second="nobody"), "drafter='nobody'"),
        (lambda: FallbackDrafter(first="ngram", second=None), "name two drafters"),
        (lambda: FallbackDrafter(first="none", second="ngram"), "name two drafters"),
        (lambda: Wrong(fault="observed"), r"Wrong.observe: the state it returns"),
        (lambda: SelfDrafter(layers=(1, 0)), r"layers=\(1, 0\): numbers from 0 to 1"),
        (lambda: SelfDrafter(layers=(0, 2)), r"layers=\(0, 2\): numbers from 0 to 1"),
        (lambda: SelfDrafter(layers=()), r"SelfDrafter\(layers=\(\), quantize=None\): a tuple"),
        (lambda: SelfDrafter(layers=[0]), r"SelfDrafter\(layers=\[0\]"),
        (lambda: SelfDrafter(quantize=5), "quantize=5"),
        (lambda: Named(name="x"), "Named.name: is no array: declare it with"),
        (
            lambda: Named(table=np.zeros(3)),
            "Named.table: holds an array: declare it without static",
        ),
        (lambda: FallbackDrafter(first=Half(), second="ngram"), "Half.propose: must return"),
        (Short, "Short.propose: .* argument"),
        (lambda: SelfDrafter(quantize="int3"), "self:int3"),
        (Nameless, "Nameless.init: must return a pytree of arrays"),
        (Unsure, r"Unsure.propose: draft.probs must be float32\[1, 3, 64\], is None"),
        (Fickle, "Fickle.propose: .* declared with jaxinfer.speculative.static"),
    ],
)
def test_more_wrong_drafters(llm, wrong, words):
    with pytest.raises(InvalidArgument, match=words):
        llm.generate("abc", GREEDY, drafter=wrong())


class NoTokens(LastToken, kw_only=True):
    """Offers a token, then what is none, then a token again."""

    none: int = static(-1)

    def propose(self, state, context, rows, want, keys):
        draft, state = super().propose(state, context, rows, want, keys)
        return draft._replace(tokens=draft.tokens.at[:, 1].set(self.none)), state


@pytest.mark.parametrize(("verifier", "none"), [("exact", -1), ("rejection", 64), ("block", 2**30)])
def test_what_is_no_token_is_never_said(llm, verifier, none):
    """A draft ends before it, whether it is an id below all or one beyond."""
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=3.0, seed=1)
    out = llm.generate("abc", params, drafter=NoTokens(none=none), verifier=verifier)
    assert len(out.token_ids) == 12
    assert all(0 <= i < 64 for i in out.token_ids)
    assert 0 < out.stats.drafted <= out.stats.rounds  # one a round


def test_ngrams_say_how_long_their_match_is():
    """The match of two tokens is the latest, but one of four is longer; a period goes on."""
    texts = [[1, 2, 3, 4, 5, 9, 3, 4, 8, 1, 2, 3, 4], [7, 5, 7], [1, 2, 3], [6, 6, 6, 6, 6, 6]]
    tokens = np.zeros((4, 16), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    lengths = jnp.asarray([len(text) for text in texts], jnp.int32)
    context = History(jnp.asarray(tokens), lengths, lengths)
    rows, want = greedy_rows(4, 64), jnp.full((4,), 3, jnp.int32)
    for options, num in (
        ({}, [3, 3, 0, 3]),
        ({"num_draft": 3}, [3, 0, 0, 3]),
        ({"num_draft": 3, "min_ngram": 1}, [3, 3, 0, 3]),
        ({"min_ngram": 4}, [3, 0, 0, 3]),
    ):
        draft, _ = NGramDrafter(**options).propose((), context, rows, want, None)
        assert draft.num.tolist() == num
        assert draft.kind[jnp.asarray([0, 1, 3])].tolist() == [3, 0, 3]
        offered = draft.tokens[:, :3].tolist()
        assert [offered[i] for i in (0, 1, 3)] == [[5, 9, 3], [5, 7, 5], [6, 6, 6]]


def test_a_kind_that_fails_is_offered_less_and_the_others_as_before():
    pace = new_pace(1, (0.5, 0.9), jnp.asarray([1.0, 1.2, 1.35, 1.55]), jnp.zeros(4))
    done = jnp.asarray([False])

    def ints(n):
        return jnp.asarray([n], jnp.int32)

    def lengths(pace):
        return [int(pace.after(ints(3), ints(kind), done)) for kind in (0, 1)]

    assert lengths(pace) == [2, 3]
    bad = pace
    for _ in range(10):
        bad = bad.update(ints(0), ints(1), ints(0))
    assert lengths(bad) == [0, 3]
    again = bad
    for _ in range(600):  # nothing was judged: what was seen is forgotten
        again = again.update(ints(0), ints(0), ints(1))
    assert lengths(again) == [2, 3]
    for seconds, length in (([0.0] * 4, 3), ([0.5] * 4, 3), ([0.0, 0.2, 0.4, 0.6], 0)):
        some = dataclasses.replace(bad, draft_seconds=jnp.asarray(seconds))
        assert (
            int(some.before(ints(3), done)) == length
        )  # only what a token more costs can be saved


def test_a_kind_that_is_rare_and_always_wrong_is_soon_given_up():
    """Every eighth round offers four tokens' match, which is never kept: less than 5 % is lost."""
    costs = jnp.asarray([1.0, 1.2, 1.4, 1.4, 2.0, 2.0, 2.0, 2.0])
    pace, done, spent = (
        new_pace(1, NGramDrafter().kinds, costs, jnp.zeros(8)),
        jnp.zeros(1, bool),
        0.0,
    )
    update = jax.jit(lambda pace, judged, kind: pace.update(jnp.zeros(1, jnp.int32), judged, kind))
    for i in range(400):
        kind = jnp.asarray([3 if i % 8 == 0 else 0], jnp.int32)
        offered = int(pace.after(jnp.asarray([7 if i % 8 == 0 else 0], jnp.int32), kind, done))
        spent += float(costs[offered])
        pace = update(pace, jnp.asarray([min(offered, 1)], jnp.int32), kind)
    assert 1 < spent / 400 < 1.05


def test_a_fallback_keeps_the_kinds_of_both_apart(llm):
    """And asks the second where the first has but a match of one token."""
    found = llm.speculation(FallbackDrafter(first="ngram", second=tiny_llm(seed=4))).drafter
    assert found.num_draft == "auto"
    assert found.kinds == (*NGramDrafter().kinds, 2 / 3)
    tokens = jnp.asarray([[1, 2, 1, 2], [1, 2, 3, 4], [1, 2, 3, 1]], jnp.int32)
    tokens, lengths = jnp.pad(tokens, [(0, 0), (0, 12)]), jnp.full((3,), 4, jnp.int32)
    context, rows = History(tokens, lengths, lengths), greedy_rows(3, llm.model.vocab_limit)
    state = found.observe(found.init(3, 16), context, lengths - 1, None)
    keys = jax.random.split(jax.random.key(0), (3, found.max_draft))
    draft, _ = found.propose(state, context, rows, jnp.full((3,), 2, jnp.int32), keys)
    assert draft.num.tolist() == [2, 2, 2]
    assert draft.kind.tolist() == [1, 4, 4]
