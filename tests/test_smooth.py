"""SmoothQuant: the same function, and activations that eight bits hold."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import layerwise
from jaxinfer.bench import quality
from jaxinfer.bench.prompts import own_text
from jaxinfer.checkpoint.placement import flatten, keep_params, schemes_of
from jaxinfer.generate import LLM
from jaxinfer.loading import load
from jaxinfer.model import Params
from jaxinfer.recipes import make_recipe
from jaxinfer.sharding import ONE_DEVICE
from jaxinfer.smooth import smooth_model
from jaxinfer.testing import tiny_llm

F32 = jnp.dtype(jnp.float32)


def uneven(llm: LLM) -> LLM:
    """The same function, a few channels of what its projections are fed with ten times as large."""
    by = jnp.where(jnp.arange(16) % 7 == 3, 10.0, 1.0)
    hidden = jnp.where(jnp.arange(32) % 9 == 4, 30.0, 1.0)

    def one(layer: Params) -> Params:
        out: dict[str, Any] = {name: dict(room) for name, room in layer.items()}
        for norm, room, names in (
            ("attn_norm", "attn", "qkv"),
            ("mlp_norm", "mlp", ("gate", "up")),
        ):
            if norm in layer:
                out[norm]["scale"] = layer[norm]["scale"] * by
                for name in names:
                    w = layer[room][name]["kernel"]
                    w = w / by.reshape(-1, *[1] * (w.ndim - 1))
                    out[room][name] = {**layer[room][name], "kernel": w}
        out["mlp"]["up"] = {part: x * hidden for part, x in out["mlp"]["up"].items()}
        down = layer["mlp"]["down"]
        out["mlp"]["down"] = {**down, "kernel": down["kernel"] / hidden[:, None]}
        return out

    params = {n: one(room) if n.startswith("layer_") else room for n, room in llm.params.items()}
    return with_params(llm, params)


def with_params(llm: LLM, params: Params) -> LLM:
    return LLM(params, llm.config, llm.tokenizer, dtype=F32)


def tokens(llm: LLM, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, llm.config.vocab_size, (8, 32), np.int32)


def smoothed(llm: LLM, recipe: str) -> LLM:
    schemes = schemes_of(llm.config, make_recipe(recipe, "cpu"))
    return with_params(llm, smooth_model(llm.params, llm.config, schemes, tokens(llm, 1)))


def kl(reference: LLM, other: LLM, rows: np.ndarray) -> float:
    return float(quality.compare(reference, other, rows).kl.mean())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qkv_bias": True, "mlp_bias": True, "out_bias": True, "activation": "gelu_tanh"},
        {"pre_norm": False, "post_norm": True, "qk_norm": "full"},
        {"tied": False, "post_norm": True},
    ],
)
def test_the_function_stays_and_rounding_costs_less(fields):
    llm = uneven(tiny_llm(seed=3, **fields))
    even = smoothed(llm, "w8a8")
    rows = tokens(llm, 2)
    assert any(flatten(even.params)[p] is not x for p, x in flatten(llm.params).items())
    logits = [np.asarray(m.forward(rows.tolist()).logits) for m in (even, llm)]
    np.testing.assert_array_equal(*logits)
    recipe = make_recipe("embed|head|attn/out=none,w8a8", "cpu")
    before, after = (
        kl(llm, with_params(m, keep_params(m.params, m.config, F32, ONE_DEVICE, recipe)), rows)
        for m in (llm, even)
    )
    assert 0 < after < before / 3


def test_a_channel_that_the_text_leaves_silent_is_not_let_loose():
    """It may speak in another text: it grows less than tenfold against the others."""
    llm = tiny_llm(seed=3)
    llm.params["layer_0"]["mlp_norm"]["scale"] = jnp.ones(16).at[2].set(0.0)
    got = smoothed(llm, "w8a8").params["layer_0"]["mlp"]
    grown = np.asarray(got["gate"]["kernel"] / llm.params["layer_0"]["mlp"]["gate"]["kernel"])[:, 0]
    assert np.isfinite(grown).all()
    assert np.median(grown) / 10 < grown[2] < np.median(grown)


@pytest.mark.parametrize(
    ("recipe", "changed"),
    [
        ("int8", set()),
        ("mlp=int8,w8a8", {"attn_norm/scale", *(f"attn/{n}/kernel" for n in "qkv")}),
        ("attn/v|gate=none,w8a8", {"mlp/up/kernel", "mlp/down/kernel"}),
    ],
)
def test_what_shares_its_inputs_is_smoothed_together_or_not_at_all(recipe, changed):
    llm = uneven(tiny_llm())
    before, after = flatten(llm.params), flatten(smoothed(llm, recipe).params)
    moved = {path for path, x in before.items() if x is not after[path]}
    assert moved == {f"layer_{i}/{path}" for i in range(2) for path in changed}


def test_a_real_model_loaded_by_a_text(monkeypatch):
    """SmolLM2 rounded to nearest, its texts' distributions before and after: half or less."""

    def to_nearest(params, config, schemes, tokens, dtype):
        return keep_params(params, config, dtype, ONE_DEVICE, make_recipe(recipe, "cpu"))

    monkeypatch.setattr("jaxinfer.gptq.round_model", to_nearest)  # which takes a minute
    llm, recipe = load(), "embed=int8,w8a8"
    text = llm.tokenizer.decode(layerwise.stretches(llm.tokenizer, [own_text(1)], 256)[:4].ravel())
    rows = quality.stretches(llm, own_text(), 512)
    before, after = (
        kl(llm, load(quantize=recipe, calibration=texts), rows) for texts in (None, [text])
    )
    assert 0.001 < after < before / 2
