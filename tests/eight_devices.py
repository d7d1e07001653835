"""A mesh changes where numbers lie, not what they are: on eight virtual devices of this CPU.

`test_sharding.py` runs this file in a process of its own; so does `pytest tests/eight_devices.py`.
"""

from __future__ import annotations

import gc
import math
import re
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import SETTINGS, tiny_family

import jaxinfer
from jaxinfer import memory
from jaxinfer.batch import Batch
from jaxinfer.checkpoint import names, orbax
from jaxinfer.checkpoint.load import read_params
from jaxinfer.checkpoint.placement import Checkpoint, flat_specs, keep_params, schemes_of
from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM
from jaxinfer.model import init_params
from jaxinfer.recipes import make_recipe
from jaxinfer.sampling import SamplingParams
from jaxinfer.sharding import (
    ONE_DEVICE,
    REPLICATED,
    fit_config,
    head_sources,
    make_layout,
    make_mesh,
    spread_heads,
)
from jaxinfer.speculative.costs import Costs
from jaxinfer.speculative.round import rounds
from jaxinfer.steps import count_compilations
from jaxinfer.testing import tiny_config, tiny_llm, tiny_tokenizer

MESHES = [(1, 1), (1, 8), (2, 4), (4, 2), (8, 1)]  # data, model
FULL_NORM = "olmo2 tied, one kv head, biases"  # over all heads: those of zeros must not count
F32 = jnp.dtype(jnp.float32)
IDS = [[1, 2, 3, 4, 5, 6, 7], [5, 6], [9] * 14, [1]]
GREEDY = {"max_tokens": 10, "temperature": 0, "ignore_eos": True}


class Memory:
    """A checkpoint in memory, which counts how often each row is read."""

    path = Path("memory")

    def __init__(self, params, pieces):
        self.tensors, self.reads = {}, {}
        for path, piece in pieces.items():
            if piece.source not in self.tensors:
                self.tensors[piece.source] = np.zeros(piece.source_shape, np.float32)
                self.reads[piece.source] = np.zeros(piece.source_shape[0], int)
            value, own = params, self.tensors[piece.source][piece.start : piece.stop]
            for key in path.split("/"):
                value = value[key]
            value = np.asarray(value) - np.float32(piece.add_one)
            own[...] = (
                value.reshape(own.shape[::-1]).T if piece.transposed else value.reshape(own.shape)
            )
        self.shapes = {name: x.shape for name, x in self.tensors.items()}

    def read(self, name, start, stop, dtype):
        self.reads[name][start:stop] += 1
        return self.tensors[name][start:stop].astype(dtype)


def share(config, layout):
    """Bytes of float32 weights on a device: each parameter over the devices that cut it."""
    whole = 0.0
    for spec in flat_specs(config).values():
        whole += 4 * math.prod(spec.shape) / math.prod(map(layout.parts, spec.axes))
    return whole


def on_device(trees):
    """Bytes that the first device holds of these arrays."""
    first = jax.devices()[0]
    leaves = jax.tree.leaves(trees)
    return sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == first)


def error(got, want):
    """Largest difference, in parts of the largest logit: sums in another order."""
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def answers(llm, **options):
    return [o.token_ids for o in llm.generate(IDS, **GREEDY | options)]


@pytest.fixture(scope="module", params=[n for n in SETTINGS if " " not in n or n == FULL_NORM])
def family(request):
    config = tiny_family(request.param)
    params = init_params(config, jax.random.key(0), F32, std=0.3)
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(  # norms and biases that matter
        lambda x: x + 0.3 * jax.random.normal(next(noise), x.shape) if x.ndim < 3 else x, params
    )
    one = LLM(params, config, tiny_tokenizer(96), dtype=F32)
    yield one, np.asarray(one.forward(IDS).logits), answers(one)
    jax.clear_caches()  # a process has room for so many programs: see conftest.py
    gc.collect()


def on_mesh(one, data, model, rules=None):
    """`one` on a mesh, by way of a checkpoint; and that checkpoint."""
    mesh = make_mesh(model=model, data=data)
    layout = make_layout(mesh, rules)
    config = fit_config(one.config, layout)
    pieces = names.hf_pieces(one.config)
    source = Memory(one.params, pieces)
    params = read_params(source, pieces, config, F32, layout)
    return LLM(params, config, one.tokenizer, dtype=F32, mesh=mesh, rules=rules), source


