"""`bench` and `audit`: their arithmetic on made-up answers, and both commands on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxinfer import steps
from jaxinfer.bench import audit, peers, plot, speed
from jaxinfer.bench.prompts import PROMPTS, read_prompts
from jaxinfer.bench.speed import Answer
from jaxinfer.cli.main import main
from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM
from jaxinfer.speculative import verify
from jaxinfer.testing import tiny_llm


def run(capsys, *arguments):
    code = main(["jaxinfer", *arguments])
    return code, *capsys.readouterr()


# ---- bench


def test_rates_ratios_and_counts():
    plain = {"a": [[Answer(10, 1.0)], [Answer(10, 2.0)]], "b": [[Answer(30, 1.0)]] * 2}
    fast = {
        "a": [[Answer(10, 0.5, 5, 8, 5, 0.1)], [Answer(10, 0.5, 5, 8, 5, 0.2)]],
        "b": [[Answer(30, 1.0, 30, 2, 0)]] * 2,
    }
    found = speed.summarise({"plain": plain, "fast": fast})
    assert found["plain"]["tokens_per_second"]["a"] == {"median": 7.5, "least": 5, "most": 10}
    assert found["plain"]["tokens_per_second"]["all"]["most"] == 20  # 40 tokens in 2 s
    assert found["plain"]["speedup"] == {"a": 1, "b": 1, "all": 1}
    assert found["fast"]["speedup"]["a"] == 3  # the median of 2 and 4: run by run
    assert found["fast"]["tokens_per_round"] == {"a": 2, "b": 1, "all": 40 / 35}
    assert found["fast"]["acceptance"] == 5 / 10
    assert found["fast"]["drafting"] == pytest.approx(0.3 / 3)
    assert found["plain"]["tokens_per_round"] is None
    assert found["plain"]["acceptance"] is None


def test_systems_alternate_and_the_warm_up_is_thrown_away():
    asked = []

    def system(name):
        def answer(ids):
            asked.append((name, ids))
            return Answer(len(asked), 1.0)

        return answer

    got = speed.run_all({"x": system("x"), "y": system("y")}, {"k": [[1], [2]]}, 2)
    assert asked == [("x", [1]), ("y", [1]), ("x", [2]), ("y", [2])] * 3
    assert [a.tokens for each in got["x"]["k"] for a in each] == [5, 7, 9, 11]


def a_peer(tokens):
    def answer(ids):
        if not ids:
            os._exit(3)
        return Answer(tokens * len(ids), float(os.getpid()))

    if tokens is None:
        raise InvalidArgument("not installed here")
    return {"it": answer}


def test_a_peer_has_a_process_of_its_own_and_its_end_is_told():
    ask = peers.apart(a_peer, 7)["it"]
    first, second = ask([1, 2]), ask([1])
    assert (first.tokens, second.tokens) == (14, 7)
    assert first.seconds == second.seconds != os.getpid()
    with pytest.raises(InvalidArgument, match="the process of a_peer died, exit code 3"):
        ask([])
    with pytest.raises(InvalidArgument, match="not installed here"):
        peers.apart(a_peer, None)


@pytest.fixture
def tiny(monkeypatch):
    """The commands load a tiny model, whatever the flags name."""

    def load(values, **options):
        options.pop("max_batch", None)
        return tiny_llm(**{k: v for k, v in options.items() if v is not None})

    for command in ("bench", "audit"):
        monkeypatch.setattr(f"jaxinfer.cli.{command}.load_model", load)


def test_bench_prints_a_table_and_a_picture(capsys, tiny, tmp_path, monkeypatch):
    assert speed.VERIFIED == (1, 2, 4, 8, 16)
    monkeypatch.setattr(speed, "VERIFIED", (1, 4))
    named = []
    monkeypatch.setattr("jaxinfer.load", lambda name, **_: named.append(name) or tiny_llm(seed=4))
    picture, prompts = tmp_path / "speed.png", tmp_path / "mine.jsonl"
    prompts.write_text(
        '{"kind": "copy", "prompt": "abababab"}\n\n{"kind": "odd", "prompt": "q"}\n', "utf-8"
    )
    flags = ["--runs=2", "--max_tokens=12", f"--prompts={prompts}"]
    drafters = ["--drafters=ngram,a/model", "--num_draft=3"]
    code, out, _ = run(capsys, "bench", *flags, f"--plot={picture}", "--json", *drafters)
    assert code == 0
    result = json.loads(out)
    assert named == ["a/model"]
    assert list(result["systems"]) == ["plain", "ngram", "a/model"]
    assert result["verifier"] == "auto"
    assert 0 < result["systems"]["a/model"]["drafting"] < 1
    assert set(result["systems"]["ngram"]["speedup"]) == {"copy", "odd", "all"}
    assert list(result["verify_seconds"]) == ["1", "4"]
    assert all(s > 0 for s in result["verify_seconds"].values())
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidArgument, match="--plot="):
        plot.draw(result, tmp_path / "nowhere" / "x.png")
    at = ["--contexts=8,40", f"--plot={tmp_path / 'context.svg'}", "--drafters=none"]
    code, out, _ = run(capsys, "bench", *flags[:2], *at, "--json")
    assert code == 0
    result = json.loads(out)
    assert list(result["systems"]["plain"]["tokens_per_second"]) == ["8", "40", "all"]
    assert "tokens of the prompt" in (tmp_path / "context.svg").read_text("utf-8")
    code, out, _ = run(capsys, "bench", *flags, "--drafters=none")
    assert code == 0
    assert "plain" in out
    assert "times one" in out


def test_the_model_alone_makes_as_many_tokens_as_plain_decoding():
    """Past the size its cache begins with; an answer that ends early has no more."""
    tiny = tiny_llm()
    early = LLM(tiny.params, tiny.config, tiny.tokenizer, dtype=tiny.model.dtype, eos_ids=[46])
    for llm, ids, most in ((tiny, [41] * 60, 100), (early, [7, 8, 9], 30)):
        want = llm.generate(ids, max_tokens=most)
        got = speed.alone(llm, most, exact=False)(ids)
        assert got.tokens == len(want.token_ids)
        assert got.seconds > 0
    assert len(want.token_ids) < 30


def test_the_verifier_named_is_the_one_that_judges(monkeypatch):
    llm, asked = tiny_llm(), []
    monkeypatch.setattr(llm, "generate", lambda *_, **how: asked.append(how) or out)
    out = tiny_llm().generate("abc", max_tokens=2)
    drafters, prompts = {"ngram": "ngram"}, {"a": [[41, 42]]}
    monkeypatch.setattr(speed, "alone", lambda *_: lambda ids: Answer(2, 1.0))
    speed.compare(llm, drafters, prompts, runs=1, verifier="block", costs=False)
    assert {how.get("verifier") for how in asked if how["drafter"]} == {"block"}


def test_prompt_files(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("one\n\n two \n", "utf-8")
    assert read_prompts(str(file)) == {"file": ("one", " two ")}
    for text in ("", "\n", "[]", '{"kind": 1, "prompt": "x"}', '{"kind": "a"}', "{"):
        (tmp_path / "p.jsonl").write_text(text, "utf-8")
        with pytest.raises(InvalidArgument, match="--prompts="):
            read_prompts(str(tmp_path / "p.jsonl"))
    with pytest.raises(InvalidArgument, match="--prompts="):
        read_prompts(str(tmp_path / "none.txt"))
    assert set(PROMPTS) == {"chat", "code", "extract", "maths"}


# ---- audit


def test_the_chi_square_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 500), rng.integers(0, 6, 700)
    statistic, freedom, pvalue = audit.homogeneity(a, b)
    table = [np.bincount(a, minlength=6), np.bincount(b, minlength=6)]
    want = stats.chi2_contingency(table, correction=False)
    assert (statistic, freedom) == (pytest.approx(want.statistic), want.dof)
    assert pvalue == pytest.approx(want.pvalue, rel=1e-3)
    assert audit.homogeneity(a * 0, b * 0) == (0.0, 0, 1.0)
    assert audit.homogeneity(a, b + 1)[2] < 1e-6


@pytest.fixture
def audited(capsys, tiny, tmp_path):
    """Run `audit`; greedy and sampled rows share one batch size, and so their programs."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{chr(40 + i) * 2 + 'ab' * (i % 5)}\n" for i in range(32)), "utf-8")
    flags = ["--num_draft=3", "--max_tokens=24", "--batch=32", "--sampled_tokens=2"]
    return lambda *more: run(capsys, "audit", f"--prompts={prompts}", *flags, *more)


