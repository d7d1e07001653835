"""The one forward: its cache, its masks and its masks' edges, on tiny random models."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as cache_module
from jaxinfer.attend import Kernels
from jaxinfer.cache import init_cache
from jaxinfer.config import LayerConfig, Rope
from jaxinfer.model import forward as eager_forward
from jaxinfer.model import head as eager_head
from jaxinfer.model import init_params
from jaxinfer.rotary import frequencies, tables
from jaxinfer.testing import tiny_config
from pallas_kernels import UnsupportedError, cached_attention

forward = jax.jit(eager_forward, static_argnames=("config",))
head = jax.jit(eager_head, static_argnames="config")
ROPE = Rope(theta=10000.0, dim=8)
VARIANTS = {
    "plain": {},
    "window": {"layers": (LayerConfig(window=5, rope=ROPE), LayerConfig(rope=ROPE))},
    "windows": {"layers": (LayerConfig(window=5, rope=ROPE),) * 2},
    "no-rope": {"layers": (LayerConfig(rope=ROPE), LayerConfig())},
    "partial-rope": {"layers": (LayerConfig(rope=Rope(theta=500.0, dim=4)),) * 2},
    "post-norm": {"pre_norm": False, "post_norm": True, "qk_norm": "full"},
    "gemma-like": {
        "post_norm": True,
        "qk_norm": "head",
        "embed_scale": 4.0,
        "activation": "gelu_tanh",
        "attention_softcap": 2.0,
        "logit_softcap": 3.0,
    },
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied": False},
    "four-queries-a-key": {"num_heads": 4},
}


def setup(variant, dtype=jnp.float32):
    config = tiny_config(**VARIANTS[variant])
    return config, init_params(config, jax.random.key(1), dtype, std=0.3)


def run(config, params, tokens, widths, capacity=32, num_new=None):
    """Feed tokens [B,T] in chunks of the given widths; logits [B,T,V]."""
    cache = init_cache(config, tokens.shape[0], capacity, params["embed"]["table"].dtype)
    out, at = [], 0
    for width in widths:
        chunk = tokens[:, at : at + width]
        count = jnp.full((tokens.shape[0],), width) if num_new is None else num_new
        hidden, cache = forward(params, chunk, count, cache, config=config)
        out.append(head(params, hidden, config=config))
        at += width
    return jnp.concatenate(out, axis=1), cache


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_chunking_gives_the_same_logits(variant):
    config, params = setup(variant)
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, config.vocab_size)
    whole, _ = run(config, params, tokens, [12])
    for widths in ([1] * 12, [5, 1, 6], [4, 8]):
        parts, cache = run(config, params, tokens, widths)
        np.testing.assert_allclose(parts, whole, atol=2e-5)
        assert cache.lengths.tolist() == [12, 12]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_different_length_do_not_touch_each_other(variant):
    config, params = setup(variant)
    tokens = jax.random.randint(jax.random.key(3), (3, 10), 0, config.vocab_size)
    num_new = jnp.array([10, 4, 0])
    ragged, cache = run(config, params, tokens, [10], num_new=num_new)
    assert cache.lengths.tolist() == [10, 4, 0]
    alone, _ = run(config, params, tokens[1:2, :4], [4])
    np.testing.assert_allclose(ragged[1:2, :4], alone, atol=2e-5)
    # Padding wrote nothing: the slots behind a row's length are as they were.
    for layer in cache.layers:
        assert (np.asarray(layer.k)[1, :, 4:] == 0).all()
        assert (np.asarray(layer.k)[2] == 0).all()


def test_rewind_is_as_if_the_tokens_had_never_been():
    config, params = setup("window")
    tokens = jax.random.randint(jax.random.key(4), (2, 12), 0, config.vocab_size)
    _, cache = run(config, params, tokens, [8])
    wrong = (tokens[:, 8:11] + 1) % config.vocab_size
    _, refused = forward(params, wrong, jnp.array([3, 2]), cache, config=config)
    back = refused.rewind(jnp.array([3, 2]))
    again, _ = forward(params, tokens[:, 8:], jnp.array([4, 4]), back, config=config)
    want, _ = forward(params, tokens[:, 8:], jnp.array([4, 4]), cache, config=config)
    np.testing.assert_array_equal(again, want)


def test_writes_past_the_capacity_are_dropped():
    """A padded chunk may reach past the last slot; what it would overwrite must survive."""
    config, params = setup("plain")
    tokens = jax.random.randint(jax.random.key(5), (1, 16), 0, config.vocab_size)
    whole, _ = run(config, params, tokens[:, :10], [10], capacity=32)
    cache = init_cache(config, 1, 10, jnp.float32)
    _, cache = forward(params, tokens[:, :8], jnp.array([8]), cache, config=config)
    hidden, cache = forward(params, tokens[:, 8:], jnp.array([2]), cache, config=config)
    np.testing.assert_allclose(head(params, hidden, config=config)[:, :2], whole[:, 8:], atol=2e-5)


def test_a_ring_keeps_its_window_however_much_is_refused(monkeypatch):
    """A window layer far past its capacity, with refused blocks in between, against a whole cache.

    The ring has window + block slots; one slot less, and this fails.
    """
    block = 4
    config, params = setup("windows")
    window = config.layers[0].window
    length = 10 * (window + block)
    tokens = jax.random.randint(jax.random.key(6), (2, length), 0, config.vocab_size)
    whole, _ = run(config, params, tokens, [length], capacity=length)  # nothing is overwritten
    monkeypatch.setattr(cache_module, "MAX_BLOCK", block)
    monkeypatch.setattr(cache_module, "TILE", 1)
    cache = init_cache(config, 2, length, jnp.float32)
    assert cache.layers[0].k.shape[2] == window + block
    at = 0
    while at + block <= length:
        wrong = (tokens[:, at : at + block] + 1) % config.vocab_size
        _, refused = forward(params, wrong, jnp.array([block, block]), cache, config=config)
        refused = refused.rewind(jnp.array([block, block]))
        few = 1 + at % block
        right = tokens[:, at : at + block]
        hidden, cache = forward(params, right, jnp.array([few, few]), refused, config=config)
        logits = head(params, hidden, config=config)[:, :few]
        np.testing.assert_allclose(logits, whole[:, at : at + few], atol=5e-5)
        at += few


def test_reading_the_new_keys_from_the_cache_or_beside_it():
    config, params = setup("window")
    tokens = jax.random.randint(jax.random.key(7), (2, 12), 0, config.vocab_size)
    whole, _ = run(config, params, tokens, [12])
    cache = init_cache(config, 2, 32, jnp.float32, kernels=Kernels(write_first=True))
    for at in (0, 4, 8):
        few = tokens[:, at : at + 4]
        hidden, cache = forward(params, few, jnp.array([4, 4]), cache, config=config)
        logits = head(params, hidden, config=config)
        np.testing.assert_allclose(logits, whole[:, at : at + 4], atol=2e-5)


def test_grow_keeps_what_is_there():
    config, params = setup("plain")
    tokens = jax.random.randint(jax.random.key(6), (1, 12), 0, config.vocab_size)
    whole, _ = run(config, params, tokens, [12])
    _, cache = run(config, params, tokens[:, :8], [8], capacity=8)
    grown = cache.grow(config, 16)
    assert grown.layers[0].k.shape[2] == 16
    assert grown.nbytes == 2 * cache.nbytes
    hidden, _ = forward(params, tokens[:, 8:], jnp.array([4]), grown, config=config)
    np.testing.assert_allclose(head(params, hidden, config=config), whole[:, 8:], atol=2e-5)


def reference_attention(q, k, v, start, scale, window, softcap):
    """Loops over rows, queries and heads, in float64; knows no slot that it may not see."""
    batch, num_new, num_heads, _ = q.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(num_new):
            last = start[b] + t
            first = 0 if window is None else max(0, last - window + 1)
            for n in range(num_heads):
                kv = n * k.shape[1] // num_heads
                s = k[b, kv, first : last + 1] @ q[b, t, n] * scale
                s = s if softcap is None else softcap * np.tanh(s / softcap)
                w = np.exp(s - s.max())
                out[b, t, n] = (w / w.sum()) @ v[b, kv, first : last + 1]
    return out


def split_cache(k, start, num_new, poison=1e4):
    """A cache [B,K,S,H] that holds k up to `start` and rubbish behind; the new keys [B,T,K,H]."""
    held = np.full_like(k, poison)
    new = np.zeros((k.shape[0], num_new, k.shape[1], k.shape[3]))
    for b, s in enumerate(start):
        held[b, :, :s] = k[b, :, :s]
        new[b] = k[b, :, s : s + num_new].swapaxes(0, 1)
    return held, new


@pytest.mark.parametrize("window", [None, 1, 4, 5, 6, 7, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("num_new", [1, 3])  # one is computed in a way of its own
def test_cached_attention_is_its_definition(window, softcap, heads, num_new):
    rng = np.random.default_rng(0)
    num_heads, num_kv = heads
    q = rng.normal(size=(3, num_new, num_heads, 8))
    k, v = rng.normal(size=(2, 3, num_kv, 12, 8))
    start = np.array([0, 5, 9])
    (k_cache, k_new), (v_cache, v_new) = (split_cache(x, start, num_new) for x in (k, v))
    got = cached_attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k_new, v_new, k_cache, v_cache)),
        jnp.asarray(start, jnp.int32),
        scale=0.3,
        window=window,
        softcap=softcap,
    )
    want = reference_attention(q, k, v, start, 0.3, window, softcap)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_cached_attention_refuses_what_does_not_fit():
    q, new, cache = jnp.zeros((1, 2, 4, 8)), jnp.zeros((1, 2, 2, 8)), jnp.zeros((1, 2, 6, 8))
    good = {"q": q, "k": new, "v": new, "k_cache": cache, "v_cache": cache, "scale": 1.0}
    good["start"] = jnp.zeros((1,), jnp.int32)
    assert cached_attention(**good).shape == q.shape
    three = jnp.zeros((1, 3, 6, 8))
    for bad in (
        {"impl": "cuda"},
        {"window": 0},
        {"k_cache": three, "v_cache": three},
        {"v_cache": jnp.zeros((1, 2, 5, 8))},
        {"k": jnp.zeros((1, 1, 2, 8))},
        {"start": jnp.zeros((2,), jnp.int32)},
    ):
        with pytest.raises(UnsupportedError, match=r"impl|window|K|\[B"):
            cached_attention(**{**good, **bad})


def test_rotary_scalings_leave_fast_channels_and_stretch_slow_ones():
    base = Rope(theta=500000.0, dim=128)
    plain = frequencies(base)
    for scaling in ("llama3", "yarn"):
        rope = dataclasses.replace(base, scaling=scaling, factor=8.0, original_max_len=8192)
        scaled = frequencies(rope)
        assert scaled[0] == plain[0]
        np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-6)
        assert (np.diff(scaled) < 0).all()
    linear = dataclasses.replace(base, scaling="linear", factor=4.0)
    np.testing.assert_allclose(frequencies(linear), plain / 4, rtol=1e-6)
    factors = dataclasses.replace(base, scaling="factors", factors=tuple(np.linspace(1, 8, 64)))
    np.testing.assert_allclose(frequencies(factors)[-1], plain[-1] / 8, rtol=1e-6)


def test_positions_far_out_keep_their_angles():
    """At position 100,000 an angle computed in float16 or bfloat16 would be worth nothing."""
    cos, _ = tables(Rope(theta=10000.0, dim=8), jnp.array([[100_000]]))
    want = np.cos(100_000 / 10000.0 ** (np.arange(0, 8, 2) / 8))
    np.testing.assert_allclose(cos[0, 0, 0], want, atol=2e-2)


def test_bfloat16_follows_float32():
    config, params = setup("plain")
    tokens = jax.random.randint(jax.random.key(7), (1, 12), 0, config.vocab_size)
    exact, _ = run(config, params, tokens, [12])
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, params)
    rough, _ = run(config, low, tokens, [12])
    assert rough.dtype == jnp.float32
    assert np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()
