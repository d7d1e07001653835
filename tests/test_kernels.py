"""The attention kernels against float64, with race detection and poison where no token lies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import UnsupportedError, attention, cache_update, cached_attention, oracle
from pallas_kernels.cached_attention.tpu import cache_bytes
from pallas_kernels.chips import TPU
from pallas_kernels.flash_tpu import Tiling, visited

BLOCKS = TPU["v5e"]._replace(kv_bytes=1, query_rows=32, prefill_keys=128)  # the smallest blocks
BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
TREE = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)


@pytest.fixture(autouse=True)
def _interpreted():
    """On CPU, as on a TPU: reads outside of an array, and races, are errors."""
    params = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise")
    with pltpu.force_tpu_interpret_mode(params):
        yield
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    races = interpreter.races
    assert races is None or not races.races_found


def problem(
    *, start, num_new, tokens, heads, kv, slots, width, dtype="float32", poison=np.nan, seed=0
):
    """q [B,T,N,H] and k, v [B,K,S,H]; padding, and slots that hold no token, are poison."""
    rng = np.random.default_rng(seed)
    start, num_new = np.array(start, np.int32), np.array(num_new, np.int32)
    q = rng.normal(size=(len(start), tokens, heads, width))
    k, v = rng.normal(size=(2, len(start), kv, slots, width))
    for b, end in enumerate(start + num_new):
        dead = np.setdiff1d(np.arange(slots), np.arange(max(0, end - slots), end) % slots)
        k[b][:, dead] = v[b][:, dead] = poison
        q[b, num_new[b] :] = poison
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    return q, k, v, jnp.asarray(start), jnp.asarray(num_new)


def want(q, k, v, start, num_new, **options):
    f = [np.asarray(x, np.float64) for x in (q, k, v)]
    return oracle.attention(*f, np.asarray(start), np.asarray(num_new), **options)


def check(got, q, k, v, start, num_new, bound=None, **options):
    expected = want(q, k, v, start, num_new, **options)
    real = np.arange(q.shape[1]) < np.asarray(num_new)[:, None]
    assert oracle.relative_error(np.asarray(got)[real], expected[real]) <= (
        bound or BOUND[str(q.dtype)]
    )
    assert not np.asarray(got, np.float32)[~real].any()  # behind num_new: nothing


DECODE = {
    "empty rows, one token, a full cache": {"start": [0, 0, 255], "num_new": [0, 1, 1]},
    "before, at and behind a block's edge": {"start": [126, 127, 128], "num_new": [1, 1, 1]},
    "ragged verify": {"start": [0, 120, 250], "num_new": [8, 3, 6], "tokens": 8},
    "a block's edge inside the draft": {"start": [127, 119, 121], "num_new": [8] * 3, "tokens": 8},
    "one kv head": {"start": [9], "num_new": [5], "tokens": 5, "kv": 1},
    "every head its own": {"start": [200], "num_new": [4], "tokens": 4, "heads": 2},
    "nine heads over three": {"start": [99], "num_new": [2], "tokens": 2, "heads": 9, "kv": 3},
    "wide heads": {"start": [130, 5], "num_new": [3, 2], "tokens": 3, "width": 256},
    "softcap": {"start": [40], "num_new": [4], "tokens": 4, "softcap": 5.0},
    "bfloat16": {"start": [0, 131], "num_new": [6, 2], "tokens": 6, "dtype": "bfloat16"},
    "bfloat16, 128 wide": {"start": [140], "num_new": [2], "tokens": 2, "width": 128}
    | {"dtype": "bfloat16"},
    "thirty-two tokens": {"start": [100], "num_new": [32], "tokens": 32},
}


@pytest.mark.parametrize("case", DECODE.values(), ids=DECODE)
def test_cached_attention(case):
    case = {"tokens": 1, "heads": 4, "kv": 2, "slots": 256, "width": 64} | case
    options = {"scale": 0.1, "window": None, "softcap": case.pop("softcap", None)}
    x = problem(**case)
    got = run(*x, **options)
    check(got, *x, **options)


def run(q, k, v, start, num_new, blocks=BLOCKS, **options):
    return cached_attention(
        q, None, None, k, v, start, num_new=num_new, impl="pallas_tpu", blocks=blocks, **options
    )


@pytest.mark.parametrize("tokens", range(1, 10))
def test_every_length_of_a_block(tokens):
    x = problem(
        start=[125, 0],
        num_new=[tokens, tokens - 1],
        tokens=tokens,
        heads=4,
        kv=2,
        slots=256,
        width=64,
    )
    check(run(*x, scale=0.1), *x, scale=0.1)


@pytest.mark.parametrize("window", [99, 100, 101])
@pytest.mark.parametrize("start", [[98, 99, 100], [255, 256, 1000]], ids=["filling", "wrapped"])
def test_window_over_a_ring(window, start):
    """The float64 reference goes by positions, so that a window of W-1 or W+1 shows."""
    x = problem(start=start, num_new=[4, 1, 4], tokens=4, heads=4, kv=2, slots=256, width=64)
    got = run(*x, scale=0.1, window=window)
    check(got, *x, scale=0.1, window=window)
    others = [want(*x, scale=0.1, window=w)[0] for w in (window - 1, window + 1)]
    if start[0] >= window:
        assert min(np.abs(np.asarray(got)[0] - other).max() for other in others) > 1e-3


@pytest.mark.parametrize("window", [None, 3])
def test_tree(window):
    x = problem(start=[125, 0], num_new=[4, 4], tokens=4, heads=4, kv=2, slots=256, width=64)
    got = run(*x, scale=0.1, window=window, ancestors=jnp.asarray(TREE))
    check(got, *x, scale=0.1, window=window, ancestors=TREE)
    chain = np.tril(np.ones((4, 4), bool))
    np.testing.assert_allclose(
        run(*x, scale=0.1, window=window, ancestors=jnp.asarray(chain)),
        run(*x, scale=0.1, window=window),
        atol=1e-6,
    )


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_split_over_the_cache(cores):
    blocks = BLOCKS._replace(cores=cores)
    x = problem(
        start=[0, 100, 380], num_new=[0, 2, 4], tokens=4, heads=4, kv=1, slots=384, width=64
    )
    check(run(*x, scale=0.1, blocks=blocks._replace(cores=3 * cores)), *x, scale=0.1)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("width", [64, 128])
def test_int8_cache(dtype, width):
    """Against the same float64 reference on the dequantized cache."""
    q, k, v, start, num_new = problem(
        start=[127, 3], num_new=[3, 2], tokens=3, heads=4, kv=2, slots=256, width=width,
        dtype=dtype, poison=0,
    )  # fmt: skip
    numbers, scales = zip(*(quantized(x) for x in (k, v)), strict=True)
    for s in scales:  # a scale where there is no token may be anything
        s[0, :, 130:] = np.nan
    got = run(
        q, *map(jnp.asarray, numbers), start, num_new, scale=0.1,
        k_scale=jnp.asarray(scales[0]), v_scale=jnp.asarray(scales[1]),
    )  # fmt: skip
    dense = [np.nan_to_num(oracle.dense(n, s)) for n, s in zip(numbers, scales, strict=True)]
    check(got, q, *dense, start, num_new, scale=0.1, bound=2e-2 if dtype == "bfloat16" else 1e-5)


def quantized(x):
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axis=-1) / 127 + 1e-9
    return np.round(x / scale[..., None]).astype(np.int8), scale


@pytest.mark.parametrize("slots", [100, 128, 512])  # a long sum is taken in pieces
@pytest.mark.parametrize("beside", [False, True], ids=["held", "beside"])
def test_int8_cache_by_whole_numbers(slots, beside):
    """The reference's fast way on a CPU: 15 bits of a query and of a weight."""
    x = problem(
        start=[slots - 5, 3], num_new=[3, 3], tokens=3, heads=4, kv=2, slots=slots, width=64,
        poison=0,
    )  # fmt: skip
    q, k, v, start, num_new = x
    numbers, scales = zip(*(quantized(y) for y in (k, v)), strict=True)
    dense = [oracle.dense(n, s) for n, s in zip(numbers, scales, strict=True)]
    new = (None, None)
    if beside:
        at = np.asarray(start)[:, None] + np.arange(3)
        new = (np.stack([y[b][:, at[b]].swapaxes(0, 1) for b in range(2)]) for y in dense)
        new = tuple(jnp.asarray(y, jnp.float32) for y in new)
    held = [jnp.asarray(y) for y in (*numbers, *scales)]

    def run(k_cache, v_cache, **options):
        got = cached_attention(
            q, *new, k_cache, v_cache, start, scale=0.1, impl="xla", whole=True, **options
        )
        return np.asarray(got)

    got = run(*held[:2], k_scale=held[2], v_scale=held[3])
    expected = want(q, *dense, start, num_new, scale=0.1)
    assert 1e-6 < oracle.relative_error(got, expected) <= 1e-4  # widened it is 1e-7
    if not beside and slots % 128 == 0:
        page, count = 64, slots // 64
        pages = [np.asarray(y).reshape(4, count, page, *y.shape[3:]) for y in held]
        pages = [y.reshape(2, 2, *y.shape[1:]).swapaxes(1, 2) for y in pages]
        pages = [jnp.asarray(y.reshape(2 * count, *y.shape[2:])) for y in pages]
        table = jnp.arange(2 * count, dtype=jnp.int32).reshape(2, count)
        options = {"k_scale": pages[2], "v_scale": pages[3], "block_table": table}
        np.testing.assert_array_equal(run(*pages[:2], **options), got)


