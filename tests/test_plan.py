"""The planner's figures against what a real load reports; what it refuses; the TPU compiler."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import pytest

import jaxinfer
from jaxinfer.checkpoint.config_json import from_fields
from jaxinfer.checkpoint.describe import describe
from jaxinfer.checkpoint.fields import Fields
from jaxinfer.cli.main import main
from jaxinfer.errors import InvalidArgument, ModelNotFound
from jaxinfer.planner import report
from jaxinfer.planner.plan import plan, sweep
from jaxinfer.planner.programs import _collectives

SHAPES = {"compile": False}
GB = 10**9


@pytest.mark.parametrize(
    ("name", "preset"),
    [("smollm2-135m-instruct", "smollm2-135m"), ("gemma-3-270m", "gemma-3-270m")],
)
@pytest.mark.parametrize("kept", [{}, {"quantize": "int8", "cache_dtype": "int8"}])
def test_bytes_are_those_of_a_real_load(name, preset, kept):
    llm = jaxinfer.load(name, dtype="bfloat16", **kept)
    held = llm.model.new_cache(4, 1024)
    made = plan(preset, "cpu", batch=4, context=1000, drafter="none", **kept)
    assert made.bytes_per_chip.weights == pytest.approx(llm.nbytes, rel=0.02)
    assert made.bytes_per_chip.cache == pytest.approx(held.nbytes, rel=0.02)
    assert made.fits
    assert made.decode_bytes > made.bytes_per_chip.weights


def test_arithmetic_that_can_be_done_by_hand():
    """Llama-3-8B: 8,030,261,248 parameters, of which 525,336,576 are looked up."""
    made = plan("llama-3-8b", "h100:1", batch=2, context=1024, num_draft=3, acceptance=0.5)
    cache = 2 * 2 * 1024 * 32 * 8 * 128 * 2
    norms = (2 * 32 + 1) * 4096  # these stay float32
    assert made.bytes_per_chip.weights == 2 * (8_030_261_248 + norms)
    assert made.bytes_per_chip.cache == cache
    read = 2 * (8_030_261_248 - 525_336_576 + norms) + cache
    assert made.decode_bytes == read + 4 * 2 * 128256
    assert made.verify_bytes == read + 4 * 4 * 2 * 128256
    assert made.tokens_per_round == 1 + 0.5 + 0.25 + 0.125
    assert made.tokens_per_s["plain"] == pytest.approx(2 * 3350e9 / made.decode_bytes)
    drafts = 2 * made.tokens_per_round * 3350e9 / made.verify_bytes
    assert made.tokens_per_s["speculative"] == pytest.approx(drafts)


def test_rows_come_in_powers_of_two():
    five, eight = (plan("llama-3-8b", "h100:1", batch=n).bytes_per_chip for n in (5, 8))
    assert five.cache == eight.cache


def test_a_second_model_takes_its_share():
    alone = plan("qwen3-8b", "h100:1")
    both = plan("qwen3-8b", "h100:1", drafter="qwen3-0.6b")
    assert both.bytes_per_chip.weights - alone.bytes_per_chip.weights == pytest.approx(
        1.19 * GB, rel=0.02
    )
    assert both.draft_bytes > 0
    assert both.tokens_per_s["speculative"] < alone.tokens_per_s["speculative"]
    assert both.tokens_per_s["plain"] == alone.tokens_per_s["plain"]


def test_int8_halves_and_chips_divide():
    one = plan("llama-3-70b", "v5e:4x4", **SHAPES).bytes_per_chip.weights
    eight = plan("llama-3-70b", "v5e:4x4", quantize="int8", **SHAPES).bytes_per_chip.weights
    assert one / eight == pytest.approx(2, rel=0.01)
    more = plan("llama-3-70b", "v5e:2x4", **SHAPES).bytes_per_chip.weights
    assert more / one == pytest.approx(2, rel=0.05)  # keys and values are there twice on 16 chips
    cut = plan("llama-3-70b", "v5e:4x4", data=4, **SHAPES).bytes_per_chip
    assert cut.weights == pytest.approx(4 * one, rel=0.05)


def test_a_cache_in_eight_bits_is_read_in_eight_bits():
    """Each head of 128 numbers has a scale of four bytes."""
    wide, small = (plan("llama-3-8b", "h100:1", cache_dtype=kind) for kind in (None, "int8"))
    assert small.bytes_per_chip.cache * 2 * 128 == wide.bytes_per_chip.cache * (128 + 4)
    saved = wide.bytes_per_chip.cache - small.bytes_per_chip.cache
    assert wide.decode_bytes - small.decode_bytes == saved  # 8,192 tokens fill all of it
    assert "the cache in int8" in report.text(small)
    assert "the cache in" not in report.text(wide)
    long = plan("llama-3-8b", "a100-40gb", batch=1, context=131072)
    assert "a cache in int8" in long.verdict
    assert plan("llama-3-8b", "a100-40gb", batch=1, context=131072, cache_dtype="int8").fits


def test_what_does_not_fit_is_told_what_would():
    made = plan("llama-3-70b", "v5e:2x2", **SHAPES)
    assert not made.fits
    assert "v5e:4x4" in made.verdict
    small = plan("llama-3-8b", "a100-40gb", batch=16)
    assert not small.fits
    assert "int8" in small.verdict
    assert "context 4096" in small.verdict
    for change in ({"quantize": "int8"}, {"context": 4096}):
        assert plan("llama-3-8b", "a100-40gb", **{"batch": 16} | change).fits


def test_a_sweep_compares_and_says_which_is_the_smallest():
    plans = sweep("llama-3.1-405b", ["v5p"], **SHAPES)
    fits = [p.topology for p in plans if p.fits]
    assert fits[0] == "v5p:2x2x4"
    assert "fewest chips: v5p:2x2x4" in report.table(plans)
    # 262,208 does not divide over 128 chips: the batch is cut instead
    wide = [p for p in sweep("gemma-3-27b", ["v5e"], **SHAPES) if p.chips == 128]
    assert wide[0].data == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"topology": "v5e:3x3"}, "no such slice; there are v5e:1x1"),
        ({"cache_dtype": "int4"}, "cache_dtype='int4': None, int8 or fp8"),
        ({"topology": "v5e:0x2"}, "no such slice"),
        ({"topology": "v9:2x2"}, "no such chip"),
        ({"topology": "h100:0"}, "h100:1 to h100:1024"),
        ({"topology": "cpu:2"}, "no such chip"),
        ({"batch": 0}, "batch=0: must be 1"),
        ({"context": -1}, "context=-1"),
        ({"quantize": "int3"}, "quantize='int3'"),
        ({"dtype": "f8"}, "one of float32"),
        ({"num_draft": 99}, "must be 0 to 64"),
        ({"drafter": "self:int8"}, "planned are none, ngram"),
        ({"data": 0}, "data=0: v5e:4x4 has 16 devices"),
        ({"acceptance": 1.5}, "must be 0 to 1"),
        ({"data": 3}, "data=3: v5e:4x4 has 16 devices"),
    ],
)
def test_refusals(change, why):
    with pytest.raises(InvalidArgument, match=why):
        plan("llama-3-8b", **{"topology": "v5e:4x4", **SHAPES, **change})


def test_an_unknown_model_is_told_the_presets():
    with pytest.raises(ModelNotFound, match="llama-3-70b"):
        describe("llama-3-7b")


def test_a_model_is_known_by_its_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
            | {"intermediate_size": 64, "num_attention_heads": 2}
        )
    )
    assert describe(tmp_path).width == 32
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(jaxinfer.JaxinferError, match=r"no config\.json"):
        describe(empty)


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    command = ["jaxinfer", "plan", "--model=llama-3-8b", "--topology=h100:1"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"fits", "bytes_per_chip", "decode_bytes", "verify_bytes", "tokens_per_s"} <= set(found)
    assert "compile_seconds" in found
    assert set(found["bytes_per_chip"]) == {"weights", "cache", "temporaries", "total", "limit"}
    assert main([*command, f"--plot={tmp_path / 'one.png'}"]) == 0
    assert "fits, by shapes: 24.65 of 64.14 GB a chip" in capsys.readouterr().out
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert main(["jaxinfer", "plan", "--model=llama-3-8b", "--topology=t4:1"]) == 1
    assert main([*command, "--topology=h100:1,h100:2"]) == 2
    assert "add --sweep" in capsys.readouterr().err


def test_collectives_are_counted_in_the_compilers_text():
    text = """
  %a = f32[8,8,8192]{2,1,0:T(8,128)} all-reduce(%x), replica_groups={}
  %b = (bf16[8,128]{1,0}, bf16[16,128]{1,0}) all-gather-start(%y), dimensions={0}
  %c = bf16[16,128]{1,0} all-gather-done(%b)
  %d = (f32[4]{0}, f32[4]{0}) all-reduce(%p, %q)
