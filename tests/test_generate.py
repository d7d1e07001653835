"""`LLM` on the tiny model: what a caller may rely on."""

from __future__ import annotations

import numpy as np
import pytest

from jaxinfer import SamplingParams
from jaxinfer.config import LayerConfig, Rope
from jaxinfer.errors import InvalidArgument, OutOfMemory, PromptTooLong
from jaxinfer.generate import LLM
from jaxinfer.outputs import GenerationOutput
from jaxinfer.steps import capacity_for, count_compilations
from jaxinfer.testing import tiny_llm, tiny_tokenizer

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
WARM = SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, seed=7)


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


def assert_greedy_without_cache(llm, prompt, token_ids):
    """Every token is the largest logit of a forward over the whole sequence before it."""
    ids = [*prompt, *token_ids]
    logits = np.asarray(llm.forward(ids).logits[0])
    assert np.argmax(logits, axis=-1)[len(prompt) - 1 : -1].tolist() == list(token_ids)


def test_one_prompt_gives_one_output_and_a_list_a_list(llm):
    out = llm.generate("abc", GREEDY)
    assert isinstance(out, GenerationOutput)
    assert out.stats.prompt_tokens == 3
    assert out.stats.new_tokens == len(out.token_ids) == 24
    assert out.finish_reason == "length"
    assert out.stats.tokens_per_second > 0
    assert out.stats.first_token_seconds >= out.stats.prefill_seconds
    outs = llm.generate(["abc", "de"], GREEDY)
    assert outs[0].text == out.text
    assert [o.text for o in llm.generate(["abc"], GREEDY)] == [out.text]


def test_token_ids_stand_wherever_text_does(llm):
    ids = llm.tokenizer.encode("abc")
    want = llm.generate("abc", GREEDY).token_ids
    assert llm.generate(ids, GREEDY).token_ids == want
    assert llm.generate(np.array(ids), GREEDY).token_ids == want
    assert [o.token_ids for o in llm.generate([ids, "abc"], GREEDY)] == [want, want]
    assert "".join(llm.stream(ids, GREEDY)) == llm.generate("abc", GREEDY).text
    np.testing.assert_array_equal(llm.score(ids), llm.score("abc"))


@pytest.mark.parametrize("length", [1, 2, 16, 17, 18, 64, 65, 66, 127, 128, 129, 257])
def test_cache_equals_no_cache_at_the_edges_of_the_buckets(llm, length):
    prompt = [int(i) for i in np.random.default_rng(length).integers(1, 64, length)]
    out = llm.generate(prompt, GREEDY, max_tokens=8)
    assert_greedy_without_cache(llm, prompt, out.token_ids)


def test_cache_equals_no_cache_while_it_grows(llm):
    out = llm.generate("abc", GREEDY, max_tokens=300)
    assert len(out.token_ids) == 300
    assert_greedy_without_cache(llm, llm.tokenizer.encode("abc"), out.token_ids)


def test_a_long_cache_grows_by_a_half_or_a_third():
    sizes = {1: 128, 129: 256, 257: 512, 513: 768, 769: 1024, 1025: 1536, 1537: 2048, 2049: 3072}
    assert {n: capacity_for(n) for n in sizes} == sizes
    assert [capacity_for(n) for n in sizes.values()] == list(sizes.values())
    llm = tiny_llm(max_len=2048)
    prompt = [int(i) for i in np.random.default_rng(0).integers(1, 64, 440)]
    out = llm.generate(prompt, GREEDY, max_tokens=600)  # 512, 768, 1024, 1536
    assert_greedy_without_cache(llm, prompt, out.token_ids)


def test_a_prompt_of_several_chunks():
    llm = tiny_llm(max_len=2048)
    prompt = [int(i) for i in np.random.default_rng(0).integers(1, 64, 1300)]
    out = llm.generate(prompt, GREEDY, max_tokens=4)
    assert_greedy_without_cache(llm, prompt, out.token_ids)


def test_a_ragged_batch_equals_its_rows_alone(llm):
    prompts = ["a", "hello there", "x" * 40, "what?", "zz", "y" * 90, "k"]
    for params in (GREEDY, WARM):
        each = [SamplingParams(**{**vars_of(params), "seed": i}) for i in range(len(prompts))]
        together = llm.generate(prompts, each)
        for prompt, p, out in zip(prompts, each, together, strict=True):
            assert llm.generate(prompt, p).token_ids == out.token_ids


def vars_of(params):
    return {name: getattr(params, name) for name in params.__dataclass_fields__}


