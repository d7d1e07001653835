"""Speculation through the whole library, on tiny models: same tokens, honest counts."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import steps
from jaxinfer.config import LayerConfig, Rope
from jaxinfer.drafters import self_drafter
from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM
from jaxinfer.sampling import SamplingParams
from jaxinfer.speculative.costs import Costs
from jaxinfer.speculative.drafter import Draft, Drafter, static
from jaxinfer.speculative.fallback import FallbackDrafter
from jaxinfer.speculative.ngram import NGramDrafter
from jaxinfer.speculative.vocab import map_vocabularies
from jaxinfer.testing import tiny_llm, tiny_tokenizer

PROMPTS = [
    "abcabcabc",
    "hello, hello",
    "x",
    "to be or not to be, that is",
    "zz",
    "a1b2a1b2",
    "q",
    "~~~~",
]
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
WARM = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.9, top_p=0.9, seed=5)


class LastToken(Drafter, kw_only=True):
    """Offers the last token again and again."""

    num_draft: int = static(3)

    def propose(self, state, context, rows, want, keys):
        """The last token, as often as wanted."""
        last = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)
        return Draft(jnp.repeat(last, self.max_draft, axis=1), want), state


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


def drafter(name, llm, num_draft):
    other = tiny_llm(seed=4)
    model = llm.speculation(other).drafter
    found = {
        "ngram": NGramDrafter(min_ngram=1),
        "user": LastToken(),
        "same": llm.speculation(llm).drafter,
        "other": model,
        "self": self_drafter(llm.model, layers=(0,)),
        "fallback": FallbackDrafter(first=NGramDrafter(), second=model),
    }[name]
    return found.replace(num_draft=num_draft)


NAMES = ["ngram", "user", "same", "other", "self", "fallback"]


def ids(outputs):
    return [o.token_ids for o in outputs]


@pytest.mark.parametrize(
    ("name", "num_draft"),
    [*((name, 3) for name in NAMES), ("ngram", 1), ("ngram", 8)],
)
def test_exact_mode_is_bit_identical(llm, name, num_draft):
    """Greedy and sampled, alone and ragged."""
    found = drafter(name, llm, num_draft)
    for params in (GREEDY, WARM):
        want = llm.generate(PROMPTS, params, exact=True, logprobs=1)
        got = llm.generate(PROMPTS, params, exact=True, drafter=found, logprobs=1)
        assert ids(got) == ids(want)
        assert [o.logprobs for o in got] == [o.logprobs for o in want]  # the bits, not the text
    if num_draft == 3 and name in ("ngram", "other"):
        alone = llm.generate(PROMPTS[3], GREEDY, exact=True, drafter=found)
        assert alone.token_ids == llm.generate(PROMPTS[3], GREEDY, exact=True).token_ids


def test_exact_mode_in_bfloat16():
    llm = tiny_llm(dtype="bfloat16")
    want = llm.generate(PROMPTS, WARM, exact=True, logprobs=1)
    got = llm.generate(PROMPTS, WARM, exact=True, drafter=drafter("other", llm, 5), logprobs=1)
    assert [o.logprobs for o in got] == [o.logprobs for o in want]


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


def test_end_tokens_inside_an_accepted_block(llm):
    free = llm.generate("abcabcabc", GREEDY).token_ids
    for at in (4, 9, 10, 11, 17):
        end = free[at]
        first = free.index(end)
        for name in ("same", "ngram"):
            found = drafter(name, llm, 5)
            out = llm.generate("abcabcabc", GREEDY, stop_token_ids=[end], drafter=found)
            assert (out.token_ids, out.finish_reason) == (free[: first + 1], "stop")
            held = llm.generate(
                "abcabcabc", GREEDY, stop_token_ids=[end], min_tokens=first + 3, drafter=found
            )
            plain = llm.generate("abcabcabc", GREEDY, stop_token_ids=[end], min_tokens=first + 3)
            assert held.token_ids == plain.token_ids
    for count in range(1, 12):
        out = llm.generate("abc", GREEDY, max_tokens=count, drafter=drafter("same", llm, 5))
        assert len(out.token_ids) == count


def test_every_sampling_parameter_means_the_same(llm):
    """Ragged rows with parameters of their own; a refused draft must not leak into a penalty."""
    each = [
        SamplingParams(max_tokens=30, temperature=1.0, seed=1, top_k=5),
        SamplingParams(max_tokens=30, temperature=0.7, seed=2, repetition_penalty=1.4),
        SamplingParams(max_tokens=25, frequency_penalty=0.9, ignore_eos=True),
        SamplingParams(max_tokens=30, temperature=1.2, seed=3, min_p=0.1, presence_penalty=1.0),
        SamplingParams(max_tokens=20, min_tokens=12, stop_token_ids=[5, 6, 7, 8, 9]),
        SamplingParams(max_tokens=30, temperature=1.0, seed=4, logit_bias={7: 4.0, 9: -5.0}),
        SamplingParams(max_tokens=30, temperature=1.0, seed=5, top_p=0.6),
        SamplingParams(max_tokens=30),
    ]
    want = ids(llm.generate(PROMPTS, each, exact=True))
    for name in ("ngram", "fallback"):
        got = llm.generate(PROMPTS, each, exact=True, drafter=drafter(name, llm, 4))
        assert ids(got) == want


def test_streams_mark_what_was_drafted(llm):
    found = drafter("ngram", llm, 5)
    pieces = list(llm.stream("abcabcabc", GREEDY, drafter=found))
    whole = llm.generate("abcabcabc", GREEDY, drafter=found)
    assert "".join(pieces) == whole.text
    assert [i for p in pieces for i in p.token_ids] == whole.token_ids
    marks = [m for p in pieces for m in p.drafted]
    assert len(marks) == 40
    assert 0 < sum(marks) == whole.stats.accepted
    stop = whole.text[11:14]
    plain = llm.generate("abcabcabc", GREEDY, stop=stop)
    assert llm.generate("abcabcabc", GREEDY, stop=stop, drafter=found).text == plain.text


def test_window_layers_under_speculation():
    rope = Rope(theta=10000.0, dim=8)
    llm = tiny_llm(layers=(LayerConfig(window=6, rope=rope), LayerConfig(rope=rope)))
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    want = ids(llm.generate(PROMPTS, params))
    for name in ("ngram", "other"):
        assert ids(llm.generate(PROMPTS, params, drafter=drafter(name, llm, 5))) == want


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


def test_nothing_compiles_once_warm(llm):
    found = {name: drafter(name, llm, "auto") for name in ("ngram", "other")}

    def everything(prompt):
        for name in found:
            for params in (GREEDY, WARM):
                llm.generate(prompt, params, drafter=found[name])
                llm.generate(prompt, params, drafter=found[name], top_k=3, min_tokens=2)
            list(llm.stream(prompt, WARM, drafter=found[name]))

    everything("abc")
    with steps.count_compilations() as compiled:
        everything("aaaaaaa")
        everything("To be, or not")
    assert compiled == []


def test_the_drafter_of_the_readme(llm):
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    blocks = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    (source,) = (block for block in blocks if "class LastToken" in block)
    room = {"llm": llm}
    exec(source, room)
    out = llm.generate("aaaa", GREEDY, drafter=room["LastToken"]())
    assert out.stats.drafted > 0
    assert out.token_ids == llm.generate("aaaa", GREEDY).token_ids


def test_the_loop_is_compiled_once_from_calibration_to_the_last_token(llm):
    """A loaded model's weights are bound to a device, and then every input must always be."""
    params = jax.device_put(llm.params, jax.devices()[0])
    bound = LLM(params, llm.config, llm.tokenizer, dtype=llm.model.dtype)
    with steps.count_compilations() as compiled:
        bound.generate("abcabcabc", GREEDY, drafter=NGramDrafter(num_draft=2))
        bound.generate("a", GREEDY, drafter=NGramDrafter(num_draft=2), stop="?!")
    assert sum("rounds" in name for name in compiled) == 1


