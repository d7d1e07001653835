"""The model with TPU kernels, interpreted: the same tokens as with XLA, plain and speculative."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
from jax.experimental.pallas import tpu as pltpu

import jaxinfer
from jaxinfer.config import LayerConfig, Rope
from jaxinfer.errors import InvalidArgument
from jaxinfer.loading import _kernels
from jaxinfer.testing import tiny_llm

ROPE = Rope(theta=10000.0, dim=64)
WIDE = {"head_dim": 64, "attention_scale": 0.125, "layers": (LayerConfig(rope=ROPE),)}
MODELS = {
    "plain": WIDE,
    "window and softcap": WIDE
    | {"layers": (LayerConfig(rope=ROPE, window=8),), "attention_softcap": 5.0},
}
PROMPTS = ["abcabcabcab", "the cat and the dog and the cat and the fox", "z"]


@pytest.fixture
def interpreted():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield


def tokens(llm, **options):
    return [o.token_ids for o in llm.generate(PROMPTS, max_tokens=8, ignore_eos=True, **options)]


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_the_same_tokens_by_either_kernel(interpreted, fields):
    """A prompt of 43 tokens goes through `attention`, the rest through `cached_attention`."""
    plain, kernels = tiny_llm(**fields), tiny_llm(**fields, kernels="pallas_tpu")
    sampled = {"seed": 3, "temperature": 1.0}
    assert tokens(kernels, temperature=0) == tokens(plain, temperature=0)
    assert tokens(kernels, **sampled) == tokens(plain, **sampled)
    drafted = {"drafter": "ngram", "num_draft": 3, "temperature": 0}
    assert tokens(kernels, **drafted) == tokens(plain, temperature=0)


def test_exact_mode_holds_for_kernels(interpreted):
    llm = tiny_llm(**WIDE, kernels="pallas_tpu", dtype="bfloat16")
    plain = tokens(llm, temperature=0, exact=True)
    assert tokens(llm, temperature=0, exact=True, drafter="ngram", num_draft=3) == plain


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_real_models(interpreted, name):
    llm = jaxinfer.load(name)
    prompt = (
        "The capital of Italy is Rome. " * 6 + "The capital of France is"
    )  # more than 32 tokens
    want = llm.generate(prompt, max_tokens=2, temperature=0)
    llm.model = dataclasses.replace(llm.model, impl="pallas_tpu")
    got = llm.generate(prompt, max_tokens=2, temperature=0)
    assert got.token_ids == want.token_ids
    assert len(got.token_ids) == 2


MESH = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
from jax.experimental.pallas import tpu as pltpu
from jaxinfer.sharding import make_mesh
from jaxinfer.testing import tiny_llm
from tests.test_kernels_in_model import WIDE, tokens

fields = WIDE | dict(num_heads=4, num_kv_heads=2, width=32)
one = tiny_llm(**fields)
many = tiny_llm(**fields, mesh=make_mesh(model=2, data=2), kernels="pallas_tpu")
with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
    assert tokens(many, temperature=0) == tokens(one, temperature=0)
print("same")
"""


def test_on_a_mesh_a_kernel_sees_its_own_heads_and_rows():
    out = subprocess.run(
        [sys.executable, "-c", MESH], capture_output=True, text=True, cwd=os.getcwd()
    )
    assert out.stdout.strip() == "same", out.stderr[-2000:]


def test_a_kernel_of_another_platform_is_refused():
    assert _kernels("auto", None, False) == "xla"  # here, on CPU
    with pytest.raises(InvalidArgument, match="runs on a tpu, not on cpu"):
        jaxinfer.load(kernels="pallas_tpu")
    with pytest.raises(InvalidArgument, match="one of auto, xla"):
        jaxinfer.load(kernels="cuda")


def test_kernels_that_do_not_cover_a_model_are_refused_at_once():
    with pytest.raises(InvalidArgument, match=r"kernels='pallas_tpu': H=8: pallas_tpu takes 64"):
        tiny_llm(kernels="pallas_tpu")
