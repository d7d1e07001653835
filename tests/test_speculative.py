"""Speculation through the whole library, on tiny models: same tokens, honest counts."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_drafters import GREEDY, NAMES, PROMPTS, WARM, drafter, ids

from jaxinfer import cache, calibrate, steps
from jaxinfer.batch import Batch
from jaxinfer.config import LayerConfig, Rope
from jaxinfer.generate import LLM
from jaxinfer.sampling import SamplingParams
from jaxinfer.speculative.costs import Costs
from jaxinfer.speculative.ngram import NGramDrafter
from jaxinfer.testing import tiny_llm


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_draft", [1, 3, 5, 8])
@pytest.mark.parametrize("name", NAMES)
def test_exact_mode_over_all_of_them(name, num_draft, dtype):
    """Every drafter, length and dtype, greedy and sampled, a row alone and a ragged batch."""
    llm = tiny_llm(dtype=dtype)
    found = drafter(name, llm, num_draft)
    for params in (GREEDY, WARM):
        for prompts in (PROMPTS[:1], PROMPTS):
            want = llm.generate(prompts, params, exact=True, logprobs=1)
            got = llm.generate(prompts, params, exact=True, drafter=found, logprobs=1)
            assert [o.logprobs for o in got] == [o.logprobs for o in want]
    jax.clear_caches()  # the programs of all cases are more than one process can hold


def test_end_tokens_inside_an_accepted_block(llm):
    """Rounds of six: the end is their first token, in the middle, the last draft, or behind it."""
    free = llm.generate("abcabcabc", WARM).token_ids
    # At first several ends in a row: a single one that is passed over is waited for forever.
    for ends in (free[:6], free[1:6], free[4:5], free[5:6], free[14:15]):
        at = free.index(ends[0])
        held = llm.generate("abcabcabc", WARM, min_tokens=at + 3, stop_token_ids=ends)
        for name in ("same", "ngram"):
            how = {"stop_token_ids": ends, "drafter": drafter(name, llm, 5), "verifier": "exact"}
            out = llm.generate("abcabcabc", WARM, **how)
            assert (out.token_ids, out.finish_reason) == (free[: at + 1], "stop")
            out = llm.generate("abcabcabc", WARM, min_tokens=at + 3, **how)
            assert out.token_ids == held.token_ids
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
        got = llm.generate(PROMPTS, each, drafter=drafter(name, llm, 4), verifier="exact")
        assert ids(got) == ids(llm.generate(PROMPTS, each))
    samples = llm.generate("abcabc", WARM, n=3, drafter=drafter("ngram", llm, 4))
    assert ids(samples) == ids(llm.generate("abcabc", WARM, n=3))
    assert len(set(map(tuple, ids(samples)))) == 3


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


def test_the_loop_is_compiled_once_from_calibration_to_the_last_token(llm):
    """A loaded model's weights are bound to a device, and then every input must always be."""
    params = jax.device_put(llm.params, jax.devices()[0])
    bound = LLM(params, llm.config, llm.tokenizer, dtype=llm.model.dtype)
    with steps.count_compilations() as compiled:
        bound.generate("abcabcabc", GREEDY, drafter=NGramDrafter(num_draft=2))
        bound.generate("a", GREEDY, drafter=NGramDrafter(num_draft=2), stop="?!")
    assert sum("rounds" in name for name in compiled) == 1


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
        for among, prompt, params in ((a[0], "abcab", warm), (a[1], "hello", cold)):
            alone = llm.generate(prompt, params, **how)
            assert alone.token_ids == among.token_ids
            assert alone.stats.accepted_by_position == among.stats.accepted_by_position


def test_a_seed_means_one_text_however_fast_the_machine_is(llm, monkeypatch):
    texts = []
    for dear in (1.0, 1.5, 100.0):
        costs = Costs((1.0, dear, dear, dear), (0.0, 0.1))
        monkeypatch.setattr("jaxinfer.generate.measure", lambda *_, costs=costs: costs)
        again = LLM(llm.params, llm.config, llm.tokenizer, dtype=llm.model.dtype)
        out = again.generate("abcabc", WARM, drafter=drafter("other", llm, "auto"))
        texts.append((out.token_ids, out.stats.drafted))
    assert texts[0][0] == texts[1][0] == texts[2][0]
    assert texts[0][1] > texts[2][1] == 0


