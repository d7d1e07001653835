"""`matmul` against NumPy in float64, the TPU kernel with race detection."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import UnsupportedError, oracle
from pallas_kernels.chips import TPU
from pallas_kernels.matmul.api import matmul
from pallas_kernels.matmul.tpu import Cut, cut_of

BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
IMPLS = ["xla", "pallas_tpu"]
BLOCKS = TPU["v5e"]._replace(weight_bytes=1 << 15)  # small weights fall into several blocks


@pytest.fixture(autouse=True)
def _interpreted():
    """On CPU, as on a TPU: reads outside of an array are errors; what is not written is NaN."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    pltpu.reset_tpu_interpret_mode_state()


def pack(w):
    """[I/2,O] uint8 of [I,O] numbers -8 to 7."""
    return ((w[0::2] & 15) | (w[1::2] & 15) << 4).astype(np.uint8)


def check(rows, inputs, outputs, bits, group=None, dtype="float32", zeros=False, impl="pallas_tpu"):
    """Random numbers of these shapes; rows may be a tuple."""
    rng = np.random.default_rng(inputs + outputs)
    half = 1 << bits - 1
    w = rng.integers(-half, half, (inputs, outputs))
    scale = rng.uniform(0.5, 2, (inputs // (group or inputs), outputs)).astype(np.float32)
    zero = rng.uniform(-half, half, scale.shape).astype(np.float32) if zeros else None
    x = jnp.asarray(rng.normal(size=(*np.atleast_1d(rows), inputs)), dtype)
    stored = w.astype(np.int8) if bits == 8 else pack(w)
    on_device = None if zero is None else jnp.asarray(zero)
    got = matmul(
        x, jnp.asarray(stored), jnp.asarray(scale), zero=on_device, impl=impl, blocks=BLOCKS
    )
    assert got.dtype == x.dtype
    error = oracle.relative_error(np.asarray(got), oracle.matmul(x, w, scale, zero))
    assert error <= BOUND[dtype]
    assert impl == "xla" or not interpreter.races.races_found
    return error


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 32, 128])
def test_numbers(group, bits, dtype):
    check(3, 256, 256, bits, group, dtype)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("rows", [1, 8, 17])
def test_rows(rows, dtype):
    check(rows, 256, 128, 4, 32, dtype)


CASES = {
    "reference": {"rows": 3, "impl": "xla"},
    "reference, groups": {"rows": 3, "bits": 4, "group": 32, "dtype": "bfloat16", "impl": "xla"},
    "reference, zeros": {"rows": 3, "bits": 4, "group": 32, "zeros": True, "impl": "xla"},
    "zeros, fewer rows than a group has weights": {"rows": 8, "group": 32, "zeros": True},
    "zeros, more rows": {"rows": 40, "bits": 4, "group": 32, "zeros": True},
    "zeros, one scale an output": {"rows": 8, "bits": 4, "zeros": True},
    "zeros, bfloat16": {"rows": 8, "bits": 4, "group": 32, "zeros": True, "dtype": "bfloat16"},
    "more axes": {"rows": (2, 3, 4)},
    "no axis": {"rows": ()},
    "odd widths": {"rows": 8, "inputs": 576, "outputs": 192, "bits": 4, "group": 32},
    "a last block that sticks out": {"rows": 8, "inputs": 576, "outputs": 576},
    "blocks of inputs": {"rows": 8, "inputs": 1024, "outputs": 384, "group": 32},
    "rows that stick out of blocks": {"rows": 70, "inputs": 256, "outputs": 256, "group": 128},
    "one scale an output, many rows": {"rows": 70, "inputs": 128, "outputs": 256, "bits": 4},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cases(case):
    check(**{"inputs": 256, "outputs": 384, "bits": 8} | case)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_byte_holds_two_rows_low_bits_first_with_their_signs(impl):
    """Row i of x picks weight row i, so that the result is the weights themselves."""
    stored = np.arange(256, dtype=np.uint8)[None].repeat(8, axis=0)  # [8,256]: 16 inputs
    scale = np.arange(1, 257, dtype=np.float32)[None]
    got = matmul(jnp.eye(16), jnp.asarray(stored), jnp.asarray(scale), impl=impl)
    for byte in range(256):
        low, high = byte & 15, byte >> 4
        pair = [n - 16 if n > 7 else n for n in (low, high)]
        np.testing.assert_array_equal(got[:, byte], np.array(pair * 8) * (byte + 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [8, 32], ids=["scaled sums", "scaled weights"])
def test_every_int8_and_the_scale_of_its_own_group(impl, rows):
    w = (np.arange(256) + np.arange(32)[:, None]) % 256 - 128
    scale = np.arange(1, 513, dtype=np.float32).reshape(2, 256)
    x = np.roll(np.eye(32, dtype=np.float32), 12, axis=1)[:rows]  # row i picks weights i + 12
    got = matmul(jnp.asarray(x), jnp.asarray(w, jnp.int8), jnp.asarray(scale), impl=impl)
    np.testing.assert_array_equal(got, np.roll(w * scale.repeat(16, axis=0), -12, axis=0)[:rows])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "full"), [("float32", True), ("bfloat16", False)])