def meshes(*quick):
    """All of them, but for `quick` only in the long form."""
    marks = [() if mesh in quick else pytest.mark.slow for mesh in MESHES]
    return [pytest.param(*mesh, marks=mark) for mesh, mark in zip(MESHES, marks, strict=True)]


@pytest.mark.parametrize(("data", "model"), meshes((1, 8), (4, 2)))
def test_every_family_reads_its_parts_once_and_has_the_same_logits(family, data, model):
    one, logits, _ = family
    llm, source = on_mesh(one, data, model)
    assert all((reads == 1).all() for reads in source.reads.values())  # each byte once
    assert error(llm.forward(IDS).logits, logits) <= 1e-5
    assert on_device(llm.params) <= 1.1 * share(llm.config, llm.model.layout)
    cache = llm.model.new_cache(8, 128)
    whole = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
    assert on_device(cache.layers) == whole / (data * model)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "model"), MESHES)
def test_every_family_says_the_same(family, data, model):
    one, _, tokens = family
    llm, _ = on_mesh(one, data, model)
    assert answers(llm) == tokens
    assert answers(llm, drafter="ngram", num_draft=3) == tokens


@pytest.mark.parametrize("family", ["llama", "gemma3", FULL_NORM], indirect=True)
def test_some_families_say_the_same(family):
    test_every_family_says_the_same(family, 2, 4)


REAL = ["The capital of France is", "Repeat: one two three one two three one two", "def add(a, b):"]


@pytest.fixture(scope="module")
def smollm2():
    one = jaxinfer.load(dtype="float32")
    tokens = [o.token_ids for o in one.generate(REAL, max_tokens=24, temperature=0)]
    return np.asarray(one.forward([[1, 2, 3, 4, 5]] * 2).logits), tokens


@pytest.mark.parametrize(("data", "model"), meshes((2, 4)))
def test_smollm2(smollm2, data, model):
    """Nine heads over eight devices, and three kv heads: they are spread."""
    gc.collect()
    before = on_device(jax.live_arrays())
    llm = jaxinfer.load(dtype="float32", mesh=make_mesh(model=model, data=data))
    live = on_device(jax.live_arrays()) - before
    assert live <= 1.1 * share(llm.config, llm.model.layout)
    logits, tokens = smollm2
    assert error(llm.forward([[1, 2, 3, 4, 5]] * 2).logits, logits) <= 1e-5
    for drafter in (None, "ngram"):
        options = {"max_tokens": 24, "temperature": 0, "drafter": drafter}
        assert [o.token_ids for o in llm.generate(REAL, **options)] == tokens


FIELDS = {"num_heads": 8, "num_kv_heads": 2, "width": 32, "vocab_size": 16384, "head_dim": 16}


SPREAD = FIELDS | {"num_heads": 3, "num_kv_heads": 3}  # over four devices


@pytest.fixture(scope="module")
def tiny():
    return tiny_llm(**FIELDS), tiny_llm(**FIELDS, mesh=make_mesh(model=4, data=2))


def test_nothing_as_wide_as_the_vocabulary_or_the_cache_is_gathered(tiny):
    """In the compiled loop of every kind of request, all that is sent is small."""
    _, llm = tiny
    biggest = 0
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.8, top_k=5, top_p=0.9, min_p=0.1),
        SamplingParams(repetition_penalty=1.2, frequency_penalty=0.1, min_tokens=3),
        SamplingParams(logit_bias={3: 1.0}, temperature=1.0),
        SamplingParams(logprobs=5),
    ):
        rows = llm._requests(IDS, params, {})
        speculation = llm.speculation("self", num_draft=3)
        batch = Batch(llm.model, rows, speculation, Costs())
        program = rounds.lower(
            llm.params,
            batch.run,
            batch.sampling,
            batch.drafter,
            np.int32(8),
            config=llm.config,
            plan=batch.plan,
        ).compile()
        for line in program.as_text().splitlines():
            sent = re.search(
                r"= (\w+)\[([\d,]*)\]\S* (all-gather|all-reduce|all-to-all|collective-permute)",
                line,
            )
            if sent:
                size = math.prod(int(n) for n in sent[2].split(",") if n)
                biggest = max(biggest, size)
                assert size < llm.config.vocab_size, line[:200]
    assert biggest > 0  # or the search above looks for the wrong thing


