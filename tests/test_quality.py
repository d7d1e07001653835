"""`jaxinfer quality`: its figures are those of the definitions, and its table and picture come."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from jaxinfer.bench import quality
from jaxinfer.bench.plot import draw_quality
from jaxinfer.bench.prompts import own_text
from jaxinfer.cli.main import main
from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM
from jaxinfer.testing import tiny_llm


def test_kl_perplexity_and_agreement_are_by_definition():
    llm = tiny_llm()
    params = jax.tree.map(lambda x: x * 1.05, llm.params)
    other = LLM(params, llm.config, llm.tokenizer, dtype=llm.model.dtype)
    rows = np.random.default_rng(0).integers(0, llm.model.vocab_limit, (5, 21), np.int32)
    found = quality.summary(quality.compare(llm, other, rows))
    p, q = (
        np.stack([np.asarray(m.forward(r.tolist()).logits, np.float64)[0, :-1] for r in rows])
        for m in (llm, other)
    )
    p, q = (x[..., : llm.model.vocab_limit] for x in (p, q))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    kl = (np.exp(p) * (p - q)).sum(-1)
    chosen = np.take_along_axis(q, rows[:, 1:, None], axis=-1)
    assert found["mean_kl"] == pytest.approx(kl.mean(), rel=1e-3)
    assert found["max_kl"] == pytest.approx(kl.max(), rel=1e-3)
    assert found["perplexity"] == pytest.approx(np.exp(-chosen.mean()), rel=1e-4)
    assert found["agreement"] == (p.argmax(-1) == q.argmax(-1)).mean()
    assert found["positions"] == 100


def test_a_short_text_is_refused():
    with pytest.raises(InvalidArgument, match="the text is too short"):
        quality.stretches(tiny_llm(), "a", 1000)


def test_the_two_halves_of_the_text_differ():
    a, b = own_text(0), own_text(1)
    assert min(len(a), len(b)) > 100_000
    assert a[:200] not in b


def test_the_command(tmp_path, capsys):
    out, picture = tmp_path / "q.json", tmp_path / "q.png"
    flags = ["--quantize=int8", "--quantize=stored", "--tokens=256", "--runs=1"]
    assert main(["jaxinfer", "quality", *flags, f"--json={out}", f"--plot={picture}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["recipe", "float32", "int8", "stored"]
    rows = json.loads(out.read_text())["rows"]
    whole, eight, stored = rows
    assert eight["bytes"] < 0.26 * whole["bytes"]
    assert 1e-4 < eight["mean_kl"] < 0.02
    assert stored["mean_kl"] < 1e-4  # the same numbers
    assert stored["bytes"] < 0.19 * whole["bytes"]
    assert picture.stat().st_size > 5000
    assert draw_quality(rows).axes[0].get_xlabel()


def test_another_model_that_is_not_there_is_told_before_anything_is_measured(tmp_path, capsys):
    assert main(["jaxinfer", "quality", f"--other={tmp_path / 'none'}"]) == 2
    told = capsys.readouterr()
    assert "none" in told.err
    assert not told.out


def test_calibrating_without_a_recipe_is_refused(capsys):
    assert main(["jaxinfer", "quality", "--other=made", "--calibrate=own"]) == 2
    assert "what --quantize names" in capsys.readouterr().err