def test_audit_finds_speculation_lossless(audited):
    code, out, _ = audited("--draws=128")
    assert code == 0, out
    assert "greedy, exact mode: 32 of 32 answers identical" in out
    assert out.endswith("verdict: lossless\n")
    assert "chi-square 0.0 with" not in out  # not the same draws twice
    code, out, _ = audited("--exact", "--draws=0", "--num_draft=0", "--json")
    assert code == 1  # nothing was drafted
    assert json.loads(out)["lossless"] is False


def test_audit_finds_a_wrong_verifier(audited, monkeypatch):
    """One that keeps whatever was drafted."""

    def gullible(scores, draft, rows, position):
        kept = verify.exact(scores, draft, rows, position)
        size = draft.tokens.shape[1]
        here = jnp.arange(size + 1) < draft.num[:, None]
        padded = jnp.pad(draft.tokens, [(0, 0), (0, 1)])
        return verify.Accepted(jnp.where(here, padded, kept.tokens), draft.num)

    monkeypatch.setitem(verify.VERIFIERS, "exact", gullible)
    jax.clear_caches()
    code, out, _ = audited("--draws=256")
    jax.clear_caches()
    assert code == 1
    assert "differs from token" in out
    for fault in ("in exact mode", "more than rounding", "other frequencies"):
        assert fault in out.splitlines()[-1]