class Wrong(LastToken, kw_only=True):
    """Returns one token too few, or a state that changes its shape."""

    fault: str = static("tokens")

    def init(self, batch, capacity):
        return jnp.zeros((batch,))

    def propose(self, state, context, rows, want, keys):
        draft, state = super().propose(state, context, rows, want, keys)
        if self.fault == "tokens":
            draft = draft._replace(tokens=draft.tokens[:, :-1])
        if self.fault == "dtype":
            draft = draft._replace(num=draft.num.astype(jnp.float32))
        if self.fault == "probs":
            draft = draft._replace(probs=jnp.zeros((1,)))
        return draft, state[:, None] if self.fault == "state" else state


@pytest.mark.parametrize("fault", ["tokens", "dtype", "probs", "state"])
def test_a_drafter_with_wrong_shapes_is_refused(llm, fault):
    with pytest.raises(InvalidArgument, match=r"Wrong\.propose") as refused:
        llm.generate("abc", GREEDY, drafter=Wrong(fault=fault))
    assert "\n" not in str(refused.value)


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


def test_a_drafter_that_is_the_target_is_right_in_every_row(llm):
    """Prompts of one token have no prefill; rows that differ in length are rewound one by one."""
    found = drafter("same", llm, 4)
    for prompts in ([[41]], [[1], [2, 3], [7] * 20, [9], [4, 4, 1], [41], [8], [30, 2]]):
        for o in llm.generate(prompts, GREEDY, drafter=found, verifier="rejection"):
            assert o.stats.accepted == o.stats.drafted > 20


class NoTokens(LastToken, kw_only=True):
    """Offers what is no token: an id below all, then one beyond."""

    def propose(self, state, context, rows, want, keys):
        tokens = jnp.broadcast_to(jnp.array([-1, 64, 2**30]), (want.shape[0], 3))
        return Draft(tokens, want), state