def test_a_mesh_compiles_nothing_after_its_warm_up(tiny):
    _, llm = tiny
    for drafter in (None, "ngram"):
        answers(llm, drafter=drafter)
        with count_compilations() as compiled:
            answers(llm, drafter=drafter)
            answers(llm, drafter=drafter, temperature=0.7, top_p=0.9, seed=1)
        assert not [name for name in compiled if "rounds" in name or "prefill" in name]


def test_sampling_exact_mode_and_every_drafter(tiny):
    one, llm = tiny
    warm = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "logprobs": 2}
    assert answers(llm, **warm) == answers(one, **warm)
    plain = answers(llm, exact=True)
    for drafter in ("self", "ngram"):
        assert answers(llm, exact=True, drafter=drafter, num_draft=3) == plain
    assert answers(llm, drafter="self", num_draft=3) == answers(one)


def test_a_whole_drafter_beside_a_cut_model(tiny):
    one, llm = tiny
    small = tiny_llm(seed=1, vocab_size=16384, mesh=llm.model.layout.mesh, rules=REPLICATED)
    assert on_device(small.params) == small.nbytes
    drafted = {"drafter": small, "num_draft": 3}
    assert answers(llm, **drafted) == answers(one)
    warm = {"temperature": 0.9, "seed": 5, "verifier": "exact"}
    assert answers(llm, **drafted, **warm) == answers(one, **warm)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("int8", SPREAD),
        ("int4:g8", SPREAD),
        ("int4:channel", FIELDS),
        ("w8a8", FIELDS),
        ("fp8", FIELDS),
    ],
)
def test_quantized_weights(text, fields):
    """Sums of whole numbers have no order; the floats beside them have."""
    plain = tiny_llm(**fields)
    recipe, mesh = make_recipe(text, "cpu"), make_mesh(model=4, data=2)
    layout = make_layout(mesh)
    kept = keep_params(plain.params, plain.config, F32, ONE_DEVICE, recipe)
    one = LLM(kept, plain.config, plain.tokenizer, dtype=F32)

    config, pieces = fit_config(plain.config, layout), names.hf_pieces(plain.config)
    schemes = schemes_of(config, recipe)
    params = read_params(Memory(plain.params, pieces), pieces, config, F32, layout, schemes)
    llm = LLM(params, config, plain.tokenizer, dtype=F32, mesh=mesh)
    assert on_device(params) < llm.nbytes / 2
    assert error(llm.forward(IDS).logits, np.asarray(one.forward(IDS).logits)) <= 1e-4
    assert answers(llm) == answers(llm, drafter="ngram", num_draft=3) == answers(one)


@pytest.mark.parametrize("store", ["int8", "fp8"])
def test_a_cache_in_eight_bits(tiny, store):
    """Both halves of a rounding step are as good: tokens are compared, not logits."""
    one, llm = (
        LLM(
            x.params,
            x.config,
            x.tokenizer,
            dtype=F32,
            mesh=x.model.layout.mesh,
            cache_dtype=store,
        )
        for x in tiny
    )
    assert answers(llm, drafter="ngram", num_draft=3) == answers(one)
    cache = llm.model.new_cache(8, 128)
    assert on_device(cache.layers) == sum(x.nbytes for x in jax.tree.leaves(cache.layers)) / 8


