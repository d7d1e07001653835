"""Pruning: what is left out is what mattered least, and the result is a model like any other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.bench.prompts import own_text
from jaxinfer.cli.main import main
from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM
from jaxinfer.layerwise import refuse_quantized
from jaxinfer.prune import measure, prune
from jaxinfer.quantize import Scheme, quantize
from jaxinfer.testing import tiny_config, tiny_llm

HIDDEN = tiny_config().hidden


@pytest.fixture(scope="module")
def llm():
    """Four layers, of which one does nothing; and in each MLP eight units that nothing comes of."""
    whole = tiny_llm(layers=(tiny_config().layers * 4)[:4])
    params = jax.tree.map(lambda x: x, whole.params)
    for i in range(4):
        down = params[f"layer_{i}"]["mlp"]["down"]
        down["kernel"] = down["kernel"].at[i : i + 8].set(0)
    idle = params["layer_2"]
    idle["attn"]["out"]["kernel"] *= 0
    idle["mlp"]["down"]["kernel"] *= 0
    return LLM(params, whole.config, whole.tokenizer, dtype=jnp.float32)


@pytest.fixture(scope="module")
def importance(llm):
    tokens = np.random.default_rng(0).integers(0, llm.model.vocab_limit, (9, 24), np.int32)
    return measure(llm.params, llm.config, tokens)


def text_of(llm, params, config):
    other = LLM(params, config, llm.tokenizer, dtype=jnp.float32)
    return other.generate([1, 2, 3], max_tokens=12, temperature=0, ignore_eos=True).token_ids


def test_what_does_nothing_goes_first_and_is_not_missed(llm, importance):
    assert importance.layers.argmin() == 2
    assert abs(importance.layers[2]) < 1e-6
    want = text_of(llm, llm.params, llm.config)
    params, config = prune(llm.params, llm.config, importance, drop_layers=1, width=HIDDEN - 8)
    assert (config.num_layers, config.hidden) == (3, HIDDEN - 8)
    assert params["layer_2"]["mlp"]["up"]["kernel"].shape == (config.width, HIDDEN - 8)
    assert text_of(llm, params, config) == want
    fewer, config = prune(llm.params, llm.config, importance, drop_layers=2)
    assert text_of(llm, fewer, config) != want


def test_two_of_four_inputs_are_zero_and_they_are_the_lightest(llm, importance):
    params, config = prune(llm.params, llm.config, importance, sparsity="2:4")
    assert config == llm.config
    before, after = (x["layer_0"]["mlp"]["up"]["kernel"] for x in (llm.params, params))
    fours = np.asarray(after.T).reshape(-1, 4)
    assert ((fours == 0).sum(1) == 2).all()
    felt = np.sqrt(np.diagonal(importance.moments[0]["mlp/up"]))
    weight = (np.abs(np.asarray(before).T) * felt).reshape(-1, 4)
    kept = np.where(fours != 0, weight, np.inf).min(1)
    assert (np.where(fours == 0, weight, 0).max(1) <= kept).all()
    np.testing.assert_array_equal(after[after != 0], before[after != 0])


def test_narrow_and_sparse_together(llm, importance):
    width = HIDDEN // 2
    params, config = prune(llm.params, llm.config, importance, width=width, sparsity="2:4")
    down = np.asarray(params["layer_0"]["mlp"]["down"]["kernel"])
    assert (config.hidden, len(down)) == (width, width)
    assert ((down.T.reshape(-1, 4) == 0).sum(1) == 2).all()
    with pytest.raises(InvalidArgument, match=f"four does not divide the {width + 1} inputs"):
        prune(llm.params, llm.config, importance, width=width + 1, sparsity="2:4")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drop_layers": 4}, "drop_layers=4: 0 to 3"),
        ({"width": HIDDEN}, f"width={HIDDEN}: 1 to {HIDDEN - 1}"),
        ({"sparsity": "1:2"}, "sparsity='1:2': 2:4"),
        ({}, "nothing to prune"),
    ],
)
def test_what_cannot_be_is_refused(llm, importance, options, said):
    with pytest.raises(InvalidArgument, match=said):
        prune(llm.params, llm.config, importance, **options)


def test_a_quantized_model_is_refused(llm):
    params = dict(llm.params)
    params["embed"] = {"table": quantize(llm.params["embed"]["table"], (1,), Scheme())}
    with pytest.raises(InvalidArgument, match="quantized already"):
        refuse_quantized(params)
    refuse_quantized(llm.params)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--drop_layers=2"], "give --output"),
        (["--output=new"], "nothing to prune"),
        (["--output=new", "--width=8", "--quantize=int8"], "prune first"),
    ],
)
def test_the_command_refuses_before_it_loads(flags, said, capsys):
    assert main(["jaxinfer", "prune", "--model=no-such-model", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_real_model_is_pruned_and_compared(tmp_path, capsys):
    text, small = tmp_path / "text.txt", tmp_path / "small"
    text.write_text(own_text()[:8000])
    assert (
        main(["jaxinfer", "prune", "--drop_layers=3", f"--text={text}", f"--output={small}"]) == 0
    )
    assert "27 of 30 layers" in capsys.readouterr().err
    flags = [f"--text={text}", "--tokens=512", "--runs=0"]
    assert main(["jaxinfer", "quality", *flags, f"--other={small}"]) == 0
    _, whole, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (whole[0], row[0]) == ("float32", "small")
    assert 0.88 < float(row[1]) / float(whole[1]) < 0.95  # bytes
    assert 1 < float(row[2]) / float(whole[2]) < 3  # perplexity
    assert main(["jaxinfer", "quality", *flags, f"--other={tmp_path / 'nobody'}"]) == 2
    assert "nobody" in capsys.readouterr().err
