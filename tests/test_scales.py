"""How a scale is chosen, and by what text: grids are found again, and what a text feeds counts."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import InvalidArgument
from jaxinfer.layerwise import STRETCHES, WINDOW, stretches
from jaxinfer.quantize import decode, encode, find_scale, quantize, widen
from jaxinfer.recipes import make_recipe
from jaxinfer.testing import tiny_tokenizer

NORMAL = np.random.default_rng(0).normal(size=(4, 64, 32)).astype(np.float32)  # [G,O,I]


def scheme_of(text):
    return make_recipe(text, "cpu").scheme("a/kernel", 64, 128)


def squares(x, scale, offset, scheme):
    """Squared errors [G,O,I]."""
    return (np.asarray(decode(encode(x, scale, offset, scheme), scale, offset, scheme)) - x) ** 2


@pytest.mark.parametrize(("text", "share"), [("int4", 0.8), ("int4:symmetric", 1)])
def test_weights_that_lie_on_a_grid_are_found_on_it(text, share):
    """As those of a file in few bits do, also where a group does not use its outermost codes."""
    scheme = dataclasses.replace(scheme_of(text), scale_dtype="float32")
    rng = np.random.default_rng(1)
    codes = rng.integers(-7, 7, (128, 64))  # of -8 to 7
    scale = np.repeat(rng.uniform(0.1, 1, (4, 64)), 32, axis=0)
    shift = np.repeat(rng.uniform(-0.5, 0.5, (4, 64)), 32, axis=0) if scheme.zero else 0
    w = (codes * scale + shift).astype(np.float32)  # [I,O]
    off = np.abs(np.asarray(widen(quantize(jnp.asarray(w), (0,), scheme))) - w)
    assert (off.reshape(4, 32, 64).max(axis=1) < 1e-5).mean() >= share


@pytest.mark.parametrize("text", ["int4", "int4:symmetric", "int2:g32"])
def test_no_other_scale_would_do_much_better(text):
    scheme = scheme_of(text)
    scale, offset = find_scale(jnp.asarray(NORMAL), scheme)
    found = squares(NORMAL, scale, offset, scheme).sum()
    for by in (0.9, 0.95, 1.05, 1.1):
        shifted = None if offset is None else offset * by
        assert found < squares(NORMAL, scale * by, shifted, scheme).sum()


def test_inputs_that_count_more_are_rounded_better():
    scheme = scheme_of("int4")
    weight = np.ones((4, 1, 32), np.float32)
    weight[..., :4] = 100
    even = squares(NORMAL, *find_scale(jnp.asarray(NORMAL), scheme), scheme)
    bent = squares(NORMAL, *find_scale(jnp.asarray(NORMAL), scheme, jnp.asarray(weight)), scheme)
    assert bent[..., :4].sum() < 0.8 * even[..., :4].sum()
    assert bent.sum() > even.sum()


def test_groups_without_anything_to_fit_stay_finite():
    """All zeros, all the same, and of no weight."""
    x = jnp.stack([jnp.zeros((2, 32)), jnp.full((2, 32), 0.7), jnp.asarray(NORMAL[0, :2])])
    weight = jnp.ones((3, 1, 32)).at[2].set(0)
    for text in ("int4", "int4:symmetric", "int2:g32"):
        scheme = scheme_of(text)
        off = squares(np.asarray(x), *find_scale(x, scheme, weight), scheme)
        assert off[:2].max() < 1e-5
        assert np.isfinite(off).all()


@pytest.mark.parametrize("text", ["int4", "int2"])
def test_scales_stay_positive_where_one_input_counts_for_all(text):
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(8, 256, 32)), jnp.float32)
    counts = jnp.asarray(np.exp(16 * rng.normal(size=(8, 1, 32))), jnp.float32)
    scale, _ = find_scale(weights, scheme_of(text), counts)
    assert (np.asarray(scale, np.float32) > 0).all()


def test_each_stretch_begins_as_a_text_does():
    plain = tiny_tokenizer()
    text = "".join(chr(33 + i % 60) for i in range(3 * WINDOW))
    assert stretches(plain, [text], 1000).shape == (3, WINDOW)
    with_bos = dataclasses.replace(plain, adds_bos=True, bos_id=63)
    rows = stretches(with_bos, [text[:700], text[700:]], 1000)
    assert rows.shape == (3, WINDOW)
    assert (rows[:, 0] == 63).all()
    assert rows[:, 1:].ravel().tolist() == plain.encode(text)[: rows[:, 1:].size]
    assert len(stretches(with_bos, [text * 100], 1000)) == STRETCHES
    assert stretches(with_bos, [text], 9).shape[1] == 9
    with pytest.raises(InvalidArgument, match="the text has 9 tokens; 255 are the least"):
        stretches(with_bos, [text[:9]], 1000)
