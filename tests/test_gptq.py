"""Calibration: rounding by a text beats rounding to nearest on that text, and is the same kind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer.bench import quality
from jaxinfer.checkpoint.placement import keep_params, schemes_of
from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM
from jaxinfer.gptq import round_matrix, round_model
from jaxinfer.prune import measure
from jaxinfer.quantize import quantize, widen
from jaxinfer.recipes import make_recipe
from jaxinfer.sharding import ONE_DEVICE
from jaxinfer.testing import tiny_llm


@pytest.fixture(scope="module")
def activations():
    """A thousand inputs of 64 channels that go together, and one that is always zero."""
    mix = np.random.default_rng(0).normal(size=(12, 64)) * np.linspace(0.1, 3, 64)
    x = np.random.default_rng(1).normal(size=(1000, 12)) @ mix
    x += 0.1 * np.random.default_rng(2).normal(size=x.shape)
    x[:, 5] = 0
    return x


@pytest.mark.parametrize("text", ["int8", "int4", "int4:symmetric:g16", "int4:channel", "int2"])
@pytest.mark.parametrize("inputs", [(0,), (1, 2)])
def test_products_with_the_text_change_less(activations, text, inputs):
    shape = (64, 24) if inputs == (0,) else (24, 4, 16)
    w = jax.random.normal(jax.random.key(0), shape)
    scheme = make_recipe(text, "cpu").scheme("a/kernel", 24, 64)
    moments = activations.T @ activations

    def error(q):
        off = np.asarray(widen(q) - w, np.float64)
        off = off if inputs == (0,) else off.reshape(24, 64).T
        return float(np.mean((activations @ off) ** 2))

    nearest, rounded = quantize(w, inputs, scheme), round_matrix(w, inputs, scheme, moments)
    assert jax.tree.structure(rounded) == jax.tree.structure(nearest)
    assert jax.tree.map(jnp.shape, rounded) == jax.tree.map(jnp.shape, nearest)
    assert 0 < error(rounded) < 0.6 * error(nearest)


@pytest.mark.parametrize("text", ["int8", "int4", "int4:symmetric:g16", "int4:channel"])
def test_a_weight_that_is_never_fed_takes_no_room_in_a_scale(activations, text):
    scheme = make_recipe(text, "cpu").scheme("a/kernel", 24, 64)
    w = jax.random.normal(jax.random.key(0), (64, 24))
    large, none = (
        np.asarray(widen(round_matrix(w.at[5].set(x), (0,), scheme, activations.T @ activations)))
        for x in (30.0, 0.0)
    )
    np.testing.assert_array_equal(large, none)


def test_a_model_keeps_what_the_recipe_says():
    llm = tiny_llm(layers=jaxinfer.testing.tiny_config().layers * 2)
    recipe = make_recipe("down=none,embed=int8,v/=fp8,int4:g8", "cpu")
    f32 = jnp.dtype(jnp.float32)
    tokens = np.random.default_rng(0).integers(0, llm.config.vocab_size, (9, 32), np.int32)
    schemes = schemes_of(llm.config, recipe)
    got = round_model(llm.params, llm.config, schemes, tokens, f32)
    want = keep_params(llm.params, llm.config, f32, ONE_DEVICE, recipe)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), got, want)
    assert same["layer_0"]["mlp"]["down"]["kernel"]
    assert same["final_norm"]["scale"]
    assert not same["layer_1"]["mlp"]["up"]["kernel"].values


def round_to_int8(params, config, tokens):
    schemes = schemes_of(config, make_recipe("int8", "cpu"))
    return round_model(params, config, schemes, tokens, jnp.dtype(jnp.float16))


def test_a_model_changes_less_than_to_nearest_on_its_text():
    """Layer behind layer; random weights gain little, and least in small groups."""
    llm = tiny_llm(seed=2)
    recipe, f32 = make_recipe("embed=none,int4:channel:zero", "cpu"), jnp.dtype(jnp.float32)
    tokens = np.random.default_rng(1).integers(0, llm.config.vocab_size, (32, 32), np.int32)
    rounded = round_model(llm.params, llm.config, schemes_of(llm.config, recipe), tokens, f32)
    nearest = keep_params(llm.params, llm.config, f32, ONE_DEVICE, recipe)

    def kl(params):
        other = LLM(params, llm.config, llm.tokenizer, dtype=f32)
        return float(quality.compare(llm, other, tokens).kl.mean())

    assert 0 < kl(rounded) < 0.9 * kl(nearest)


@pytest.mark.parametrize("options", [{}, {"quantize": "stored"}])
def test_calibration_without_something_to_round_is_refused(options):
    with pytest.raises(InvalidArgument, match="calibration needs quantize"):
        jaxinfer.load("no-such-model", calibration=["text"], **options)


@pytest.mark.parametrize("texts", ["text", [], 5, [5], [b"text"], ["text", None]])
def test_what_is_no_list_of_texts_is_refused(texts):
    with pytest.raises(InvalidArgument, match="a list of texts"):
        jaxinfer.load("no-such-model", quantize="int8", calibration=texts)


@pytest.mark.parametrize("read", [measure, round_to_int8])
def test_activations_that_overflow_are_refused(read):
    llm = tiny_llm()
    params = jax.tree.map(lambda x: x.astype(jnp.float16), llm.params)
    params["layer_0"]["mlp"] = jax.tree.map(lambda x: x * 6e4, params["layer_0"]["mlp"])
    tokens = np.zeros((1, 16), np.int32)
    with pytest.raises(InvalidArgument, match="activations overflow"):
        read(params, llm.config, tokens)