def test_margins_and_noise_are_those_of_the_logits(monkeypatch):
    llm = tiny_llm()
    text = llm.tokenizer.encode("abcabcabcabd")
    logits = np.sort(np.asarray(llm.forward(text[:-1]).logits[0, len(text) - 2]))
    sizes, step = set(), steps.logits_and_states
    monkeypatch.setattr(
        steps,
        "logits_and_states",
        lambda params, tokens, *rest, **how: (
            sizes.add(len(tokens)) or step(params, tokens, *rest, **how)
        ),
    )
    for rows in (1, 8):
        sizes.clear()
        margin, noise = audit._margin_and_noise(llm, text, 5, (1, 2, 8), rows)
        assert margin == pytest.approx(float(logits[-1] - logits[-2]), abs=1e-4)
        assert 0 < noise < 1e-4  # float32 rounds differently at another width
        assert sizes == {rows}


def test_noise_is_that_of_the_batch_that_answered(monkeypatch):
    """Five prompts by fours: the last has a batch of its own, of one row and other widths."""
    llm, asked = tiny_llm(dtype="bfloat16"), []
    plain = llm.generate([[41]] * 5, max_tokens=1)
    other = [dataclasses.replace(o, token_ids=[1 + o.token_ids[0]]) for o in plain]
    answers = iter((plain, other))
    monkeypatch.setattr(audit, "_answers", lambda *_, **__: next(answers))
    monkeypatch.setattr(
        audit, "_margin_and_noise", lambda llm, text, at, *which: asked.append(which) or (0.0, 1.0)
    )
    drafter = llm.speculation("ngram", 3).drafter
    audit.greedy(llm, drafter, [[41]] * 5, batch=4, max_tokens=1, exact=False)
    assert asked == [((1, 4), 4)] * 4 + [((2, 4), 1)]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("audit", "--drafter=none"), "--drafter=none"),
        (("audit", "--temperature=0"), "--temperature=0"),
        (("audit", "--draws=-1"), "--draws=-1"),
        (("audit", "--batch=0"), "--batch=0"),
        (("bench", "--num_draft=x"), "--num_draft=x"),
        (("bench", "--max_tokens=0"), "--max_tokens=0"),
        (("bench", "--contexts=5,99999"), "--contexts=99999: 1 to "),
        (("bench", "--contexts=x"), "--contexts=x: a number"),
        (("bench", "--compare=transformers:int3"), "transformers:int3"),
        (("bench", "--compare=llama.cpp:nowhere.gguf"), "nowhere.gguf"),
        (("bench", "--prompts=/nowhere"), "--prompts=/nowhere"),
        (("bench", "--verifier=lenient"), "verifier='lenient'"),
        (("bench", "--drafters=ngram", "--num_draft=99"), "num_draft=99"),
    ],
)
def test_bad_flags_are_one_line(capsys, tiny, flags, word):
    code, out, err = run(capsys, *flags)
    assert (code, out) == (2, "")
    assert word in err
    assert len(err.splitlines()) == 1
