"""What XLA is told changes how a program runs, and no number."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.checkpoint.placement import keep_params
from jaxinfer.generate import LLM
from jaxinfer.model import forward
from jaxinfer.recipes import make_recipe
from jaxinfer.sampling import History, choose, greedy_rows, process_logits
from jaxinfer.sharding import ONE_DEVICE
from jaxinfer.testing import tiny_llm
from jaxinfer.xla import once, only_if, outlined


@pytest.fixture(autouse=True)
def on_a_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile().as_text()


def count(text, op):
    return text.count(f" {op}(")


def read_twice(keep):
    def f(x, y):
        turned = keep(jnp.cos(x))
        return y * turned, y[:2] + turned

    return f


def test_what_is_read_twice_is_computed_once():
    """The last two counts say why: the day that they fall, `once` may go."""
    args = jnp.ones(8), jnp.ones((4, 8))
    assert count(compiled(read_twice(once), *args), "cosine") == 1
    for other in (lambda x: x, jax.lax.optimization_barrier):
        assert count(compiled(read_twice(other), *args), "cosine") == 2
    for a, b in zip(jax.jit(read_twice(once))(*args), read_twice(lambda x: x)(*args), strict=True):
        np.testing.assert_array_equal(a, b)


def test_once_is_the_identity_under_vmap_grad_and_without_jit():
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(jax.vmap(once)(x), x)
    np.testing.assert_array_equal(jax.grad(lambda x: (once(x) ** 2).sum())(x), 2 * x)
    with jax.disable_jit():
        np.testing.assert_array_equal(once(x), x)
    assert once(jnp.zeros((0,))).shape == (0,)


def test_an_outlined_call_stays_a_call():
    def f(x):
        return outlined(jnp.sin, x) + 1

    assert count(compiled(f, jnp.ones(8)), "call") == 1
    np.testing.assert_array_equal(f(jnp.ones(8)), jnp.sin(jnp.ones(8)) + 1)


@pytest.mark.parametrize("condition", [False, True])
def test_only_if(condition):
    carry = {"a": jnp.arange(3), "b": jnp.ones(())}
    got = jax.jit(only_if, static_argnums=1)(condition, lambda c: {**c, "a": c["a"] + 1}, carry)
    np.testing.assert_array_equal(got["a"], jnp.arange(3) + condition)


def test_no_score_passes_a_branch():
    rows = greedy_rows(4, 512)
    none = jnp.zeros((4,), jnp.int32)
    history = History(jnp.zeros((4, 128), jnp.int32), none, none)

    def step(logits, history, rows, keys):
        return choose(process_logits(logits, rows, history), rows, keys)

    keys = jax.random.split(jax.random.key(0), (4, 1))
    text = compiled(step, jnp.zeros((4, 1, 512)), history, rows, keys)
    assert count(text, "conditional") == 0 < count(text, "while")


def test_the_largest_score_is_one_number_a_row():
    rows, keys = greedy_rows(32, 49152), jax.random.split(jax.random.key(0), (32, 1))
    scores = jax.random.normal(jax.random.key(1), (32, 1, 49152))
    text = compiled(lambda s: choose(s, rows, keys), scores)
    written = [x.split(" = ")[1] for x in text.splitlines() if "ynn_fusion" in x and " = " in x]
    assert {x.split("{")[0] for x in written} == {"f32[32,1]"}
    np.testing.assert_array_equal(choose(scores, rows, keys), scores.argmax(-1))


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


def forward_text(llm):
    """The compiled forward of two rows of one token, with a cache in int8."""
    cache = dataclasses.replace(llm.model, store="int8").new_cache(2, 128)
    one = jnp.ones((2,), jnp.int32)
    step = partial(forward, config=llm.config)
    return compiled(step, llm.params, one[:, None], one, cache)


def test_rotary_tables_are_computed_once_a_forward(llm):
    ropes = {layer.rope for layer in llm.config.layers}
    assert count(forward_text(llm), "cosine") == len(ropes) < llm.config.num_layers


def test_what_attention_returns_is_computed_once(llm, monkeypatch):
    """Products of weights in int8 read it twice."""
    recipe = make_recipe("int8", "cpu")
    params = keep_params(llm.params, llm.config, llm.model.dtype, ONE_DEVICE, recipe)
    eight = LLM(params, llm.config, llm.tokenizer, dtype=llm.model.dtype)
    kept = count(forward_text(eight), "multiply")
    jax.clear_caches()  # a layer that was traced is not traced again
    with monkeypatch.context() as patch:
        patch.setattr("jaxinfer.attend.once", lambda y: y)
        without = count(forward_text(eight), "multiply")
    jax.clear_caches()
    assert kept < without
