"""Runs every kernel at every named shape through what this machine can do, and prints a table.

  python -m pallas_kernels.check                   numbers, interpreted; compiled for every TPU chip
  python -m pallas_kernels.check --device          on the accelerator here: numbers, time, bytes
  python -m pallas_kernels.check --only llama --json

Exit code 1 where a kernel falls short, 2 where the question makes no sense here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pallas_kernels import oracle, timing, tpu_aot
from pallas_kernels.attention import specs as attention
from pallas_kernels.cache_update import specs as cache_update
from pallas_kernels.cached_attention import specs as cached_attention
from pallas_kernels.case import Args, Case, size_of
from pallas_kernels.chips import TPU, Blocks
from pallas_kernels.dispatch import Impl, UnsupportedError
from pallas_kernels.matmul import specs as matmul

ROOMS = (attention, cached_attention, cache_update, matmul)
COPY_SHARE = 0.85  # of a device's copy bandwidth, that cached attention reaches
ENOUGH = 64 << 20  # bytes, for it to show
CUDNN_SHARE = 0.9  # of the speed of cuDNN, that prefill reaches on a GPU
SMALL = TPU["v5e"]._replace(kv_bytes=1, query_rows=32, prefill_keys=128)  # to interpret
SPARE = 1.1  # a verify of 8 tokens may read so many times what a decode reads
Row = dict[str, Any]


def all_cases(only: str = "") -> list[Case]:
    """Every case of every op whose "op, name" matches the regular expression `only`."""
    found = [case for room in ROOMS for case in room.cases()]
    return [case for case in found if re.search(only, f"{case.op}, {case.name}")]


def error_of(case: Case, impl: Impl, blocks: Blocks | None = None) -> float:
    """Greatest error against float64, relative to the greatest number; at a shape cut down."""
    args = _drawn(case, True)
    return _distance(_run(case, impl, args, blocks), case.oracle(jax.tree.map(_numpy, args)))


def difference_to_xla(case: Case, impl: Impl) -> float:
    """The same against "xla", at the real shape."""
    return _distance(*(_run(case, i, _drawn(case, False)) for i in (impl, "xla")))


def _drawn(case: Case, small: bool) -> Args:
    args: Args = jax.jit(lambda key: case.draw(key, small))(jax.random.key(0))
    return args


def _run(case: Case, impl: Impl, args: Args, blocks: Blocks | None = None) -> Any:
    return jax.jit(lambda args: case.run(args, impl, blocks))(args)


def _numpy(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype("float32") if x.dtype == "bfloat16" else x)


def _distance(got: Any, want: Any) -> float:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(oracle.relative_error(np.asarray(g, "f8"), np.asarray(w, "f8")) for g, w in pairs)


def judge_here(case: Case, chips: list[str]) -> Row:
    """A row of the table of a machine without an accelerator."""
    from jax.experimental.pallas import tpu as pltpu

    row: Row = {"op": case.op, "shape": case.name, "ok": True}
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
            row["error"] = error_of(case, "pallas_tpu", SMALL)
        row["ok"] = row["error"] <= case.bound
    except Exception as problem:  # whatever it says: it goes into the table
        pltpu.reset_tpu_interpret_mode_state()
        row |= {"ok": False, "note": _line(problem)}
    # A cache or a matrix that is copied or widened in front of the kernel would show; the queries
    # are, and lanes are padded.
    shapes = case.shapes()
    spare = 0.1 * size_of(shapes) + 6 * size_of(shapes.get("q", ())) + (8 << 20)
    for chip in chips:
        try:
            done = tpu_aot.compile_case(case, chip)
        except Exception as problem:
            row |= {chip: _line(problem), "ok": False}
            continue
        row[chip] = "ok"
        if done.temporaries > spare:
            row |= {chip: f"{done.temporaries / 1e6:.0f} MB of temporaries", "ok": False}
    if case.cache_bytes is not None:
        row["cache bytes"] = {chip: case.cache_bytes(TPU[chip]) for chip in TPU}
    return row


def judge_on_device(case: Case, impl: Impl, copy: float) -> Row:
    """A row of the table of a machine with one; `copy` is its bandwidth in bytes/s."""
    row: Row = {"op": case.op, "shape": case.name, "ok": True}
    try:
        row["error"] = error_of(case, impl)
        row["to xla"] = difference_to_xla(case, impl)
        seconds = timing.seconds_of(case, impl)
    except UnsupportedError as reason:
        return row | {"ok": impl not in case.covered, "note": str(reason)}
    except Exception as problem:
        return row | {"ok": False, "note": _line(problem)}
    share = case.nbytes / seconds / copy
    row |= {"ms": 1e3 * seconds, "GB/s": case.nbytes / seconds / 1e9, "of copy": share}
    row["xla ms"] = 1e3 * timing.seconds_of(case, "xla")
    row["ok"] = max(row["error"], row["to xla"] / 2) <= case.bound
    barred = case.name.startswith("llama-3-8b") and impl == "pallas_gpu"
    if case.op == "cached_attention" and barred and case.nbytes > ENOUGH:
        row["ok"] &= share >= COPY_SHARE
    if case.op == "attention" and impl == "pallas_gpu":
        try:
            row["of cudnn"] = timing.cudnn_seconds(case) / seconds
            row["ok"] &= row["of cudnn"] >= CUDNN_SHARE or not barred
        except Exception as problem:  # it does not cover every shape
            row["note"] = f"cuDNN: {_line(problem)}"
    return row


def _line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


def verify_ratios(rows: list[Row]) -> Iterator[tuple[str, float]]:
    """For each shape, what a verify of 8 tokens reads of the cache over what a decode reads; the
    chip of the greatest ratio counts."""
    read = {row["shape"]: row["cache bytes"] for row in rows if "cache bytes" in row}
    for shape, verify in read.items():
        one = read.get(shape.replace("T=8", "T=1"), verify)
        if one is not verify:
            yield shape, max(verify[chip] / one[chip] for chip in verify)


def table(rows: list[Row]) -> str:
    """The rows as text."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "ok"))

    def text(name: str, value: Any) -> str:
        if name == "cache bytes":
            return " ".join(f"{size / 1e6:.1f} MB" for size in value.values())
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    cells = [[text(c, row[c]) if c in row else "" for c in columns] for row in rows]
    cells = [columns, *cells]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    marks = ["    ", *("    " if row["ok"] else "BAD " for row in rows)]
    return "\n".join(
        mark
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for mark, line in zip(marks, cells, strict=True)
    )


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", action="store_true", help="run on the accelerator here")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--only", default="", help="regular expression on 'op, shape'")
    asked = parser.parse_args(argv)
    try:
        cases = all_cases(asked.only)
    except re.error as error:
        print(f"--only={asked.only}: {error}", file=sys.stderr)
        return 2
    if not cases:
        print(f"--only={asked.only}: no shape is called so", file=sys.stderr)
        return 2
    rows, result = [], {}
    if asked.device:
        platform = jax.default_backend()
        if platform == "cpu":
            print("--device: JAX finds no accelerator here", file=sys.stderr)
            return 2
        impl: Impl = "pallas_tpu" if platform == "tpu" else "pallas_gpu"
        copy = timing.copy_bandwidth()
        result = {"device": jax.devices()[0].device_kind, "copy_gb_per_s": copy / 1e9}
    else:
        os.environ.update(tpu_aot.ENVIRONMENT)
        jax.config.update("jax_platforms", "cpu")
        chips = list(tpu_aot.TOPOLOGIES) if importlib.util.find_spec("libtpu") else []
        result = {"device": "cpu, interpreted", "compiled_for": chips}
    for number, case in enumerate(cases, 1):
        print(f"\r{number}/{len(cases)} {case.op}, {case.name}\033[K", end="", file=sys.stderr)
        row = judge_on_device(case, impl, copy) if asked.device else judge_here(case, chips)
        rows.append(row)
    print("\r\033[K", end="", file=sys.stderr)
    ratios = dict(verify_ratios(rows))
    good = all(row["ok"] for row in rows) and all(r <= SPARE for r in ratios.values())
    if asked.json:
        finite = [{n: None if x == float("inf") else x for n, x in row.items()} for row in rows]
        print(json.dumps(result | {"rows": finite, "verify_over_decode": ratios, "ok": good}))
    else:
        print(*(f"{name}: {value}" for name, value in result.items()), sep="\n")
        if not asked.device and not chips:
            print("not compiled for TPU: pip install libtpu")
        print(table(rows))
        for shape, ratio in ratios.items():
            mark = "    " if ratio <= SPARE else "BAD "
            print(f"{mark}{shape} reads {ratio:.3f} of what T=1 reads")
        print("ok" if good else "some fall short")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
