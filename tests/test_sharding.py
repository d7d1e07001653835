"""A mesh changes where numbers lie, not what they are: eight virtual devices in another process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jaxinfer.errors import InvalidArgument
from jaxinfer.sharding import check_divisible, make_mesh
from jaxinfer.testing import tiny_config

CODE = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
import jaxinfer
from jaxinfer.generate import LLM
from jaxinfer.model import param_specs, ParamSpec
from jaxinfer.sharding import make_mesh, sharding
from jaxinfer.testing import tiny_llm

fields = dict(num_heads=8, num_kv_heads=8, width=32, qkv_bias=True, tied=False)
one = tiny_llm(**fields)
prompts = ["abc", "hello there", "x" * 20, "zz"]
want = [o.token_ids for o in one.generate(prompts, max_tokens=12, ignore_eos=True)]
ids = [[1, 2, 3, 4], [5, 6]]
logits = np.asarray(one.forward(ids).logits)
specs = param_specs(one.config)
for data, model in ((1, 8), (2, 4), (8, 1)):
    mesh = make_mesh(model=model, data=data)
    params = jax.tree.map(
        lambda spec, x: jax.device_put(x, sharding(spec.axes, mesh)),
        specs, one.params, is_leaf=lambda x: isinstance(x, ParamSpec),
    )
    many = LLM(params, one.config, one.tokenizer, dtype="float32", mesh=mesh)
    np.testing.assert_allclose(np.asarray(many.forward(ids).logits), logits, atol=1e-5)
    assert [o.token_ids for o in many.generate(prompts, max_tokens=12, ignore_eos=True)] == want
    held = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards
               if s.device == jax.devices()[0])
    assert held <= 1.1 * one.nbytes / model + 1024, (held, one.nbytes, model)
    cache = many.model.new_cache(8, 128)
    keys = cache.layers[0].k
    assert keys.sharding.shard_shape(keys.shape)[:2] == (8 // data, 8 // model)
print("same")
"""


def test_every_mesh_gives_the_same_logits_and_tokens():
    out = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, cwd=os.getcwd()
    )
    assert out.stdout.strip() == "same", out.stderr[-2000:]


def test_a_mesh_that_does_not_fit_is_refused_with_what_would():
    with pytest.raises(InvalidArgument, match="needs 64 devices"):
        make_mesh(model=64)

    class Mesh:
        shape = {"data": 1, "model": 3}  # noqa: RUF012

    config = tiny_config(num_heads=4, num_kv_heads=4)
    with pytest.raises(InvalidArgument, match=r"sizes of 'model' that work: 1, 2, 4$"):
        check_divisible(config, Mesh())
