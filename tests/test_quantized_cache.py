"""A cache of eight bits: how small, how near, and that drafts still change nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer.attend import FEW, Kernels, _store, _widen, attend
from jaxinfer.bench import quality
from jaxinfer.bench.prompts import own_text
from jaxinfer.cache import cache_bytes, init_cache
from jaxinfer.config import LayerConfig
from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM
from jaxinfer.model import forward, head
from jaxinfer.testing import tiny_config, tiny_llm

LAYERS = (LayerConfig(window=5), LayerConfig())


def with_cache(llm: LLM, store: str | None) -> LLM:
    return LLM(llm.params, llm.config, llm.tokenizer, dtype=jnp.float32, cache_dtype=store)


@pytest.mark.parametrize("store", ["int8", "fp8"])
def test_what_it_takes_is_what_it_says(store):
    config, dtype = tiny_config(layers=LAYERS), jnp.dtype(jnp.bfloat16)
    held = init_cache(config, 3, 200, dtype, Kernels(store=store))
    assert held.nbytes == cache_bytes(config, 3, 200, dtype, store)
    whole = cache_bytes(config, 3, 200, dtype)
    assert held.nbytes == whole // 2 + whole // config.head_dim // 2 * 4
    assert {x.dtype.itemsize for x in held.layers[0][:2]} == {1}


@pytest.mark.parametrize(
    "kernels",
    [
        Kernels(store="int8"),
        Kernels(store="fp8"),
        Kernels(store="int8", whole=True),
        Kernels(store="int8", whole=True, write_first=True),
        Kernels(store="int8", write_first=True),
        Kernels(store="fp8", write_first=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 7, FEW + 8])  # decode, verify, a piece of a prompt
@pytest.mark.parametrize("window", [None, 12])
def test_attention_is_that_over_the_rounded_keys_and_values(kernels, tokens, window):
    """Rounded by half a step of a token's and head's own scale at most, and exact from there on, or
    but for the 15 bits of queries and weights."""
    store = kernels.store
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, 60 + tokens, n, 16)), jnp.float32) for n in (4, 2, 2)
    )
    most = {"int8": 0.5 / 127, "fp8": 2.0**-4}[store]

    def rounded(x):
        codes, scale = _store(x, store)
        y = codes.astype(jnp.float32) * scale[..., None]
        off = jnp.abs(y - x) / jnp.abs(x).max(-1, keepdims=True)
        assert 0.1 * most < off.max() <= 1.001 * most
        return y

    def run(kernels, k, v):
        config = tiny_config(layers=(LayerConfig(),))
        config = dataclasses.replace(config, num_heads=4, num_kv_heads=2, head_dim=16)
        cache = init_cache(config, 2, 256, jnp.float32, kernels).layers[0].held
        start = jnp.zeros((2,), jnp.int32)
        options = {"kernels": kernels, "scale": 0.3, "window": window, "softcap": None}
        for a, b in ((0, 60), (60, 60 + tokens)):
            parts = (x[:, a:b] for x in (q, k, v))
            num_new = jnp.array([b - a, b - a])
            y, cache = attend(*parts, cache, start, num_new, **options)
            start += num_new
        return np.asarray(y)

    got = run(kernels, k, v)
    near = 2e-6
    if kernels.whole:  # what a digit leaves of a query moves a score, and a score the weights
        score = 0.3 * jnp.abs(q).max() * jnp.abs(k).sum(-1).max() / 64516
        near = float((2 * score + 2 / 64516) * jnp.abs(v).max())
    np.testing.assert_allclose(got, run(Kernels(), rounded(k), rounded(v)), rtol=0, atol=near)
    assert np.abs(got - run(Kernels(), k, v)).max() > max(1e-4, near)


@pytest.mark.parametrize("store", ["int8", "fp8"])
def test_drafts_change_nothing_and_a_cache_grows(store):
    llm = with_cache(tiny_llm(layers=LAYERS), store)
    options = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}
    prompts = ["abc abc abc", "hello there"]
    plain = llm.generate(prompts, exact=True, **options)
    drafted = llm.generate(prompts, exact=True, drafter="ngram", num_draft=4, **options)
    assert [o.token_ids for o in drafted] == [o.token_ids for o in plain]
    assert sum(o.stats.accepted for o in drafted) > 0
    grown = llm.generate(prompts, **options)
    assert [o.token_ids for o in grown] == [o.token_ids for o in plain]


def test_what_is_no_number_stays_none():
    codes, scale = _store(jnp.ones((1, 2, 1, 4)).at[0, 0, 0, 1].set(jnp.nan), "int8")
    assert np.isnan(scale[0, 0]).all()
    assert np.isfinite(scale[0, 1]).all()
    assert np.isnan(_widen(codes, scale, jnp.float32)[0, 0]).all()


def test_another_dtype_is_refused():
    with pytest.raises(InvalidArgument, match="cache_dtype='int4': None, int8 or fp8"):
        jaxinfer.load("no-such-model", cache_dtype="int4")


def test_a_real_model_over_a_cache_in_int8():
    """SmolLM2 reads a text eight tokens at a time, all that came before from its cache."""
    llm = jaxinfer.load()
    rows = quality.stretches(llm, own_text(), 512)

    @jax.jit
    def step(params, cache, tokens):  # weights as constants of the program would take gigabytes
        num_new = jnp.full((len(tokens),), tokens.shape[1])
        hidden, cache = forward(params, tokens, num_new, cache, config=llm.config)
        return cache, jax.nn.log_softmax(head(params, hidden, config=llm.config))

    def read(store):
        cache = with_cache(llm, store).model.new_cache(*rows.shape)
        assert cache.kernels.whole
        for a in range(0, rows.shape[1], 8):
            cache, logp = step(llm.params, cache, rows[:, a : a + 8])
            yield logp

    found = [
        jnp.sum(jnp.exp(p) * (p - q), -1) for p, q in zip(read(None), read("int8"), strict=True)
    ]
    assert 1e-5 < float(jnp.mean(jnp.stack(found))) <= 1e-3
