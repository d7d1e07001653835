"""The self-check: what it covers, what it prints, when it fails."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pallas_kernels import check
from pallas_kernels.case import MODELS, size_of


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """No environment of libtpu's for the tests that follow; nothing compiled for TPUs."""
    monkeypatch.setattr(check.os, "environ", {})
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)


def test_every_op_at_every_model():
    cases = check.all_cases()
    assert len({(c.op, c.name) for c in cases}) == len(cases)
    for op in ("attention", "cached_attention", "cache_update", "matmul"):
        for model in MODELS:
            assert any(c.op == op and model in c.name for c in cases), (op, model)
    for case in cases:  # shapes alone; a call reads its arguments at most a few times over
        assert 0 < case.nbytes < 3 * size_of(case.shapes()) + (64 << 20), case.name


def test_prints_a_row_a_shape(capsys):
    assert check.main(["--only", "smollm2-135m, T=8"]) == 0
    out = capsys.readouterr().out
    assert "not compiled for TPU: pip install libtpu" in out
    rows = [line for line in out.splitlines() if "smollm2-135m, T=8" in line]
    assert [row.split()[0] for row in rows] == ["cached_attention", "cache_update"]
    assert out.rstrip().endswith("ok")


def test_fails_where_a_kernel_falls_short(capsys, monkeypatch):
    (case,) = check.all_cases("cached_attention, smollm2-135m, T=1")
    monkeypatch.setattr(check, "all_cases", lambda only: [dataclasses.replace(case, bound=1e-9)])
    assert check.main(["--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"]
    assert 1e-9 < told["rows"][0]["error"] < 1e-2


def test_a_verify_may_not_read_the_cache_twice():
    rows = [
        {"shape": f"m, T={t}", "cache bytes": {"v5e": read, "v6e": 100}}
        for t, read in ((1, 100), (8, 200))
    ]
    assert list(check.verify_ratios(rows)) == [("m, T=8", 2.0)]


@pytest.mark.parametrize(
    ("flags", "names"), [(["--only", "gpt-5"], "--only"), (["--device"], "--device")]
)
def test_questions_that_make_no_sense_here(flags, names, capsys):
    assert check.main(flags) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert names in said.err
    assert not said.out