@pytest.mark.parametrize("verifier", ["exact", "rejection", "block"])
def test_what_is_no_token_is_never_said(llm, verifier):
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=3.0, seed=1)
    out = llm.generate("abc", params, drafter=NoTokens(), verifier=verifier)
    assert len(out.token_ids) == 12
    assert all(0 <= i < 64 for i in out.token_ids)
    assert out.stats.drafted == 0


def test_a_row_does_not_depend_on_its_neighbours(llm):
    """Nor greedy rows on sampled ones; with a drafter that draws and a rule that has luck."""
    cold = SamplingParams(max_tokens=24, ignore_eos=True)
    warm = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.9, seed=5)
    hot = SamplingParams(max_tokens=9, ignore_eos=True, temperature=2.0, top_k=9, seed=6)
    for verifier in ("rejection", "block"):
        how = {"drafter": drafter("other", llm, 3), "verifier": verifier}
        a = llm.generate(["abcab", "hello", "x"], [warm, cold, hot], **how)
        b = llm.generate(["abcab", "hello", "zzzzzz"], [warm, cold, cold], **how)
        assert ids(a[:2]) == ids(b[:2])
        assert a[1].token_ids == llm.generate("hello", cold).token_ids


def test_a_seed_means_one_text_however_fast_the_machine_is(llm, monkeypatch):
    texts = []
    for dear in (1.0, 1.5, 100.0):
        costs = Costs((1.0, dear, dear), (0.0, 0.1))
        monkeypatch.setattr("jaxinfer.generate.measure", lambda *_, costs=costs: costs)
        again = LLM(llm.params, llm.config, llm.tokenizer, dtype=llm.model.dtype)
        out = again.generate("abcabc", WARM, drafter=drafter("other", llm, "auto"))
        texts.append((out.token_ids, out.stats.drafted))
    assert texts[0][0] == texts[1][0] == texts[2][0]
    assert texts[0][1] > texts[2][1] == 0


def test_a_ring_that_goes_round_under_speculation():
    """Window layers have 6 + 512 slots here, and the text 640 tokens."""
    rope = Rope(theta=10000.0, dim=8)
    layers = (LayerConfig(window=6, rope=rope), LayerConfig(rope=rope))
    llm = tiny_llm(layers=layers, max_len=2048)
    params = SamplingParams(max_tokens=160, ignore_eos=True, temperature=0.5, seed=2)
    want = llm.generate("abcabc" * 80, params)
    assert len(set(want.token_ids)) > 10
    often_wrong, right = NGramDrafter(min_ngram=1, num_draft=5), llm.speculation(llm, 4).drafter
    stats = []
    for found in (often_wrong, right):
        got = llm.generate("abcabc" * 80, params, drafter=found, verifier="exact")
        assert got.token_ids == want.token_ids
        stats.append(got.stats)
    assert stats[0].drafted > 3 * stats[0].accepted
    assert stats[1].accepted == stats[1].drafted > 120


def test_stats_end_where_the_text_ends(llm):
    """A stop string is seen by the host, some rounds after it was made."""
    free = llm.generate("abcabcabc", GREEDY, drafter=drafter("same", llm, 4))
    out = llm.generate("abcabcabc", GREEDY, drafter=drafter("same", llm, 4), stop=free.text[6:8])
    s = out.stats
    assert s.new_tokens == len(out.token_ids) < 40
    assert s.rounds == -(-s.new_tokens // 5)  # four drafted, one its own
    assert s.accepted == sum(s.accepted_by_position)
    assert s.rounds + s.accepted - s.new_tokens in (0, 1)
    plain = llm.generate("abcabcabc", GREEDY, stop=free.text[6:8]).stats
    assert plain.rounds == plain.new_tokens


def test_a_fallback_takes_names_and_models(llm):
    found = FallbackDrafter(first="ngram", second=tiny_llm(seed=4))
    out = llm.generate("abcabc", GREEDY, drafter=found, num_draft=3)
    assert out.token_ids == llm.generate("abcabc", GREEDY).token_ids
    assert out.stats.drafted > 0


class Half(LastToken, kw_only=True):
    """Forgets its state."""

    def propose(self, state, context, rows, want, keys):
        return super().propose(state, context, rows, want, keys)[0]


class Empty(Drafter, kw_only=True):
    """Has no propose."""


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (Half, r"Half.propose: must return \(Draft, state\)"),
        (Empty, "Empty.propose is missing"),
        (lambda: NGramDrafter(max_ngram=2, min_ngram=3), "1 <= min_ngram <= max_ngram"),
        (lambda: FallbackDrafter(first="ngram", second="nobody"), "drafter='nobody'"),
    ],
)
def test_more_wrong_drafters(llm, wrong, words):
    with pytest.raises(InvalidArgument, match=words):
        llm.generate("abc", GREEDY, drafter=wrong())


def test_no_draft_is_plain_decoding(llm):
    assert llm.generate("abc", GREEDY, drafter="self", num_draft=0).stats.drafted == 0
    with pytest.raises(InvalidArgument, match="too few to leave any out"):
        tiny_llm(layers=(LayerConfig(),)).generate("abc", drafter="self")