def test_more_prompts_than_fit_at_once_come_back_in_order():
    small = tiny_llm(max_batch=2)
    prompts = ["a" * n for n in (9, 1, 5, 3, 7)]
    outs = small.generate(prompts, GREEDY)
    assert [o.stats.prompt_tokens for o in outs] == [9, 1, 5, 3, 7]
    assert [o.token_ids for o in outs] == [
        o.token_ids for o in tiny_llm().generate(prompts, GREEDY)
    ]


def test_a_row_depends_on_its_own_parameters_alone(llm):
    mine = SamplingParams(max_tokens=20, temperature=1.0, seed=3, ignore_eos=True)
    others = [
        SamplingParams(max_tokens=20, temperature=0.5, seed=4, top_k=3),
        SamplingParams(max_tokens=3),
        SamplingParams(max_tokens=20, temperature=2.0, seed=3, frequency_penalty=2.0, min_p=0.1),
        SamplingParams(max_tokens=20, logit_bias={5: 50.0}, logprobs=3, stop="9"),
    ]
    want = llm.generate(["abc", "abc"], [mine, mine])[0].token_ids
    for other in others:
        assert llm.generate(["abc", "abc"], [mine, other])[0].token_ids == want
        assert llm.generate(["abc", "abc"], [other, mine])[1].token_ids == want


