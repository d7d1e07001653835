"""What XLA is told changes how a program runs, and no number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.sampling import History, choose, greedy_rows, process_logits
from jaxinfer.testing import tiny_llm
from jaxinfer.xla import once, only_if, outlined


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
    """With the two counts that show why: XLA:CPU computes it for each reader, barrier or not."""
    args = jnp.ones(8), jnp.ones((4, 8))
    assert count(compiled(read_twice(once), *args), "cosine") == 1
    for other in (lambda x: x, jax.lax.optimization_barrier):
        assert count(compiled(read_twice(other), *args), "cosine") == 2
    for a, b in zip(jax.jit(read_twice(once))(*args), read_twice(lambda x: x)(*args), strict=True):
        np.testing.assert_array_equal(a, b)


def test_once_is_the_identity_to_every_transformation():
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
    text = compiled(step, jax.ShapeDtypeStruct((4, 1, 512), jnp.float32), history, rows, keys)
    assert count(text, "conditional") == 0 < count(text, "while")


def test_rotary_tables_are_computed_once_a_forward():
    llm = tiny_llm()
    cache = llm.model.new_cache(2, 128)

    def forward(params, tokens, cache):
        from jaxinfer.model import forward

        return forward(params, tokens, jnp.ones((2,), jnp.int32), cache, config=llm.config)

    text = compiled(forward, llm.params, jnp.ones((2, 1), jnp.int32), cache)
    ropes = {layer.rope for layer in llm.config.layers}
    assert count(text, "cosine") == len(ropes) < llm.config.num_layers
