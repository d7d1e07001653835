"""Weights in eight bits: what rounding costs, and that every product takes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer.checkpoint.placement import keep, nest, param_shapes
from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM
from jaxinfer.model import param_specs
from jaxinfer.quantize import Quantized, lookup, project, quantize, scores
from jaxinfer.testing import tiny_llm


@pytest.fixture
def w():
    return jax.random.normal(jax.random.key(0), (24, 3, 8)) * jnp.arange(1, 9)


def whole(q: Quantized, inputs: tuple[int, ...]) -> np.ndarray:
    return np.asarray(q.values, np.float32) * np.expand_dims(np.asarray(q.scale), inputs)


@pytest.mark.parametrize("inputs", [(0,), (0, 1)])
def test_no_weight_moves_by_more_than_half_a_step(w, inputs):
    q = quantize(w, inputs)
    assert q.values.dtype == jnp.int8
    assert q.scale.shape == tuple(n for i, n in enumerate(w.shape) if i not in inputs)
    off = np.abs(whole(q, inputs) - np.asarray(w))
    assert (off <= np.expand_dims(np.asarray(q.scale), inputs) * 0.5001).all()
    most = np.abs(np.asarray(q.values)).max(axis=inputs)
    assert (most == 127).all()  # every channel uses the whole range


def test_a_channel_of_zeros_stays_one():
    q = quantize(jnp.zeros((4, 2)), (0,))
    assert not whole(q, (0,)).any()


def test_every_product_is_that_of_the_weights_it_stands_for(w):
    x = jax.random.normal(jax.random.key(1), (2, 5, 24))
    q = quantize(w, (0,))
    want = np.einsum("btd,dnh->btnh", x, whole(q, (0,)))
    np.testing.assert_allclose(project(x, q), want, rtol=1e-5, atol=1e-4)
    out = quantize(w, (0, 1))
    y = jax.random.normal(jax.random.key(2), (2, 5, 24, 3))
    want = np.einsum("btdn,dnh->bth", y, whole(out, (0, 1)))
    np.testing.assert_allclose(project(y, out, 2), want, rtol=1e-5, atol=1e-3)
    table = quantize(w[:, 0], (1,))
    tokens = jnp.array([[0, 23], [5, 5]])
    rows = whole(table, (1,))
    np.testing.assert_allclose(lookup(table, tokens), rows[tokens], rtol=1e-6)
    z = jax.random.normal(jax.random.key(3), (2, 5, 8))
    np.testing.assert_allclose(scores(table, z), z @ rows.T, rtol=1e-5, atol=1e-4)


def test_a_quantized_model_drafts_for_itself_without_a_change():
    one = tiny_llm(layers=jaxinfer.testing.tiny_config().layers * 2)
    shapes = nest(param_shapes(one.config, jnp.dtype(jnp.float32), one.model.layout, "int8"))
    params = jax.tree.map(keep, one.params, param_specs(one.config), shapes)
    llm = LLM(params, one.config, one.tokenizer, dtype=jnp.float32)
    assert llm.nbytes < 0.4 * one.nbytes
    options = {"max_tokens": 16, "temperature": 0, "ignore_eos": True, "exact": True}
    plain = llm.generate(["abc", "hello there"], **options)
    drafted = llm.generate(["abc", "hello there"], drafter="self", num_draft=3, **options)
    assert [o.token_ids for o in drafted] == [o.token_ids for o in plain]


def test_unknown_recipes_are_refused_before_anything_is_read():
    with pytest.raises(InvalidArgument, match="quantize='int3': None, int8"):
        jaxinfer.load(quantize="int3")