@pytest.mark.parametrize("page", [64, 128])
def test_paged_cache(page):
    q, k, v, start, num_new = problem(
        start=[120, 3, 0], num_new=[3, 2, 0], tokens=3, heads=4, kv=2, slots=256, width=64
    )
    count = 256 // page
    table = np.random.default_rng(1).permutation(3 * count + 2)[: 3 * count].reshape(3, count)
    pages = [np.full((3 * count + 2, 2, page, 64), np.nan, np.float32) for _ in range(2)]
    for stored, x in zip(pages, (k, v), strict=True):
        for b, i in np.ndindex(table.shape):
            stored[table[b, i]] = x[b, :, i * page : (i + 1) * page]
    got = run(
        q, *map(jnp.asarray, pages), start, num_new, scale=0.1,
        block_table=jnp.asarray(table, jnp.int32),
    )  # fmt: skip
    check(got, q, k, v, start, num_new, scale=0.1)


XLA = {
    "up to the end of the cache": {"start": [253, 60], "num_new": [3, 8], "tokens": 8},
    "more tokens than slots": {"start": [0, 0], "num_new": [200, 0], "tokens": 300},
    "a ring": {"start": [1000, 30], "num_new": [4, 4], "tokens": 4, "window": 100},
    "softcap": {"start": [40, 9], "num_new": [4, 1], "tokens": 4, "softcap": 5.0},
}