def test_seeds(llm):
    assert llm.generate("abc", WARM).token_ids == llm.generate("abc", WARM).token_ids
    assert llm.generate("abc", WARM, seed=8).token_ids != llm.generate("abc", WARM).token_ids
    # One seed for a list: every row has noise of its own.
    rows = llm.generate(["abc"] * 4, WARM)
    assert len({tuple(r.token_ids) for r in rows}) == 4
    assert rows[0].token_ids == llm.generate("abc", WARM).token_ids
    unseeded = [llm.generate("abc", WARM, seed=None).token_ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_n_samples(llm):
    three = llm.generate("abc", WARM, n=3)
    assert len({tuple(o.token_ids) for o in three}) == 3
    assert three[0].token_ids == llm.generate("abc", WARM).token_ids
    two = SamplingParams(max_tokens=2, n=2, temperature=1.0, ignore_eos=True)
    both = llm.generate(["abc", "de"], [WARM, two])
    assert isinstance(both[0], GenerationOutput)
    assert [len(o.token_ids) for o in both[1]] == [2, 2]


def test_end_tokens(llm):
    free = llm.generate("abc", GREEDY).token_ids
    end = free[10]
    first = free.index(end)
    out = llm.generate("abc", GREEDY, stop_token_ids=[end])
    assert out.token_ids == free[: first + 1]
    assert out.finish_reason == "stop"
    assert out.text == llm.tokenizer.decode(free[:first])
    held = llm.generate("abc", GREEDY, stop_token_ids=[end], min_tokens=first + 3)
    assert len(held.token_ids) >= first + 3
    assert end not in held.token_ids[: first + 3]
    assert (
        llm.generate("abc", GREEDY, stop_token_ids=[end], min_tokens=24).finish_reason == "length"
    )


def test_the_models_own_end_token_ends_unless_ignored():
    llm = tiny_llm(seed=3)
    biased = SamplingParams(max_tokens=10, logit_bias={0: 1000.0})
    out = llm.generate("abc", biased)
    assert (out.token_ids, out.text, out.finish_reason) == ([0], "", "stop")
    assert len(llm.generate("abc", biased, ignore_eos=True).token_ids) == 10


def test_max_tokens_is_exact_whatever_the_chunk(llm):
    for count in (1, 2, 7, 63, 64, 65, 66):
        assert len(llm.generate("abc", GREEDY, max_tokens=count).token_ids) == count


def test_stop_strings(llm):
    text = llm.generate("abc", GREEDY).text
    for width in (1, 2, 3):
        stop = text[9 : 9 + width]
        out = llm.generate("abc", GREEDY, stop=["never!", stop])
        assert out.text == text[: text.find(stop)]
        assert out.finish_reason == "stop"
        pieces = list(llm.stream("abc", GREEDY, stop=["never!", stop]))
        assert "".join(pieces) == out.text
        assert [t for p in pieces for t in p.token_ids] == out.token_ids


def test_stream_joins_to_the_whole(llm):
    for params in (GREEDY, WARM):
        pieces = list(llm.stream("abc", params))
        assert "".join(pieces) == llm.generate("abc", params).text
        assert [i for p in pieces for i in p.token_ids] == llm.generate("abc", params).token_ids
        assert len(pieces) > 20  # token by token, but for those without text
        assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    pieces = list(llm.stream(["abc", "de"], GREEDY))
    outs = llm.generate(["abc", "de"], GREEDY)
    for row in (0, 1):
        assert "".join(p for p in pieces if p.row == row) == outs[row].text


def test_logprobs_are_the_models_own(llm):
    out = llm.generate("abc", WARM, logprobs=4, top_k=2, repetition_penalty=1.5)
    assert len(out.logprobs) == len(out.token_ids)
    ids = llm.tokenizer.encode("abc") + out.token_ids
    scores = llm.score(ids)[2:]
    np.testing.assert_allclose([t.logprob for t in out.logprobs], scores, atol=1e-4)
    assert [t.token_id for t in out.logprobs] == out.token_ids
    logits = np.asarray(llm.forward(ids).logits[0, 2:-1])
    for entry, row in zip(out.logprobs, logits, strict=True):
        assert list(entry.top) == np.argsort(-row)[:4].tolist()
    assert llm.generate("abc", GREEDY).logprobs is None
    assert llm.generate("abc", GREEDY, logprobs=0).logprobs[0].top == {}


def test_logprobs_of_one_row_beside_a_row_without(llm):
    outs = llm.generate(["abc", "de"], [SamplingParams(max_tokens=3, logprobs=1), GREEDY])
    assert outs[0].logprobs is not None
    assert outs[1].logprobs is None


def test_score_is_log_softmax(llm):
    ids = llm.tokenizer.encode("hello world, " * 50)[:400]
    logits = np.asarray(llm.forward(ids).logits[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = [logp[i, ids[i + 1]] for i in range(len(ids) - 1)]
    np.testing.assert_allclose(llm.score(ids), want, atol=1e-4)
    assert llm.score([5]).shape == (0,)
    assert [s.shape for s in llm.score(["ab", "abc"])] == [(1,), (2,)]


def test_forward_in_chunks_is_forward_whole(llm):
    long = tiny_llm(max_len=2048)
    ids = [int(i) for i in np.random.default_rng(1).integers(1, 64, 700)]
    whole = long.forward([ids, ids[:600]], layers=[0])
    assert whole.logits.shape == (2, 700, 64)
    np.testing.assert_allclose(whole.logits[0, :600], whole.logits[1, :600], atol=1e-4)
    early = long.forward(ids[:300], layers=[0])
    np.testing.assert_allclose(whole.logits[0, :300], early.logits[0], atol=1e-4)
    np.testing.assert_allclose(whole.hidden[0][0, :300], early.hidden[0][0], atol=1e-4)


def test_chat_is_its_template_and_generate(llm):
    message = {"role": "user", "content": "abc"}
    want = llm.generate("abc", GREEDY).text
    assert llm.chat([message], GREEDY).text == want
    assert [o.text for o in llm.chat([[message], [message]], GREEDY)] == [want, want]
    assert llm.chat([message], GREEDY, template={"enable_thinking": False}).text == want
    for bad in ({"role": "user"}, [], "abc", [{"role": "user"}]):
        with pytest.raises(InvalidArgument):
            llm.chat(bad, GREEDY)


def test_forward_gives_logits_and_states(llm):
    out = llm.forward([[1, 2, 3], [4]], layers=[0, -1])
    assert out.logits.shape == (2, 3, llm.config.vocab_size)
    assert out.lengths.tolist() == [3, 1]
    assert set(out.hidden) == {0, -1}
    assert out.hidden[0].shape == (2, 3, llm.config.width)
    assert not np.allclose(out.hidden[0], out.hidden[-1])
    np.testing.assert_allclose(out.logits[1, :1], llm.forward([4]).logits[0], atol=1e-5)


def test_padded_vocabulary_is_never_chosen():
    llm = tiny_llm(vocab_size=64)
    narrow = LLM(llm.params, llm.config, tiny_tokenizer(40), dtype=llm.model.dtype)
    tokens = [
        i
        for seed in range(8)
        for i in narrow.generate("abc", WARM, temperature=50.0, seed=seed).token_ids
    ]
    assert max(tokens) < 40
    assert max(llm.generate("abc", WARM, temperature=50.0, max_tokens=100).token_ids) >= 40
    # A bias may name any id the logits have, whatever the tokenizer knows.
    narrow.generate("abc", GREEDY, logit_bias={63: 1.0})


def test_nothing_compiles_after_warm_up(llm):
    """Other lengths in the same buckets, and other values of every parameter."""
    llm.generate("warm up please", max_tokens=40)
    llm.generate(["warm", "up"], max_tokens=40)
    llm.generate("warm up please", max_tokens=40, logprobs=1)
    with count_compilations() as compiled:
        for prompt in ("another prompt", "short one", "hi there you all"):
            llm.generate(prompt, max_tokens=35)
            llm.generate(prompt, WARM, top_k=3, top_p=0.5, min_p=0.1, seed=9)
            llm.generate(prompt, GREEDY, logprobs=3)
            llm.generate(prompt, GREEDY, frequency_penalty=1.0, logit_bias={1: 2.0}, min_tokens=4)
            list(llm.stream(prompt, WARM, stop=["Q", "##"], stop_token_ids=[3, 4]))
        llm.generate(["one", "the other"], WARM, presence_penalty=1.0)
    assert compiled == []


def test_window_and_growth_together():
    rope = Rope(theta=10000.0, dim=8)
    llm = tiny_llm(layers=(LayerConfig(window=7, rope=rope), LayerConfig(rope=rope)))
    out = llm.generate("abc", GREEDY, max_tokens=150)
    assert_greedy_without_cache(llm, llm.tokenizer.encode("abc"), out.token_ids)


def test_bfloat16_in_batches_with_several_kv_heads():
    llm = tiny_llm(dtype="bfloat16", num_heads=6, num_kv_heads=3, head_dim=16)
    many = llm.generate(["abcabcabc" * 3, "x", "hello", "zz"] * 2, max_tokens=8, ignore_eos=True)
    assert [len(o.token_ids) for o in many] == [8] * 8


def test_bfloat16_generates():
    llm = tiny_llm(dtype="bfloat16")
    one = llm.generate("abc", GREEDY).token_ids
    assert len(one) == 24
    assert llm.generate(["abc", "de"], GREEDY)[0].stats.new_tokens == 24


BAD_CALLS = {
    "empty": lambda llm: llm.generate(""),
    "no prompts": lambda llm: llm.generate([]),
    "one empty of two": lambda llm: llm.generate(["a", ""]),
    "empty ids": lambda llm: llm.generate([[]]),
    "id too large": lambda llm: llm.generate([64]),
    "id negative": lambda llm: llm.generate([-1, 2]),
    "id no number": lambda llm: llm.generate([[1.5]]),
    "unknown parameter": lambda llm: llm.generate("a", warmth=1),
    "params of other length": lambda llm: llm.generate(["a", "b"], [GREEDY]),
    "bias outside": lambda llm: llm.generate("a", logit_bias={64: 1.0}),
    "stop id outside": lambda llm: llm.generate("a", stop_token_ids=[64]),
    "layer outside": lambda llm: llm.forward([1, 2], layers=[2]),
    "empty chat": lambda llm: llm.chat([]),
    "nothing to score": lambda llm: llm.score(""),
    "stream of nothing": lambda llm: llm.stream(""),
    "a number": lambda llm: llm.generate(5),
    "nothing": lambda llm: llm.generate(None),
    "a number in the list": lambda llm: llm.generate(["a", 5]),
    "params as a dict": lambda llm: llm.generate("a", {"temperature": 1}),
    "params as dicts": lambda llm: llm.generate(["a"], [{"temperature": 1}]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused_in_one_line(llm, case):
    with pytest.raises(InvalidArgument) as error:
        BAD_CALLS[case](llm)
    assert "\n" not in str(error.value)


def test_prompts_beyond_the_context(llm):
    with pytest.raises(PromptTooLong, match="512"):
        llm.generate([1] * 512)
    with pytest.raises(PromptTooLong):
        llm.score([1] * 513)
    out = llm.generate([1] * 511, GREEDY)  # room for one
    assert (len(out.token_ids), out.finish_reason) == (1, "length")


def test_a_container_has_less_memory_than_the_host(tmp_path):
    from jaxinfer import memory

    assert memory.container_bytes(tmp_path, 77) == 77
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    assert memory.container_bytes(tmp_path, 77) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.container_bytes(tmp_path, 77) == 77


def test_no_memory_is_said_in_bytes(llm, monkeypatch):
    from jaxinfer import memory

    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(OutOfMemory, match=r"needs [\d,]+ bytes and 1,000 are available"):
        llm.generate("abc")


def test_exact_mode_says_the_same_up_to_the_last_slot_of_the_cache():
    """Its forwards of eight tokens reach beyond the end of a cache that a text fills."""
    llm = tiny_llm()
    prompt, options = [1 + i % 60 for i in range(100)], {"temperature": 0, "ignore_eos": True}
    plain = llm.generate(prompt, max_tokens=28, **options)
    assert llm.generate(prompt, max_tokens=28, exact=True, **options).token_ids == plain.token_ids


def test_a_model_shows_itself_without_its_weights():
    assert "values=" not in repr(tiny_llm().model)
    assert "array" not in repr(tiny_llm().model).lower()
