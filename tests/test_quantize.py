"""Quantized weights: what rounding costs, that every product takes them, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

import jaxinfer
from jaxinfer.checkpoint.blocks import FORMATS
from jaxinfer.checkpoint.placement import keep_params
from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM
from jaxinfer.quantize import (
    FEW_ROWS,
    decode,
    lookup,
    pack,
    project,
    quantize,
    scores,
    unpack,
    widen,
)
from jaxinfer.recipes import make_recipe, read_scheme, scheme_fields
from jaxinfer.sampling import SamplingParams
from jaxinfer.sharding import ONE_DEVICE
from jaxinfer.speculative.fallback import FallbackDrafter
from jaxinfer.speculative.self_drafter import SelfDrafter
from jaxinfer.testing import tiny_config, tiny_llm

F32 = jnp.dtype(jnp.float32)
RECIPES = (
    *("int8", "int4", "int2", "fp8", "int8:g16:zero", "int4:channel", "int4:symmetric:g16"),
    "int2:channel:symmetric",
)


def scheme_of(text: str, outputs: int, inputs: int, platform: str = "cpu"):
    return make_recipe(text, platform).scheme("a/kernel", outputs, inputs)


def quantized(llm: LLM, text: str) -> LLM:
    params = keep_params(llm.params, llm.config, F32, ONE_DEVICE, make_recipe(text, "cpu"))
    return LLM(params, llm.config, llm.tokenizer, dtype=F32)


@pytest.fixture
def w():
    return jax.random.normal(jax.random.key(0), (64, 3, 8)) * jnp.arange(1, 9)


@pytest.mark.parametrize("inputs", [(0,), (0, 1)])
@pytest.mark.parametrize("text", [r for r in RECIPES if r != "fp8"])  # its steps vary
def test_no_weight_moves_by_more_than_half_a_step(w, inputs, text):
    count = np.prod([w.shape[i] for i in inputs])
    scheme = scheme_of(text, w.size // count, count)
    q = quantize(w, inputs, scheme)
    assert q.shape == w.shape
    assert q.out == tuple(np.delete(w.shape, inputs))
    assert q.values.nbytes == w.size * scheme.bits // 8
    off = np.asarray(jnp.abs(widen(q) - w))
    codes = np.asarray(unpack(q.values, scheme))
    inside = (codes > codes.min()) & (codes < codes.max())  # not cut off
    steps = np.asarray(q.scale, np.float32)[..., None] * np.ones(codes.shape)
    moved = np.asarray(jaxinfer.quantize.to_groups(jnp.asarray(off), inputs, scheme))
    assert inside.any()
    assert (moved <= 0.501 * steps)[inside].all()


@pytest.mark.parametrize("text", ["int8", "int4", "int2", "fp8"])
def test_more_bits_are_nearer_and_zeros_stay_zeros(w, text):
    scheme = scheme_of(text, 24, 64)
    error = float(jnp.mean((widen(quantize(w, (0,), scheme)) - w) ** 2) / jnp.mean(w**2))
    assert error < {"int8": 1e-4, "fp8": 2e-3, "int4": 1e-2, "int2": 0.2}[text]
    assert error > 1e-6
    assert not np.asarray(widen(quantize(jnp.zeros((64, 24)), (0,), scheme))).any()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("text", [*RECIPES, "w8a8"])
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS + 1])
def test_every_product_is_that_of_the_weights_it_stands_for(w, text, platform, rows):
    def check(got, x, wide, sums):
        """An activation is off by half a step of its digits, and the products are exact."""
        steps = {"w8a8": 127}.get(text, 64516 / 2) * 2
        most = float(jnp.abs(x).max() * jnp.abs(wide).sum(0).max()) / steps
        want = np.einsum(sums, np.asarray(x, np.float64), np.asarray(wide, np.float64))
        np.testing.assert_allclose(got, want, rtol=0, atol=1.01 * most + 1e-4)

    x = jax.random.normal(jax.random.key(1), (1, rows, 64))
    q = quantize(w, (0,), scheme_of(text, 24, 64, platform))
    check(project(x, q), x, widen(q), "btd,dnh->btnh")
    out = quantize(w, (0, 1), scheme_of(text, 8, 192, platform))
    y = jax.random.normal(jax.random.key(2), (1, rows, 64, 3)) / 2
    got = project(y, out, 2)
    check(got, y.reshape(1, rows, -1), widen(out).reshape(-1, 8), "btd,dh->bth")
    table = quantize(w.reshape(64, 24).T, (1,), scheme_of(text, 24, 64, platform))
    check(scores(table, x), x, widen(table).T, "btd,dv->btv")
    tokens = jnp.array([[0, 23], [5, 5]])
    np.testing.assert_array_equal(lookup(table, tokens), widen(table)[tokens])


@pytest.mark.parametrize(
    ("text", "rows"),
    [*itertools.product(["int4", "int2", "fp8"], [1, FEW_ROWS + 1]), ("int8:g32", FEW_ROWS + 1)],
)
def test_no_weight_is_unpacked_before_its_turn(text, rows):
    """Else a model of many layers would be in memory unpacked."""
    w = quantize(jnp.ones((256, 256)), (0,), scheme_of(text, 256, 256))

    def memory(layers):
        def run(x, weights):
            for w in weights:
                x = project(x, w)
            return x

        program = jax.jit(run).lower(jnp.ones((1, rows, 256)), [w] * layers).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert memory(16) < 1.5 * memory(2)


@pytest.mark.parametrize("text", ["int8", "w8a8", "int4:g16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_none(w, text, bad):
    x = jax.random.normal(jax.random.key(1), (1, 5, 64))
    q = quantize(w, (0,), scheme_of(text, 24, 64))
    good, y = (np.asarray(jax.jit(project)(x, q))[0] for x in (x, x.at[0, 3, 7].set(bad)))
    assert not np.isfinite(y[3]).any()
    np.testing.assert_array_equal(np.delete(y, 3, 0), np.delete(good, 3, 0))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_code_comes_back_from_its_byte(bits):
    scheme = dataclasses.replace(scheme_of("int8", 4, 4), bits=bits)
    half = 1 << (bits - 1)
    codes = jax.random.randint(jax.random.key(0), (3, 64, 7), -half, half).astype(jnp.int8)
    assert set(np.unique(codes)) >= {-half, half - 1}
    packed = pack(codes, scheme)
    assert packed.dtype == jnp.int8
    assert packed.size == codes.size * bits // 8
    np.testing.assert_array_equal(unpack(packed, scheme), codes)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_block_of_gguf_is_what_gguf_reads(name):
    kind = GGMLQuantizationType[name]
    size, count = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (200, count), np.uint8)
    want = quants.dequantize(raw, kind)
    raw, want = raw[np.isfinite(want).all(1)], want[np.isfinite(want).all(1)]
    assert len(raw) > 100
    assert want.shape[1] == size
    scheme = FORMATS[name].scheme
    codes, scale, offset = FORMATS[name].split(raw)
    assert codes.min() >= -(1 << (scheme.bits - 1))
    assert codes.max() < 1 << (scheme.bits - 1)
    shape = len(raw), size // scheme.group
    assert scale.shape == shape
    assert scale.dtype == scheme.scale_dtype
    assert (offset is None) != scheme.zero
    codes = codes.reshape(*shape, -1)
    zero = None if offset is None else jnp.asarray(offset)
    got = np.asarray(decode(jnp.asarray(codes), jnp.asarray(scale), zero, scheme))
    largest = np.abs(want).max(1, keepdims=True)
    np.testing.assert_allclose(got.reshape(want.shape) / largest, want / largest, atol=1e-5)


# One of each way to multiply: by two digits, packed or not, by floats, by one digit. A prompt alone
# is eight rows: `FEW_ROWS`.
@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("embed=int8,attn/=none,int4:g16", ["abc"]),
        *((text, ["abc", "hello there"]) for text in ("int4:g16", "int8", "fp8", "w8a8")),
    ],
)
def test_a_quantized_model_drafts_for_itself_without_a_change(text, prompts):
    """In exact mode, bit for bit against the same quantized model."""
    one = tiny_llm(layers=tiny_config().layers * 2)
    llm = quantized(one, text)
    assert llm.nbytes < 0.6 * one.nbytes
    options = {"max_tokens": 16, "ignore_eos": True, "logprobs": 1}
    params = [SamplingParams(**options, temperature=1.0, seed=3), SamplingParams(**options)]
    params = params[: len(prompts)]
    plain = llm.generate(prompts, params, exact=True)
    drafted = llm.generate(prompts, params, exact=True, drafter="self", num_draft=3)
    assert [o.logprobs for o in drafted] == [o.logprobs for o in plain]
    assert [o.token_ids for o in drafted] == [o.token_ids for o in plain]
    assert all(o.stats.drafted > 0 for o in drafted)


def test_a_model_in_eight_bits_drafts_for_itself():
    llm = tiny_llm()
    plain, drafted = (
        llm.generate(["abc", "hello there"], max_tokens=16, temperature=0, ignore_eos=True, **how)
        for how in ({"exact": True}, {"exact": True, "drafter": "self:int8", "num_draft": 3})
    )
    assert [o.token_ids for o in drafted] == [o.token_ids for o in plain]
    stats = drafted[0].stats
    assert stats.accepted > 0.5 * stats.drafted > 0
    first, second = (llm.speculation("self:int8").drafter for _ in range(2))
    assert sum(x.nbytes for x in jax.tree.leaves(first.params)) < 0.5 * llm.nbytes
    assert first.params is second.params  # not made anew
    both = llm.speculation(FallbackDrafter(first="ngram", second="self:int8")).drafter
    assert both.second.params is first.params


@pytest.mark.parametrize(
    ("drafter", "said"),
    [("self:int3", "is none of int8"), ("self:stored", "not of a file"), ("self:", "a text such")],
)
def test_a_drafter_of_no_recipe_is_refused_before_anything_is_read(drafter, said):
    with pytest.raises(InvalidArgument, match=said):
        jaxinfer.load("no-such-model", drafter=drafter)


def test_a_quantized_model_has_no_quantized_self():
    own = SelfDrafter(quantize="int4")
    for drafter in ("self:int4", own, FallbackDrafter(first="ngram", second=own)):
        with pytest.raises(InvalidArgument, match="both would quantize"):
            jaxinfer.load("no-such-model", quantize="int8", drafter=drafter)
    with pytest.raises(InvalidArgument, match="quantized already"):
        quantized(tiny_llm(), "int8").speculation("self:int8")


def test_the_first_rule_that_is_found_wins():
    recipe = make_recipe("embed|head=int8,layer_(0|29)/=fp8,down=none,int4:g64", "tpu")
    assert recipe.scheme("embed/table", 64, 64).bits == 8
    assert recipe.scheme("layer_29/mlp/down/kernel", 64, 64).fp8
    assert recipe.scheme("layer_2/mlp/down/kernel", 64, 64) is None
    assert recipe.scheme("layer_2/mlp/up/kernel", 64, 64).group == 64
    assert recipe.scheme("layer_2/mlp/up/bias", 64, 1) is None
    assert make_recipe("int8", "cpu").scheme("a/kernel", 4, 4).digits == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int3", "'int3' is none of int8, int4, int2, fp8, w8a8, none, stored"),
        ("", "a text such as"),
        ("=int8", "no pattern before"),
        ("(=int8", "missing \\)"),
        ("int4:h", "'h' is none of g32"),
        ("w8a8:g32", "only int8, int4 and int2 take them"),
        ("int8,stored", "'stored' is none of"),
        ("a{99999999999}=int8", "repetition number is too large"),
        ("int4:g4", "another number from 8"),
    ],
)
def test_unknown_recipes_are_refused_before_anything_is_read(text, said):
    with pytest.raises(InvalidArgument, match=said):
        jaxinfer.load("no-such-model", quantize=text)


def test_a_rule_about_nothing_is_refused():
    with pytest.raises(InvalidArgument, match="no matrix of the model has 'mebed' in its name"):
        quantized(tiny_llm(), "mebed=int8,int8")
    both = quantized(tiny_llm(), "embed=int8, mlp=fp8").params  # a space is none of the pattern
    assert both["layer_0"]["mlp"]["up"]["kernel"].scheme.fp8


def test_sizes_that_do_not_divide_say_what_would():
    recipe = make_recipe("int4:g128", "cpu")
    with pytest.raises(InvalidArgument, match="576 inputs of a/kernel; 16, 32, 64 would"):
        recipe.scheme("a/kernel", 64, 576)
    with pytest.raises(InvalidArgument, match=r"4 codes a byte .* 6 outputs of a/kernel; int8"):
        make_recipe("int2:channel", "cpu").scheme("a/kernel", 6, 64)
    with pytest.raises(InvalidArgument, match="no scheme of 6 outputs"):
        read_scheme(scheme_fields(make_recipe("int4:g8", "tpu").rules[0][1]), 6, 12)