@pytest.mark.parametrize("case", XLA.values(), ids=XLA)
def test_the_reference_too(case):
    """Slots that hold nothing must be finite there; they may be anything else."""
    case = {"heads": 4, "kv": 2, "slots": 256, "width": 64, "poison": 1e3} | case
    options = {"scale": 0.1, "window": case.pop("window", None)}
    options["softcap"] = case.pop("softcap", None)
    q, k, v, start, num_new = x = problem(**case)
    real = np.arange(q.shape[1]) < np.asarray(num_new)[:, None]
    expected = want(*x, **options)[real]
    for got in (
        cached_attention(q, None, None, k, v, start, num_new=num_new, impl="xla", **options),
        attention(*x, impl="xla", **options),
    ):
        assert np.isfinite(np.asarray(got)).all()
        assert oracle.relative_error(np.asarray(got)[real], expected) <= 1e-5


PREFILL = {
    "from nothing, ragged": {"start": [0, 0, 0], "num_new": [70, 33, 0]},
    "a later piece": {"start": [57, 128], "num_new": [70, 1]},
    "window": {"start": [0, 100], "num_new": [70, 33], "window": 20},
    "window over a ring": {"start": [1000, 300], "num_new": [70, 70], "window": 64},
    "softcap, nine heads": {"start": [3], "num_new": [69], "softcap": 5.0, "heads": 9, "kv": 3},
    "bfloat16": {"start": [0, 60], "num_new": [70, 50], "dtype": "bfloat16", "width": 128},
    "wide heads, one kv": {"start": [0], "num_new": [66], "width": 256, "kv": 1},
}


