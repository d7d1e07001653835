"""GPU kernels: index arithmetic; numerics interpreted on CPU; lowering for CUDA; on a GPU, all."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import flash_gpu, oracle
from pallas_kernels.attention.gpu import attention_gpu
from pallas_kernels.cached_attention.gpu import cached_attention_gpu, row_words, splits_for
from pallas_kernels.chips import HOPPER
from pallas_kernels.dispatch import UnsupportedError

TREE = np.array(
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], bool
)
ON_GPU = jax.default_backend() == "gpu"


# Index arithmetic


@pytest.mark.parametrize("window", [None, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("splits", [1, 3, 16])
def test_a_span_holds_the_blocks_with_visible_keys_and_tells_where_all_are(window, splits):
    rng = np.random.default_rng(0)
    size, keys = 500, 64
    start, begin = rng.integers(0, 700, size), rng.integers(0, 3, size) * 128
    end = np.minimum(begin + 128, rng.integers(0, 400, size))  # may lie before begin: nothing
    parts = [
        flash_gpu.span(start, begin, end, keys=keys, window=window, split=n, splits=splits)
        for n in range(splits)
    ]
    first, low, high, last = np.stack([np.stack([np.asarray(x) for x in p]) for p in parts], 1)
    assert (first <= low).all()
    assert (low <= high).all()
    assert (high <= last).all()
    for i in range(size):
        query = start[i] + np.arange(begin[i], end[i])[:, None]
        key = np.arange(1216)
        seen = (key <= query) & (True if window is None else key > query - window)
        blocks = seen.reshape(len(query), 19, keys)
        got = [n for a, b in zip(first[:, i], last[:, i], strict=True) for n in range(a, b)]
        assert got == np.flatnonzero(blocks.any((0, 2))).tolist()
        for a, b in zip(low[:, i], high[:, i], strict=True):
            assert blocks[:, a:b].all()
        if window is None:  # and no block is masked in vain, but for one at the diagonal
            assert sum(last[:, i] - high[:, i]) <= (len(query) - 1) // keys + 2


@pytest.mark.parametrize(
    ("programs", "steps", "want"),
    [(8, 128, 16), (64, 128, 2), (128, 128, 1), (8, 1, 1), (96, 2, 1)],
)
def test_as_many_splits_as_fill_the_card(programs, steps, want):
    assert splits_for(programs, steps, 132) == want


def test_row_words_of_a_chain_and_of_a_tree_with_a_window():
    chain = row_words(3, 2, None, None)
    assert chain.shape == (1, 2, 64)
    assert chain[0, :, :7].tolist() == [[1, 1, 3, 3, 7, 7, 0], [0, 0, 1, 1, 2, 2, 0]]
    tree = np.asarray(row_words(5, 1, jnp.asarray(TREE), 2))
    assert tree[0, 0, :5].tolist() == [1, 0b11, 0b101, 0b1010, 0b10100]
    assert row_words(32, 4, None, None).shape == (2, 2, 64)
    assert row_words(32, 1, None, None)[0, 0, 31] == -1  # all 32 bits


# Refusals


def avals(shape: tuple[int, ...], slots: int, num_kv: int, dtype: Any = jnp.bfloat16) -> tuple:
    """(q, k, start) of q's shape [B,T,N,H]."""
    kv = jax.ShapeDtypeStruct((shape[0], num_kv, slots, shape[3]), dtype)
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16 if dtype == jnp.int8 else dtype)
    return q, kv, jax.ShapeDtypeStruct((shape[0],), jnp.int32)


def prefill(q: Any, k: Any, v: Any, start: Any, num_new: Any, **given: Any) -> jax.Array:
    options = {"scale": q.shape[3] ** -0.5, "window": None, "softcap": None, "blocks": None}
    return attention_gpu(q, k, v, start, num_new, **(options | given))


