"""Products of int8 numbers are exact, however a platform gets at them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.quantize import project, quantize
from jaxinfer.recipes import make_recipe
from pallas_kernels import cached_attention
from pallas_kernels import whole_dot as module
from pallas_kernels.whole_dot import whole_dot

# Shapes of x and codes, and what is summed over and of a batch.
CASES = {
    "one row": ((1, 24), (40, 24), (((1,), (1,)), ((), ()))),
    "no row": ((0, 24), (40, 24), (((1,), (1,)), ((), ()))),
    "rows": ((9, 24), (40, 24), (((1,), (1,)), ((), ()))),
    "inputs first": ((3, 24), (24, 40), (((1,), (0,)), ((), ()))),
    "keys": ((6, 5, 24), (6, 40, 24), (((2,), (2,)), ((0,), (0,)))),
    "values": ((6, 1, 40), (6, 40, 24), (((2,), (1,)), ((0,), (0,)))),
    "rows before a batch": ((5, 7, 24), (7, 40, 24), (((2,), (2,)), ((1,), (0,)))),
    "two sums": ((4, 3, 24), (3, 40, 24), (((1, 2), (0, 2)), ((), ()))),
}


def numbers(case):
    a, b, dims = CASES[case]
    draw = partial(np.random.default_rng(0).integers, -128, 128, dtype=np.int8)
    return draw(a), draw(b), dims


def exact(x, codes, dims):
    wide = (jnp.asarray(v.astype(np.int32)) for v in (x, codes))
    return np.asarray(jax.lax.dot_general(*wide, dims))


@pytest.fixture(params=[False, True], ids=["no vnni", "vnni"])
def vnni(request, monkeypatch):
    monkeypatch.setattr(module, "_has_vnni", lambda: request.param)
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_every_way_is_exact(case, vnni):
    x, codes, dims = numbers(case)
    want = exact(x, codes, dims)
    product = partial(whole_dot, dims=dims)
    with jax.disable_jit():
        slow = product(x, codes)
    for got in (slow, product(x, codes), jax.jit(product)(x, codes)):
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, want)


def test_a_sum_that_wraps_around_comes_out_right(vnni):
    count = 70_000
    assert 255 * 127 * count > 2**31 > 127 * 127 * count
    x, codes = np.full((2, count), 127, np.int8), np.full((16, count), 127, np.int8)
    got = whole_dot(x, codes, (((1,), (1,)), ((), ())))
    np.testing.assert_array_equal(got, np.full((2, 16), 127 * 127 * count))


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (1, 2)])
def test_under_vmap(mapped, vnni):
    x, codes, dims = numbers("keys")
    many = [
        a if axis is None else np.stack([a, a[::-1], -a.clip(-127)], axis)
        for a, axis in zip((x, codes), mapped, strict=True)
    ]
    got = jax.vmap(lambda x, codes: whole_dot(x, codes, dims), in_axes=mapped)(*many)
    for i, one in enumerate(got):
        each = (
            a if axis is None else a.take(i, axis) for a, axis in zip(many, mapped, strict=True)
        )
        np.testing.assert_array_equal(one, exact(*each, dims))


def test_bytes_without_a_sign_are_for_a_cpu_that_has_them(vnni):
    x, codes, dims = numbers("rows")
    traced = jax.jit(lambda x, codes: whole_dot(x, codes, dims)).trace(x, codes)
    for platform in ("cpu", "tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        kind = "10x24xui8" if vnni and platform == "cpu" else "9x24xi8"
        assert f"(tensor<{kind}>, tensor<40x24xi8>) -> tensor" in text


def test_a_single_row_is_never_alone_on_a_cpu(vnni):
    x, codes, dims = numbers("one row")
    traced = jax.jit(lambda x, codes: whole_dot(x, codes, dims)).trace(x, codes)
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert f"(tensor<2x24x{'ui8' if vnni else 'i8'}>, tensor<40x24xi8>)" in text


@pytest.mark.parametrize("case", ["one row", "rows", "keys"])
def test_xla_does_not_widen_the_codes(case, monkeypatch):
    monkeypatch.setattr(module, "_has_vnni", lambda: True)
    x, codes, dims = numbers(case)
    device = jax.devices("cpu")[0]
    held = jax.device_put((x, codes), device)
    program = jax.jit(lambda x, codes: whole_dot(x, codes, dims)).lower(*held).compile()
    shape = ",".join(map(str, codes.shape))
    assert f"s8[{shape}]" in program.as_text()
    assert f"s32[{shape}]" not in program.as_text()


def both_ways(function, *args):
    """What it lowers to for a CPU, and its value, with VNNI and without."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cpu",)).as_text()
    return "ui8" in text, jax.jit(function)(*args)


@pytest.mark.parametrize("recipe", ["int8", "w8a8", "int4:channel"])
@pytest.mark.parametrize("rows", [1, 5])
def test_weights_are_multiplied_so(recipe, rows, monkeypatch):
    scheme = make_recipe(recipe, "cpu").scheme("a/kernel", 40, 24)
    weight = quantize(jax.random.normal(jax.random.key(0), (24, 40)), (0,), scheme)
    x = jax.random.normal(jax.random.key(1), (1, rows, 24))
    results = []
    for vnni in (False, True):
        monkeypatch.setattr(module, "_has_vnni", lambda vnni=vnni: vnni)
        jax.clear_caches()  # an outlined product is traced once
        used, y = both_ways(lambda x, w: project(x, w), x, weight)
        assert used == vnni
        results.append(y)
    np.testing.assert_array_equal(*results)


def test_a_cache_in_int8_is_read_so(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (
        jax.random.normal(key, (2, 3, n, 16)) for key, n in zip(keys[:3], (4, 2, 2), strict=True)
    )
    cached = [
        jax.random.randint(key, (2, 2, 128, 16), -127, 128).astype(jnp.int8) for key in keys[3:]
    ]
    start, num_new = jnp.array([100, 7]), jnp.array([3, 2])
    scales = jnp.full((2, 2, 128), 0.01)
    results = []
    for vnni in (False, True):
        monkeypatch.setattr(module, "_has_vnni", lambda vnni=vnni: vnni)

        def attend(q, k, v, a, b):
            options = {"k_scale": scales, "v_scale": scales, "whole": True, "impl": "xla"}
            return cached_attention(q, k, v, a, b, start, num_new=num_new, scale=0.25, **options)

        used, y = both_ways(attend, q, k, v, *cached)
        assert used == vnni
        results.append(y)
    np.testing.assert_array_equal(*results)


def test_what_a_machine_says_of_itself(tmp_path):
    for name, flags, has in (("a", "avx2 avx512_vnni", True), ("b", "avx512_vnni_not", False)):
        (tmp_path / name).write_text(f"flags\t\t: fpu {flags} pku\n")
        assert module._has_vnni(str(tmp_path / name)) == has
    assert not module._has_vnni(str(tmp_path / "none"))