def test_rules_of_the_user(tiny):
    one, _ = tiny
    llm, _ = on_mesh(one, 2, 4, {"hidden": None, "batch": None})
    assert llm.params["layer_0"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated
    assert not llm.params["layer_0"]["attn"]["q"]["kernel"].sharding.is_fully_replicated
    assert answers(llm) == answers(one)
    assert llm.model.rows(3) == 4  # and not twice a power of two
    mesh = make_mesh(model=4, data=2)
    for rules, why in (
        ({"depth": None}, "nothing is called 'depth'"),
        ({"hidden": "rows"}, "axes of the mesh: data, model"),
        ({"batch": "model"}, "cuts the batch and nothing else"),
    ):
        with pytest.raises(InvalidArgument, match=why):
            make_layout(mesh, rules)
    with pytest.raises(InvalidArgument, match="of length 36 does not divide over 8 devices"):
        tiny_llm(mesh=make_mesh(model=8), hidden=36)
    with pytest.raises(InvalidArgument, match="of type Auto"):
        make_layout(jax.make_mesh((8,), ("model",)))
    others = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with pytest.raises(InvalidArgument, match="no rule cuts anything along x, y"):
        make_layout(others)
    named = make_layout(others, {"batch": "x", "heads": "y"})
    assert (named.parts("B"), named.parts("K"), named.parts("V")) == (2, 4, 1)
    with pytest.raises(InvalidArgument, match="do not lie on the mesh"):
        LLM(one.params, one.config, one.tokenizer, dtype=F32, mesh=make_mesh(model=2))


def test_a_drafters_memory_is_counted_as_it_lies(tiny, monkeypatch):
    _, llm = tiny
    asked = []
    monkeypatch.setattr(memory, "require", lambda needed, what, *_: asked.append((what, needed)))
    Batch(llm.model, llm._requests(IDS, None, {}), llm.speculation("self", num_draft=3), Costs())
    (cache,) = [n for what, n in asked if what.startswith("a cache")]
    (drafter,) = [n for what, n in asked if what.startswith("the drafter")]
    # The same shape, in one of two layers; and a few whole rows of ids.
    assert drafter < cache


def test_our_own_checkpoint_onto_spread_heads(tmp_path, monkeypatch):
    one, folder = tiny_llm(num_heads=3, num_kv_heads=3, width=24), tmp_path / "own"
    rest = one.tokenizer, one.default_params, one.eos_ids
    monkeypatch.setattr(orbax, "save_tokenizer", lambda tokenizer, folder: None)
    monkeypatch.setattr(orbax, "load_tokenizer", lambda folder: one.tokenizer)
    orbax.save_orbax(folder, Checkpoint(one.params, one.config, *rest))
    mesh = make_mesh(model=2, data=4)
    got = orbax.load_orbax(folder, dtype=F32, layout=make_layout(mesh))
    assert (got.config.num_heads, got.config.num_kv_heads) == (4, 4)
    assert on_device(got.params) <= 1.1 * share(got.config, make_layout(mesh))
    llm = LLM(got.params, got.config, one.tokenizer, dtype=F32, mesh=mesh)
    assert answers(llm) == answers(one)
    with pytest.raises(InvalidArgument, match="load them without one"):
        orbax.save_orbax(tmp_path / "other", got)
    with pytest.raises(InvalidArgument, match=r"jaxinfer.load spreads them"):
        LLM(one.params, one.config, one.tokenizer, dtype=F32, mesh=mesh)


@pytest.mark.parametrize(
    ("heads", "parts", "want"),
    [
        ((9, 3), 4, (12, 4)),
        ((9, 3), 8, (16, 8)),
        ((64, 8), 16, (64, 16)),
        ((4, 1), 8, (8, 8)),
        ((8, 8), 4, (8, 8)),
        ((32, 8), 64, (64, 64)),
    ],
)
def test_heads_are_spread_with_as_few_more_as_can_be(heads, parts, want):
    config = tiny_config(num_heads=heads[0], num_kv_heads=heads[1])
    wide = spread_heads(config, parts)
    assert (wide.num_heads, wide.num_kv_heads) == want
    if wide == config:
        return
    source = head_sources(wide)
    for query, slot in enumerate(source["N"]):  # each query head beside the keys it looks at
        if slot >= 0:
            kv = source["K"][query // (want[0] // want[1])]
            assert kv == slot // (heads[0] // heads[1])
    assert sorted(x for x in source["N"] if x >= 0) == list(range(heads[0]))
    assert wide.real_size("K") == sum(source["K"] >= 0)