def decode(q: Any, k: Any, v: Any, start: Any, num_new: Any, **given: Any) -> jax.Array:
    names = ("k_scale", "v_scale", "block_table", "ancestors", "window", "softcap", "blocks")
    options = {"scale": q.shape[3] ** -0.5} | dict.fromkeys(names)
    return cached_attention_gpu(q, k, v, start, num_new, **(options | given))


@pytest.mark.parametrize(
    ("op", "shape", "slots", "dtype", "given", "message"),
    [
        (prefill, (1, 128, 4, 128), 256, jnp.float32, {}, "q is float32"),
        (prefill, (1, 128, 4, 80), 256, jnp.bfloat16, {}, "H=80"),
        (prefill, (1, 128, 4, 128), 100, jnp.bfloat16, {}, "100 slots"),
        (prefill, (1, 128, 4, 128), 256, jnp.bfloat16, {"scale": -1.0}, "scale=-1.0"),
        (decode, (1, 33, 2, 128), 256, jnp.bfloat16, {}, "T up to 32"),
        (decode, (1, 32, 16, 128), 256, jnp.bfloat16, {}, "T \\* N / K up to 256"),
        (decode, (1, 32, 6, 256), 256, jnp.bfloat16, {}, "T \\* N / K up to 128 where H=256"),
        (decode, (1, 1, 2, 128), 256, jnp.int8, {}, "keys int8"),
        (decode, (1, 1, 2, 128), 48, jnp.bfloat16, {}, "48 slots"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(op, shape, slots, dtype, given, message):
    q, kv, start = avals(shape, slots, 2 if shape[2] == 2 else 1, dtype)
    with pytest.raises(UnsupportedError, match=message):
        jax.eval_shape(lambda *x: op(*x, **given), q, kv, kv, start, start)


# Lowering: layouts, shared memory and types are settled here, the rest by ptxas (below)

LLAMA8, LLAMA70, QWEN8 = (32, 8, 128), (64, 8, 128), (32, 8, 128)
GEMMA270M, SMOLLM2 = (4, 1, 256), (9, 3, 64)
PREFILLS = {
    "llama-3-8b": (LLAMA8, {}),
    "smollm2": (SMOLLM2, {}),
    "gemma-3-270m, window": (GEMMA270M, {"window": 512}),
    "gemma-2, softcap": ((16, 8, 128), {"softcap": 50.0, "window": 4096}),
}
DECODES = {
    "llama-3-8b, T=1": (LLAMA8, 1, {}),
    "llama-3-8b, T=8, int8": (LLAMA8, 8, {"int8": True}),
    "llama-3-70b, T=32": (LLAMA70, 32, {}),
    "smollm2, T=5, tree, paged": (SMOLLM2, 5, {"tree": True, "page": 128}),
    "gemma-3-270m, T=8, window, softcap": (GEMMA270M, 8, {"window": 512, "softcap": 30.0}),
}


def traced(op: Any, heads: tuple[int, int, int], tokens: int, given: dict, sharding: Any = None):
    """A call of `op` for abstract arguments, batch 2 and 8192 slots, traced."""
    given = dict(given)
    num_heads, num_kv, head_dim = heads
    page, int8, tree = (given.pop(name, None) for name in ("page", "int8", "tree"))
    slots, rows = (page, 2 * 8192 // page) if page else (8192, 2)
    shapes = {
        "q": ((2, tokens, num_heads, head_dim), jnp.bfloat16),
        "k": ((rows, num_kv, slots, head_dim), jnp.int8 if int8 else jnp.bfloat16),
        "start": ((2,), jnp.int32),
        "k_scale": ((rows, num_kv, slots), jnp.float32) if int8 else None,
        "block_table": ((2, 8192 // page), jnp.int32) if page else None,
        "ancestors": ((tokens, tokens), jnp.bool) if tree else None,
    }
    x = {n: jax.ShapeDtypeStruct(*s, sharding=sharding) for n, s in shapes.items() if s is not None}

    def call(x: dict[str, jax.Array]) -> jax.Array:
        extra = {n: x[n] for n in ("k_scale", "block_table", "ancestors") if n in x}
        if int8:
            extra["v_scale"] = x["k_scale"]
        return op(x["q"], x["k"], x["k"], x["start"], x["start"], **extra, **given)

    return jax.jit(call).trace(x)


CALLS = {f"prefill of {n}": (prefill, heads, 1000, given) for n, (heads, given) in PREFILLS.items()}
CALLS |= {f"{n}": (decode, *call) for n, call in DECODES.items()}


@pytest.mark.parametrize("name", CALLS)
def test_lowers_for_cuda(name):
    text = traced(*CALLS[name]).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or shutil.which("ptxas") is None,
    reason="needs jax-cuda13-plugin, jax-cuda13-pjrt and ptxas; no GPU",
)
@pytest.mark.parametrize("name", CALLS)
def test_compiles_for_an_h100_without_one(name):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    compiled = traced(*CALLS[name], sharding=sharding).lower().compile()
    assert "mosaic_gpu_v2" in compiled.as_text()


# Numerics


def case(shape, num_kv, slots, start, num_new, *, int8=False, page=None, tree=None, window=None):
    """Arguments of an op, NaN where slots hold nothing or what is behind every window, and what the
    oracle wants of them."""
    rng = np.random.default_rng(0)
    batch, _, _, head_dim = shape
    q = rng.standard_normal(shape).astype(jnp.bfloat16)
    k, v = rng.standard_normal((2, batch, num_kv, slots, head_dim)).astype(jnp.bfloat16)
    start, num_new = np.array(start, np.int32), np.array(num_new, np.int32)
    last = (start + num_new)[:, None] - 1
    position = last - (last - np.arange(slots)) % slots  # [B,S], the latest of each slot
    empty = position < (0 if window is None else np.maximum(start - window + 1, 0)[:, None])
    extra: dict[str, np.ndarray] = {}
    if int8:
        k, v = rng.integers(-127, 128, (2, *k.shape), dtype=np.int8)
        scales = rng.uniform(0.005, 0.03, (2, *k.shape[:3])).astype(np.float32)
        scales[:, np.broadcast_to(empty[:, None], k.shape[:3])] = np.nan
        extra |= {"k_scale": scales[0], "v_scale": scales[1]}
        dense = (oracle.dense(k, scales[0]), oracle.dense(v, scales[1]))
    else:
        k[np.broadcast_to(empty[:, None], k.shape[:3])] = np.nan
        v[np.broadcast_to(empty[:, None], k.shape[:3])] = np.nan
        dense = (k, v)
    if page is not None:
        table = rng.permutation(batch * slots // page).reshape(batch, -1).astype(np.int32)
        extra["block_table"] = table

        def paged(x: np.ndarray) -> np.ndarray:
            pages = np.moveaxis(x.reshape(batch, num_kv, -1, page, *x.shape[3:]), 2, 1)
            out = np.empty((table.size, *pages.shape[2:]), x.dtype)
            out[table] = pages
            return out

        k, v = paged(k), paged(v)
        extra |= {n: paged(extra[n]) for n in ("k_scale", "v_scale") if n in extra}
    if tree is not None:
        extra["ancestors"] = tree
    return (q, k, v, start, num_new), extra, dense


def error(op, given, shape, num_kv, slots, start, num_new, **kind) -> float:
    window = given.get("window")
    args, extra, dense = case(shape, num_kv, slots, start, num_new, window=window, **kind)
    out = np.asarray(
        op(*map(jnp.asarray, args), **{n: jnp.asarray(x) for n, x in extra.items()}, **given),
        np.float64,
    )
    assert np.isfinite(out).all()  # behind num_new too
    options = {n: given.get(n) for n in ("window", "softcap")} | {"ancestors": kind.get("tree")}
    want = oracle.attention(args[0], *dense, *args[3:], scale=shape[3] ** -0.5, **options)
    real = np.arange(shape[1]) < args[4][:, None]
    return oracle.relative_error(np.where(real[..., None, None], out, 0.0), want)


SMALL = HOPPER._replace(multiprocessors=2)  # two splits of a row and a kv head
ROWS_OF_A_BATCH = {
    # A query block behind num_new, and one on the way to it; NaN in the last block.
    "prefill": (prefill, {}, (1, 130, 1, 64), 1, 192, [62], [100], {}),
    # A ring: positions beyond its slots, blocks of which no query sees all keys.
    "prefill, ring": (
        prefill, {"window": 60, "softcap": 5.0}, (1, 128, 1, 64), 1, 192, [500], [128], {}
    ),
    # Up to the end of a block, and a row that is idle.
    "decode": (decode, {}, (2, 3, 2, 64), 1, 64, [61, 0], [3, 0], {}),
    "decode, two readers": (decode, {}, (1, 32, 4, 64), 1, 128, [70], [31], {}),
    "decode, tree, paged, window": (
        decode,
        {"window": 100, "blocks": SMALL},
        (1, 5, 2, 64), 1, 256, [190], [5],
        {"tree": TREE, "page": 64},
    ),
    "decode, tree, int8, softcap": (
        decode,
        {"softcap": 5.0},
        (1, 5, 2, 64), 1, 64, [50], [5],
        {"tree": TREE, "int8": True},
    ),
}  # fmt: skip


@pytest.fixture
def plain_products(monkeypatch):
    """The interpreter of jax 0.10 knows no wgmma of transposed memory, nor of registers.

    wgmma reads the way that copies write; a plain read needs a fence in front of the next copy.
    """

    def fenced(ref: Any) -> jax.Array:
        content = ref[...]
        plgpu.commit_smem()
        return content

    def scores(q: Any, k: Any, meanwhile: Any) -> jax.Array:
        score = jnp.dot(q[...], fenced(k).T, preferred_element_type=jnp.float32)
        meanwhile()
        return score

    def add_values(acc: jax.Array, weight: jax.Array, v: Any) -> jax.Array:
        return acc + jnp.dot(weight, fenced(v), preferred_element_type=jnp.float32)

    monkeypatch.setattr(flash_gpu, "scores", scores)
    monkeypatch.setattr(flash_gpu, "add_values", add_values)


@pytest.mark.skipif(ON_GPU, reason="on a GPU the kernels run themselves")
@pytest.mark.parametrize("name", ROWS_OF_A_BATCH)
def test_interpreted(name, plain_products):
    """Barriers, copies, masks and splits as the kernels have them, with race detection."""
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    op, given, *arguments, kind = ROWS_OF_A_BATCH[name]
    try:
        with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
            assert error(op, given, *arguments, **kind) < 1e-2
        assert not interpreter.get_races().races_found
    finally:
        interpreter.reset_gpu_interpret_mode_state()


@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", ROWS_OF_A_BATCH)
def test_on_a_gpu(name):
    op, given, *arguments, kind = ROWS_OF_A_BATCH[name]
    assert error(op, given, *arguments, **kind) < 1e-2


@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 32])
@pytest.mark.parametrize("start", [0, 63, 64, 65, 2000])
def test_on_a_gpu_at_llama_shapes(tokens, start):
    arguments = ((2, tokens, 32, 128), 8, 2048, [start, 7], [tokens, tokens // 2])
    assert error(decode, {}, *arguments) < 1e-2
    assert error(prefill, {}, *arguments) < 1e-2
    if tokens <= 16:
        assert error(decode, {}, *arguments, int8=True) < 2e-2


@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
@pytest.mark.parametrize("heads", [LLAMA8, LLAMA70, GEMMA270M, SMOLLM2, (6, 2, 192)])
@pytest.mark.parametrize("window", [None, 127, 128, 129])
def test_a_prefill_on_a_gpu(heads, window):
    num_heads, num_kv, head_dim = heads
    shape = (2, 384, num_heads, head_dim)
    assert error(prefill, {"window": window}, shape, num_kv, 1024, [300, 0], [384, 129]) < 1e-2