@pytest.mark.parametrize("case", PREFILL.values(), ids=PREFILL)
def test_attention(case):
    case = {"tokens": 70, "heads": 4, "kv": 2, "slots": 256, "width": 64} | case
    options = {"scale": 0.1, "window": case.pop("window", None)}
    options["softcap"] = case.pop("softcap", None)
    x = problem(**case)
    check(attention(*x, impl="pallas_tpu", blocks=BLOCKS, **options), *x, **options)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_shape(data):
    """Both ops: shapes, lengths and windows as they come."""
    draw = data.draw
    tokens = draw(st.sampled_from([1, 2, 7, 8, 17, 40]))
    groups, kv = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    ring = draw(st.booleans())
    window = draw(st.integers(1, 150)) if ring else None
    slots = draw(st.sampled_from([40, 128, 200, 384]))
    slots = max(slots, -(-(tokens + (window or 0)) // 128) * 128)
    limit = 3 * slots if ring else slots - tokens
    start = [draw(st.integers(0, limit)) for _ in range(2)]
    num_new = [draw(st.integers(0, tokens)) for _ in range(2)]
    x = problem(
        start=start, num_new=num_new, tokens=tokens, heads=groups * kv, kv=kv, slots=slots,
        width=draw(st.sampled_from([64, 128])),
    )  # fmt: skip
    options = {"scale": 0.1, "window": window}
    if tokens <= 32:
        check(run(*x, **options), *x, **options)
    check(attention(*x, impl="pallas_tpu", blocks=BLOCKS, **options), *x, **options)


UPDATE = {
    "ends in the block it began in": {"start": [3, 127], "num_new": [256, 130], "tokens": 256}
    | {"slots": 256},
    "idle rows first and last": {"start": [7, 9, 250], "num_new": [0, 4, 0], "tokens": 4}
    | {"slots": 256},
    "more tokens than slots": {"start": [0, 3], "num_new": [100, 7], "tokens": 200, "slots": 128},
    "nothing new": {"start": [7, 9], "num_new": [0, 0], "tokens": 4, "slots": 256},
    "a token a row": {"start": [0, 15, 127], "num_new": [1, 1, 0], "tokens": 1, "slots": 128},
    "ragged": {"start": [0, 15, 120], "num_new": [8, 3, 8], "tokens": 8, "slots": 128},
    "wraps around": {"start": [1021, 126], "num_new": [8, 5], "tokens": 8, "slots": 128},
    "a prompt": {"start": [0, 250], "num_new": [150, 101], "tokens": 150, "slots": 512},
    "a prompt, wrapped": {"start": [500, 1], "num_new": [150, 0], "tokens": 150, "slots": 512},
    "no multiple of a tile": {"start": [38, 1], "num_new": [20, 7], "tokens": 20, "slots": 40},
    "pages": {"start": [55, 1], "num_new": [20, 7], "tokens": 20, "slots": 64, "pages": 4},
    "pages, wide": {"start": [55, 1], "num_new": [20, 7], "tokens": 20, "slots": 64, "pages": 4}
    | {"width": 128},
    "wide": {"start": [15, 127], "num_new": [9, 1], "tokens": 9, "slots": 128, "width": 128},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("case", UPDATE.values(), ids=UPDATE)
def test_cache_update_sets_its_slots_and_no_other_bit(case, dtype):
    case = {"width": 64, "pages": None} | case
    start, num_new = (np.array(case[x], np.int32) for x in ("start", "num_new"))
    batch, tokens, slots, count = len(start), case["tokens"], case["slots"], case["pages"]
    rng = np.random.default_rng(0)
    rows = batch if count is None else batch * count + 1
    table = None if count is None else rng.permutation(rows)[: batch * count].reshape(batch, count)

    def draw(*shape):
        return rng.integers(-128, 128, shape).astype(np.float32)

    caches = [draw(rows, 2, slots, case["width"]), draw(rows, 2, slots)]
    new = [draw(batch, tokens, 2, case["width"]), draw(batch, tokens, 2)]
    for x in new:
        for b in range(batch):
            x[b, num_new[b] :] = 99 if dtype == "int8" else np.nan
    kinds = (dtype, "float32")  # numbers, and a scale a slot
    given_ = [
        tuple(jnp.asarray(x, t) for x, t in zip(y, kinds, strict=True)) for y in (caches, new)
    ]
    for b, n in enumerate(num_new):  # what it means, one token at a time
        for t in range(n):
            p = start[b] + t
            row = b if table is None else table[b, p // slots]
            for cache, x in zip(caches, new, strict=True):
                cache[row, :, p % slots] = x[b, t]
    on_device = None if table is None else jnp.asarray(table, jnp.int32)
    for impl in ("pallas_tpu", "xla"):
        got = cache_update(
            *given_, jnp.asarray(start), jnp.asarray(num_new), block_table=on_device, impl=impl
        )
        for g, cache in zip(got, caches, strict=True):
            np.testing.assert_array_equal(np.asarray(g, np.float32), cache)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_update(data):
    """Against the scatter, which the test before holds to its meaning."""
    draw = data.draw
    slots = draw(st.sampled_from([40, 128, 256, 384]))
    tokens = draw(st.integers(1, slots))
    rng = np.random.default_rng(0)
    kind, width = draw(st.sampled_from(["float32", "bfloat16"])), draw(st.sampled_from([64, 128]))
    caches = (jnp.asarray(rng.normal(size=(3, 2, slots, width)), kind),)
    new = (jnp.asarray(rng.normal(size=(3, tokens, 2, width)), kind),)
    start = jnp.array([draw(st.integers(0, 3 * slots)) for _ in range(3)], jnp.int32)
    num_new = jnp.array([draw(st.integers(0, tokens)) for _ in range(3)], jnp.int32)
    got, want = (
        cache_update(caches, new, start, num_new, impl=impl)[0] for impl in ("pallas_tpu", "xla")
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("idle", [0, 1])
def test_an_idle_row_may_share_the_page_that_another_writes(idle):
    start, num_new = jnp.array([3, 3]), jnp.array([1, 1]).at[idle].set(0)
    pages, new = jnp.zeros((2, 1, 64, 128)), jnp.ones((2, 1, 1, 128))
    table = jnp.zeros((2, 1), jnp.int32)
    (got,) = cache_update((pages,), (new,), start, num_new, block_table=table, impl="pallas_tpu")
    assert float(got.sum()) == 128


def test_a_ring_may_hold_anything_behind_the_window():
    options = {"scale": 0.1, "window": 100}
    q, k, v, start, num_new = problem(
        start=[1000, 513], num_new=[4, 4], tokens=4, heads=4, kv=2, slots=256, width=64
    )
    want = np.asarray(run(q, k, v, start, num_new, **options))
    for b, s in enumerate((1000, 513)):
        k, v = (x.at[b, :, np.arange(s - 240, s - 99) % 256].set(np.nan) for x in (k, v))
    np.testing.assert_array_equal(run(q, k, v, start, num_new, **options), want)
    many = jnp.repeat(q, 10, axis=1)[:, :36]
    more = attention(many, k, v, start, num_new, impl="pallas_tpu", blocks=BLOCKS, **options)
    assert np.isfinite(np.asarray(more)).all()


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_a_token_has_the_same_bits_whatever_comes_with_it(cores):
    """Exact mode: the query at one position, fed alone and behind others, over a block's edge."""
    blocks = BLOCKS._replace(cores=cores)
    q, k, v, _, _ = problem(
        start=[380], num_new=[4], tokens=8, heads=4, kv=1, slots=384, width=64, poison=0.5
    )
    for position in (255, 256):
        rows = []
        for ahead in (0, 1, 7):  # how many tokens of the call come before it
            shifted = jnp.roll(q, ahead, axis=1)
            start, num = jnp.array([position - ahead]), jnp.array([ahead + 1])
            got = run(shifted, k, v, start, num, scale=0.1, blocks=blocks)
            rows.append(np.asarray(got)[0, ahead])
        for row in rows[1:]:
            np.testing.assert_array_equal(row, rows[0])


def test_float32_is_multiplied_in_full():
    """A TPU rounds float32 factors to bfloat16 unless told otherwise; a CPU never does."""
    q, cache = jnp.ones((1, 4, 4, 64)), jnp.ones((1, 2, 128, 64))
    start, tree = jnp.zeros((1,), jnp.int32), jnp.asarray(TREE)
    num_new, rows = start + 4, jnp.ones((1, 4, 2, 64))
    calls = (
        lambda x: run(q, x, x, start, num_new, scale=1.0, ancestors=tree),
        lambda x: cache_update((x,), (rows,), start, num_new, impl="pallas_tpu"),
    )
    for call in calls:
        program = jax.make_jaxpr(call)(cache)
        text = str(program)
        assert text.count("dot_general") == text.count("precision=(Precision.HIGHEST") > 0


def test_reads_no_block_that_no_query_sees():
    """What a call copies from the cache, by its own index map over its grid."""
    shape = jax.ShapeDtypeStruct
    cache, start = shape((2, 8, 8192, 128), jnp.bfloat16), jnp.array([5000, 8000])
    slot = 2 * 8 * 128 * 2  # bytes of the keys and values of a position

    def read(tokens, window=None, cores=1, start=start):
        q, num_new = shape((2, tokens, 32, 128), jnp.bfloat16), jnp.full((2,), tokens)
        blocks = TPU["v6e"]._replace(cores=cores)
        return cache_bytes(q, cache, start, num_new, window=window, blocks=blocks)

    for cores in (1, 4):
        assert 13000 * slot <= read(1, cores=cores) <= (13000 + 2 * 512) * slot
        assert read(8, cores=cores) <= 1.1 * read(1, cores=cores)
    assert 2 * 1024 * slot <= read(1, window=1024) <= 2 * (1024 + 2 * 256) * slot
    assert read(8, window=1024) <= 1.1 * read(1, window=1024)
    assert read(1, start=jnp.array([0, 0])) <= 2 * 512 * slot
    long = Tiling(heads=1, tokens=128, keys=128, blocks=16, steps=16, splits=1, lanes=False)
    assert [int(visited(0, 300, i, long, None)[1]) for i in range(4)] == [1, 2, 3, 0]


GOOD = {"q": (2, 4, 4, 64), "k_cache": (2, 2, 256, 64)}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"q": (2, 33, 4, 64)}, "1 to 32"),
        ({"q": (2, 4, 4, 80), "k_cache": (2, 2, 256, 80)}, "H=80"),
        ({"dtype": "float16"}, "float16"),
        ({"k_cache": (2, 2, 300_000, 64)}, "multiple of 128"),
        ({"block_table": (2, 4), "k_cache": (9, 2, 40, 64)}, "pages of 40"),
        ({"k": True}, "cache_update"),
        ({"impl": "mosaic"}, "impl='mosaic'"),
        ({"num_new": (3,)}, "num_new"),
        ({"ancestors": (3, 4)}, "ancestors"),
        ({"cache_dtype": "int8"}, "scales"),
        ({"q": (2, 0, 4, 64)}, "no axis may be empty"),
        ({"whole": True}, "whole: an int8 cache"),
    ],
)
def test_refusals_name_the_argument(change, names):
    c = GOOD | {"dtype": "float32", "impl": "pallas_tpu"} | change
    cache = jax.ShapeDtypeStruct(c["k_cache"], c.get("cache_dtype", c["dtype"]))
    q = jax.ShapeDtypeStruct(c["q"], c["dtype"])
    new = jax.ShapeDtypeStruct((2, 4, 2, 64), c["dtype"]) if "k" in c else None
    ints = {n: jax.ShapeDtypeStruct(c[n], "int32") for n in ("num_new", "block_table") if n in c}
    if "ancestors" in c:
        ints["ancestors"] = jax.ShapeDtypeStruct(c["ancestors"], "bool")
    start = jax.ShapeDtypeStruct((2,), "int32")

    def call(q, new, cache, start, ints):
        options = {n: c[n] for n in ("impl", "whole") if n in c}
        return cached_attention(q, new, new, cache, cache, start, scale=1.0, **options, **ints)

    with pytest.raises(UnsupportedError, match=names) as error:
        jax.eval_shape(call, q, new, cache, start, ints)
    assert "\n" not in str(error.value)


def test_auto_falls_back_aloud_and_once(monkeypatch, caplog):
    """Where the platform's own backend does not cover the call."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    q, cache, start = jnp.ones((1, 1, 2, 80)), jnp.ones((1, 1, 128, 80)), jnp.zeros((1,), jnp.int32)
    for _ in range(2):
        got = cached_attention(q, None, None, cache, cache, start, scale=1.0)
    assert got.shape == q.shape
    lines = [r.message for r in caplog.records if r.name == "pallas_kernels"]
    assert len(lines) == 1
    assert lines[0].startswith("cached_attention: xla instead of pallas_tpu: H=80")