def test_prices_are_those_of_the_capacity(llm, monkeypatch):
    """What a round costs grows with the cache: a short text's prices say nothing of a long one."""
    asked = []

    def measure(model, speculation, batch, capacity):
        asked.append((batch, capacity))
        widths = speculation.plan(1).widths
        return Costs(tuple(1 + w / 10 for w in widths), (0.0, 0.1))

    monkeypatch.setattr("jaxinfer.generate.measure", measure)
    again = LLM(llm.params, llm.config, llm.tokenizer, dtype=llm.model.dtype)
    for length in (8, 200, 9):
        again.generate("a" * length, max_tokens=4, drafter="ngram")
        again.generate(
            "a" * length, max_tokens=4, drafter="ngram", num_draft=3
        )  # nothing to choose
    assert asked == [(1, 128), (1, 128), (1, 256)]


@pytest.mark.parametrize("rounds", [(5, 0), (2, 3), (0, 2)])
def test_what_a_call_costs_is_no_part_of_a_round(rounds):
    """Or a dear call would make a wide round look cheap beside a narrow one."""
    real, call = (1.0, 3.0), 0.5
    many = call + sum(n * seconds for n, seconds in zip(rounds, real, strict=True))
    single = [seconds + call for seconds in real]
    assert calibrate.call_seconds(single, many, rounds) == pytest.approx(call)
    assert calibrate.call_seconds([1.5, 3.5], 3.5, (0, 1)) == 0  # of one call nothing can be told


@pytest.mark.parametrize("name", ["ngram", "same", "other"])
def test_what_is_measured_is_what_a_round_costs(llm, monkeypatch, name):
    """By a clock that charges each call, less where it runs no round, and each round by width."""
    prices, clock, rounds = (1.0, 1.5, 2.0, 4.0), [0.0], calibrate.speculative.rounds

    def charged(*args, **options):
        run = rounds(*args, **options)
        clock[0] += (3.0 if run.counts.widths.any() else 1.0) + np.dot(run.counts.widths, prices)
        return run

    monkeypatch.setattr(calibrate.speculative, "rounds", charged)
    monkeypatch.setattr(calibrate, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    speculation = llm.speculation(drafter(name, llm, "auto"))
    costs = calibrate.measure(llm.model, speculation, 1, 128)
    assert costs.verify_seconds == pytest.approx(prices)


def test_a_round_is_as_wide_as_its_longest_draft(llm):
    """Where a second token costs little and more cost much, it is rounds of two."""
    speculation = llm.speculation(drafter("same", llm, "auto"))
    counts = []
    for prices in ((1.0, 1.1, 50.0, 50.0), (1.0, 1.1, 1.2, 50.0), (1.0, 1.1, 1.2, 1.3)):
        rows = llm._requests([[41, 42, 43]], GREEDY, {})
        batch = Batch(llm.model, rows, speculation, Costs(prices))
        batch.prefill()
        assert len(batch.advance(40)[0].token_ids) == 40
        counts.append(batch.run.counts.widths.tolist())
    assert [int(np.argmax(each)) for each in counts] == [1, 2, 3]
    assert counts[0][2:] == [0, 0]


def test_a_ring_that_goes_round_under_speculation(monkeypatch):
    """Window layers of 6 + 12 slots, nine times over, against layers with room for all."""
    rope = Rope(theta=10000.0, dim=8)
    layers = (LayerConfig(window=6, rope=rope), LayerConfig(rope=rope))
    llm = tiny_llm(layers=layers)
    params = SamplingParams(max_tokens=160, ignore_eos=True, temperature=0.5, seed=2)
    want = llm.generate("abcabc", params)
    assert len(set(want.token_ids)) > 10
    often_wrong, right = NGramDrafter(min_ngram=1, num_draft=5), llm.speculation(llm, 4).drafter
    monkeypatch.setattr(cache, "MAX_BLOCK", 12)
    monkeypatch.setattr(cache, "TILE", 1)
    assert llm.model.empty_cache(1, 256).layers[0].k.shape[2] == 18
    stats = []
    for found in (often_wrong, right):
        got = llm.generate("abcabc", params, drafter=found, verifier="exact")
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
