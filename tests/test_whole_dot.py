"""Products of int8 numbers are exact, however a platform gets at them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import whole_dot as rooms
from pallas_kernels.whole_dot import whole_dot

# Shapes of x and codes, and what is summed over and of a batch.
CASES = {
    "one row": ((1, 24), (40, 24), (((1,), (1,)), ((), ()))),
    "rows": ((9, 24), (40, 24), (((1,), (1,)), ((), ()))),
    "inputs first": ((3, 24), (24, 40), (((1,), (0,)), ((), ()))),
    "rows before groups": ((5, 7, 24), (7, 40, 24), (((2,), (2,)), ((1,), (0,)))),
    "one row of a batch": ((6, 1, 24), (6, 24, 16), (((2,), (1,)), ((0,), (0,)))),
    "two sums": ((4, 3, 24), (3, 40, 24), (((1, 2), (0, 2)), ((), ()))),
}


def numbers(case, seed=0):
    rng = np.random.default_rng(seed)
    a, b, dims = CASES[case]
    draw = partial(rng.integers, -128, 128, dtype=np.int8)
    return draw(a), draw(b), dims


def exact(x, codes, dims):
    wide = (jnp.asarray(v.astype(np.int32)) for v in (x, codes))
    return np.asarray(jax.lax.dot_general(*wide, dims))


@pytest.mark.parametrize("vnni", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_path_is_exact(case, vnni, monkeypatch):
    monkeypatch.setattr(rooms, "_has_vnni", lambda: vnni)
    x, codes, dims = numbers(case)
    want = exact(x, codes, dims)
    product = partial(whole_dot, dims=dims)
    for got in (product(x, codes), jax.jit(product)(x, codes)):
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, want)


def test_a_sum_that_wraps_around_on_its_way_comes_out_right(monkeypatch):
    monkeypatch.setattr(rooms, "_has_vnni", lambda: True)
    count = 70_000
    assert 255 * 127 * count > 2**31 > 127 * 127 * count
    x, codes = np.full((2, count), 127, np.int8), np.full((16, count), 127, np.int8)
    got = whole_dot(x, codes, (((1,), (1,)), ((), ())))
    np.testing.assert_array_equal(got, np.full((2, 16), 127 * 127 * count))


def test_bytes_without_a_sign_are_for_a_cpu_that_has_them(monkeypatch):
    x, codes, dims = numbers("rows")

    def lowered(vnni, platform):
        monkeypatch.setattr(rooms, "_has_vnni", lambda: vnni)
        traced = jax.jit(lambda x, codes: whole_dot(x, codes, dims)).trace(x, codes)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "(tensor<10x24xui8>, tensor<40x24xi8>) -> tensor<10x40xi32>" in lowered(True, "cpu")
    for vnni, platform in ((False, "cpu"), (True, "tpu"), (True, "cuda")):
        text = lowered(vnni, platform)
        assert "(tensor<9x24xi8>, tensor<40x24xi8>) -> tensor<9x40xi32>" in text
        assert "ui8" not in text


def test_one_row_is_never_alone_on_a_cpu(monkeypatch):
    x, codes, dims = numbers("one row")
    for vnni, rows in ((False, "tensor<2x24xi8>"), (True, "tensor<2x24xui8>")):
        monkeypatch.setattr(rooms, "_has_vnni", lambda vnni=vnni: vnni)
        text = jax.jit(lambda x, codes: whole_dot(x, codes, dims)).lower(x, codes).as_text()
        assert f"({rows}, tensor<40x24xi8>)" in text


def test_under_vmap(monkeypatch):
    monkeypatch.setattr(rooms, "_has_vnni", lambda: True)
    x, codes, dims = numbers("rows")
    many = np.stack([x, x[::-1]])
    want = np.stack([exact(one, codes, dims) for one in many])
    np.testing.assert_array_equal(jax.vmap(lambda x: whole_dot(x, codes, dims))(many), want)


def test_what_a_machine_says_of_itself(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("flags\t\t: fpu avx2 avx512_vnni_not avx512f\n")
    assert not rooms._has_vnni(str(file))
    assert not rooms._has_vnni(str(tmp_path / "none"))
    other = tmp_path / "other"
    other.write_text("flags\t\t: fpu avx512_vnni\n")
    assert rooms._has_vnni(str(other))