def test_float32_is_multiplied_in_full(dtype, full, impl):
    """A TPU rounds float32 factors to bfloat16 unless told otherwise; a CPU never does."""
    w, scale = jnp.ones((128, 128), jnp.int8), jnp.ones((1, 128))
    program = jax.make_jaxpr(lambda x: matmul(x, w, scale, impl=impl))(jnp.ones((8, 128), dtype))
    assert ("HIGHEST" in str(program)) == full


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_shape(data):
    draw = data.draw
    group = draw(st.sampled_from([None, 16, 32, 48, 128]))
    check(
        rows=draw(st.integers(1, 40)),
        inputs=draw(st.integers(1, 6)) * (group or 50),
        outputs=draw(st.one_of(st.integers(1, 130), st.sampled_from([256, 500]))),
        bits=draw(st.sampled_from([8, 4])),
        group=group,
        dtype=draw(st.sampled_from(list(BOUND))),
        zeros=draw(st.booleans()),
    )


@pytest.mark.parametrize(
    ("rows", "w", "groups", "cut"),
    [
        # All inputs at once where 256 outputs of them fit, so that x is fetched once.
        (8, ((4096, 14336), "int8"), 1, Cut(8, 4096, 256)),
        (8, ((2048, 14336), "uint8"), 128, Cut(8, 4096, 512)),
        # Else wide blocks, in whole tiles of 128 inputs and of 8 groups.
        (8, ((14336, 4096), "int8"), 1, Cut(8, 512, 2048)),
        (8, ((7168, 4096), "uint8"), 112, Cut(8, 1024, 2048)),
        (1024, ((4096, 4096), "int8"), 1, Cut(256, 512, 2048)),
        # 42 groups are no whole tiles.
        (64, ((5376, 4096), "int8"), 42, Cut(64, 5376, 128)),
        # Widths that are no tiles are taken whole.
        (8, ((576, 1536), "int8"), 18, Cut(8, 576, 1536)),
        (8, ((1536, 576), "int8"), 48, Cut(8, 1536, 576)),
    ],
)
def test_cut(rows, w, groups, cut):
    w = jax.ShapeDtypeStruct(*w)
    inputs = w.shape[0] * (2 if w.dtype == "uint8" else 1)
    x = jax.ShapeDtypeStruct((rows, inputs), "bfloat16")
    assert cut_of(x, w, groups, TPU["v5e"]) == cut


def test_every_core_has_a_block_of_outputs():
    """v5p has two; a width of one tile is not cut."""
    x, w = jax.ShapeDtypeStruct((8, 4096), "bfloat16"), jax.ShapeDtypeStruct((2048, 1024), "uint8")
    assert cut_of(x, w, 32, TPU["v5p"]) == Cut(8, 4096, 512)
    assert cut_of(x, w, 32, TPU["v5p"]._replace(cores=1)) == Cut(8, 4096, 1024)
    narrow = jax.ShapeDtypeStruct((4096, 192), "int8")
    assert cut_of(x, narrow, 1, TPU["v5p"]) == Cut(8, 4096, 192)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"x": ((8, 256), "float16")}, "x is float16"),
        ({"x": ((8, 255), "float32")}, r"x \(8, 255\)"),
        ({"x": ((8, 256), "float32"), "w": ((256, 128), "uint8")}, r"\[...,512\]"),
        ({"x": ((), "float32")}, r"x \(\)"),
        ({"x": ((0, 256), "float32")}, "no rows"),
        ({"w": ((256, 128), "int32")}, "w is int32"),
        ({"w": ((256, 128), "int4")}, "w is int4"),
        ({"w": ((256,), "int8")}, r"w \(256,\)"),
        ({"w": ((0, 128), "int8"), "x": ((8, 0), "float32")}, r"w \(0, 128\)"),
        ({"scale": ((3, 128), "float32")}, r"scale \(3, 128\)"),
        ({"scale": ((0, 128), "float32")}, r"scale \(0, 128\)"),
        ({"scale": ((128,), "float32")}, r"scale \(128,\)"),
        ({"scale": ((8, 1), "float32")}, r"scale \(8, 1\)"),
        ({"scale": ((8, 128), "bfloat16")}, "scale bfloat16"),
        ({"zero": ((8, 128), "float32")}, r"zero float32 \(8, 128\)"),
        ({"scale": ((64, 128), "float32")}, "one for 4 of 256 inputs"),
        ({"w": ((99_999, 128), "int8"), "x": ((8, 99_999), "float32")}, "multiples of 128"),
        ({"impl": "pallas_gpu"}, "impl='pallas_gpu'"),
    ],
)
def test_refusals_name_the_argument(change, names):
    default = {"x": ((8, 256), "float32"), "w": ((256, 128), "int8"), "impl": "pallas_tpu"}
    c = default | {"scale": ((1, 128), "float32")} | change
    x, w, scale = (jax.ShapeDtypeStruct(*c[n]) for n in ("x", "w", "scale"))
    zero = jax.ShapeDtypeStruct(*c["zero"]) if "zero" in c else None

    def call(x, w, scale, zero):
        return matmul(x, w, scale, zero=zero, impl=c["impl"])

    with pytest.raises(UnsupportedError, match=names) as error:
        jax.eval_shape(call, x, w, scale, zero)
    assert "\n" not in str(error.value)