"""
    assert _collectives(text) == ({"all-reduce": 2, "all-gather": 1}, 4 * 8 * 8 * 8192)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler: pip install libtpu"
)
def test_the_compiler_agrees_with_the_shapes():
    made = jaxinfer.plan("smollm2-135m", "v5e:2x2", batch=4, context=1024, num_draft=3)
    assert made.fits
    assert [p.name for p in made.programs] == ["prefill", "decode", "verify"]
    held = made.bytes_per_chip
    for program in made.programs:
        # The compiler pads what does not fill its tiles: three heads, for example.
        assert program.arguments == pytest.approx(held.weights + held.cache, rel=0.03)
        assert set(program.collectives) <= {"all-reduce", "all-gather"}
    decode, verify = made.programs[1:]
    assert decode.collectives["all-reduce"] >= 2 * 30
    assert verify.largest <= 4 * 4 * 4 * 576  # rows, tokens, width in float32
    assert held.temporaries is not None
    assert held.total == held.weights + held.cache + held.temporaries


def test_a_config_with_spread_heads_is_refused_in_a_file():
    config = jaxinfer.testing.tiny_config()
    written = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_fields(Fields(written, "x"), "x") == config
    with pytest.raises(jaxinfer.JaxinferError, match="checkpoint_heads"):
        from_fields(Fields(written | {"checkpoint_heads": [2, 1]}, "x"), "x")
