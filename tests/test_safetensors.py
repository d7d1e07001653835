"""safetensors: every type through row slices, shards and links, and what malformed files get."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.checkpoint import safetensors as reader
from jaxinfer.checkpoint import source
from jaxinfer.checkpoint.safetensors import INDEX, NUMBERS, SINGLE, SafetensorsFiles
from jaxinfer.checkpoint.source import TensorSource
from jaxinfer.errors import CorruptFile, InvalidArgument, JaxinferError, ModelNotFound
from jaxinfer.errors import UnsupportedModel as Unsupported

F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)

# --- A writer that can lie ---


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def build(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    """A file; `header` is JSON text or something to dump, `length` what its size claims to be."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(**fields: Any) -> bytes:
    """A file with one tensor, `w`."""
    return build({"w": entry(**fields)})


def index(weight_map: Any) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


# --- Reading ---


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_type_through_row_slices(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "CHUNK_ELEMENTS", 100)  # many chunks, cut inside rows
    high = 2 if name == "BOOL" else 256
    rng = np.random.default_rng(0)
    want = rng.integers(0, high, 37 * 8 * 8, np.uint8).view(NUMBERS[name])
    want = want[: 37 * 8].reshape(37, 4, 2)
    shape, size = list(want.shape), want.nbytes
    header = {
        "pad": entry("U8", [3], [0, 3]),  # so that the rest is unaligned
        "w": entry(name, shape, [3, 3 + size]),
        "scalar": entry(name, [], [3 + size, 3 + size + want.itemsize]),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(build(header, b"abc" + want.tobytes() + want[0, 0, :1].tobytes()))
    files: TensorSource = SafetensorsFiles(path)
    assert files.shapes == {"pad": (3,), "w": (37, 4, 2), "scalar": ()}
    for a, b in (0, 37), (5, 9), (36, 37), (3, 3):
        for dtype in F32, BF16, np.dtype(np.float16):
            got = files.read("w", a, b, dtype)
            assert got.dtype == dtype
            # Through float32, whose NaNs compare equal to each other.
            np.testing.assert_array_equal(got.astype(F32), want[a:b].astype(dtype).astype(F32))
    scalar = files.read("scalar", 0, 1, F32)
    np.testing.assert_array_equal(scalar, want[0, 0, :1].astype(F32), strict=True)
    np.testing.assert_array_equal(files.read("pad", 1, 3, F32), [98, 99])


def sharded(folder: Path) -> dict[str, np.ndarray]:
    """Two shards and their index, by the library itself."""
    rng = np.random.default_rng(0)
    tensors = {f"layers.{i}.w": rng.standard_normal((9, 4), np.float32) for i in range(4)}
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = f"model-0000{i % 2 + 1}-of-00002.safetensors"
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n in tensors if weight_map[n] == shard}, folder / shard)
    (folder / INDEX).write_bytes(index(weight_map))
    return tensors


def equal(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    files = SafetensorsFiles(str(folder))
    assert files.shapes == {name: value.shape for name, value in tensors.items()}
    assert set(files.types.values()) == {"F32"}
    for name, value in tensors.items():
        np.testing.assert_array_equal(files.read(name, 2, 7, F32), value[2:7], strict=True)


def test_sharded_folder(tmp_path: Path) -> None:
    equal(tmp_path, sharded(tmp_path))


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("never read")
    tensors = {"w": np.arange(36, dtype=np.float32).reshape(9, 4)}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    equal(tmp_path, tensors)


def test_hub_cache_links_to_its_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    tensors = sharded(snapshot)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    equal(snapshot, tensors)
    (tmp_path / "link").symlink_to(snapshot)  # the user's own link to a folder is the user's choice
    equal(tmp_path / "link", tensors)


def test_hub_cache_links_to_blobs_shared_by_all_its_models(tmp_path: Path) -> None:
    """As huggingface_hub 2.4 lays it out: a link to a blob that is a link to the shared one."""
    tensors = {"w": np.ones((9, 3), np.float32)}
    repo = tmp_path / "models--org--name"
    for folder in (tmp_path / "blobs" / "ab", repo / "blobs", repo / "snapshots" / "1"):
        folder.mkdir(parents=True)
    save_file(tensors, tmp_path / "blobs" / "ab" / "hash")
    (repo / "blobs" / "etag").symlink_to("../../blobs/ab/hash")
    (repo / "snapshots" / "1" / SINGLE).symlink_to("../../blobs/etag")
    equal(repo / "snapshots" / "1", tensors)


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    tensors = {"w": np.ones((9, 4), np.float32)}
    save_file(tensors, tmp_path / "deep" / "x.safetensors")
    (tmp_path / SINGLE).symlink_to("deep/x.safetensors")
    equal(tmp_path, tensors)


def test_temporaries_stay_small_and_no_page_stays_mapped(tmp_path: Path) -> None:
    save_file({"w": np.ones((8192, 1024), np.float16)}, tmp_path / SINGLE)
    files = SafetensorsFiles(tmp_path)
    tracemalloc.start()
    try:
        out = files.read("w", 0, 8192, F32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (out == 1).all()
    assert peak - out.nbytes < 16 << 20
    # Cut under the reader: a mapped file would end this process with a bus error.
    os.truncate(tmp_path / SINGLE, 9000)
    with pytest.raises(CorruptFile, match="w: the data ends early"):
        files.read("w", 0, 8192, F32)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(ModelNotFound, match="cannot be read: No such file"):
        files.read("w", 0, 1, F32)


def test_rows_and_names_outside_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(one())
    files = SafetensorsFiles(path)
    for a, b in (-1, 1), (0, 3), (2, 1):
        with pytest.raises(InvalidArgument, match=r"x\.safetensors: rows"):
            files.read("w", a, b, F32)
    with pytest.raises(CorruptFile, match="tensor missing is missing"):
        files.read("missing", 0, 1, F32)


def test_an_empty_tensor_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({"w": entry(shape=[0, 5], offsets=[0, 0])}, b""))
    assert SafetensorsFiles(path).read("w", 0, 0, F32).shape == (0, 5)


# --- Files that lie ---


def refusal(open_it: Callable[[], Any], error: type[JaxinferError], budget: int) -> str:
    """The message; fails when it is not one short line, quick, and within `budget` bytes."""
    start = time.perf_counter()
    with pytest.raises(error) as caught:
        open_it()
    seconds = time.perf_counter() - start
    tracemalloc.start()  # a second time, because tracing is slow
    try:
        with pytest.raises(error):
            open_it()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.isprintable()  # so no newline, no terminal code
    assert len(message) < 300
    assert seconds < 2
    assert peak < budget
    return message


HUGE = 2**64 - 1
W = b'"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
Case = tuple[bytes, type[JaxinferError], str]  # content, error, what its message says

MALFORMED: dict[str, Case] = {
    "empty": (b"", CorruptFile, "0 bytes long: too short"),
    "seven-bytes": (bytes(7), CorruptFile, "7 bytes long: too short"),
    "lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\n", CorruptFile, "git lfs pull"),
    "gguf": (b"GGUF" + bytes(60), CorruptFile, "the header"),
    "pickle": (b"PK\x03\x04" + bytes(99), CorruptFile, "header"),
    "length-huge": (build({}, length=HUGE), CorruptFile, f"the header claims {HUGE} bytes"),
    "length-negative": (build({}, length=2**63), CorruptFile, "the header claims"),
    "length-one-more": (build({}, b"", length=3), CorruptFile, "claims 3 bytes, but can have 2"),
    "length-zero": (build({}, length=0), CorruptFile, "header"),
    "length-cuts-json": (build({"w": entry()}, length=20), CorruptFile, "header"),
    "not-json": (build(b"hello"), CorruptFile, "header"),
    "not-utf8": (build(b'{"\xff":1}'), CorruptFile, "header"),
    "json-list": (build([]), CorruptFile, "header"),
    "json-null": (build(None), CorruptFile, "header"),
    "json-nested-deep": (build(b'{"w":' + b"[" * 200000), CorruptFile, "header"),
    "json-objects-deep": (build(b'{"w":' * 100000), CorruptFile, "header"),
    "json-nan": (build(b'{"w":{"dtype":"F32","shape":[NaN]}}'), CorruptFile, "header"),
    "json-trailing": (build(b"{" + W + b"}x"), CorruptFile, "header"),
    "json-surrogate": (
        build(W.replace(b"w", b"\\ud800").join((b"{", b"}"))),
        CorruptFile,
        "header",
    ),
    "name-twice": (build(b"{" + W + b"," + W + b"}"), CorruptFile, "the header holds w twice"),
    "name-twice-escaped": (
        build(b"{" + W + b"," + W.replace(b'"w"', b'"\\u0077"') + b"}"),
        CorruptFile,
        "the header holds w twice",
    ),
    "field-twice": (build(b'{"w":{"dtype":"F32","dtype":"I32"}}'), CorruptFile, "header"),
    "entry-null": (build({"w": None}), CorruptFile, "header"),
    "entry-list": (build({"w": ["F32", [2], [0, 8]]}, b""), CorruptFile, "header"),
    "dtype-missing": (
        build({"w": {"shape": [2], "data_offsets": [0, 8]}}),
        CorruptFile,
        "header",
    ),
    "dtype-unknown": (one(dtype="Q8"), CorruptFile, "header"),
    "dtype-number": (one(dtype=3), CorruptFile, "header"),
    "dtype-a-megabyte": (one(dtype="\n" * 10**6), CorruptFile, "header"),
    "dtype-four-bit": (one(dtype="F4", shape=[16]), Unsupported, "w has unsupported type F4"),
    "dtype-six-bit": (
        build({"w": entry("F6_E2M3", [4], [0, 3])}, bytes(3)),
        Unsupported,
        "w has unsupported type F6_E2M3",
    ),
    "dtype-complex": (one(dtype="C64", shape=[1]), Unsupported, "w has unsupported type C64"),
    "shape-missing": (
        build({"w": {"dtype": "F32", "data_offsets": [0, 8]}}),
        CorruptFile,
        "header",
    ),
    "shape-null": (one(shape=None), CorruptFile, "header"),
    "shape-number": (one(shape=2), CorruptFile, "header"),
    "shape-negative": (one(shape=[-2]), CorruptFile, "header"),
    "shape-float": (one(shape=[2.0]), CorruptFile, "header"),
    "shape-string": (one(shape=["2"]), CorruptFile, "header"),
    "shape-bool": (one(shape=[True, 2]), CorruptFile, "header"),
    "shape-wraps": (one(shape=[2**32, 2**32]), CorruptFile, "header"),
    "shape-digits": (one(shape=[10**4000]), CorruptFile, "header"),
    "shape-too-large": (one(shape=[3]), CorruptFile, "header"),
    "shape-too-small": (one(shape=[1]), CorruptFile, "header"),
    "shape-empty-but-vast": (
        one(shape=[0, 2**62, 2**62], offsets=[0, 0])[:-8],
        CorruptFile,
        "w has impossible shape",
    ),
    "shape-100-dims": (one(shape=[1] * 100 + [2]), CorruptFile, "w has 101 dimensions"),
    "shape-100000-dims": (one(shape=[1] * 10**5 + [2]), CorruptFile, "w has 100001 dimensions"),
    "offsets-missing": (build({"w": {"dtype": "F32", "shape": [2]}}), CorruptFile, "header"),
    "offsets-one": (one(offsets=[0]), CorruptFile, "header"),
    "offsets-three": (one(offsets=[0, 8, 8]), CorruptFile, "header"),
    "offsets-reversed": (one(offsets=[8, 0]), CorruptFile, "header"),
    "offsets-negative": (one(offsets=[-8, 0]), CorruptFile, "header"),
    "offsets-huge": (one(offsets=[HUGE - 8, HUGE]), CorruptFile, "header"),
    "offsets-start-late": (one(offsets=[8, 16]), CorruptFile, "header"),
    "overlap": (build({"v": entry(), "w": entry()}), CorruptFile, "header"),
    "gap": (
        build({"v": entry(), "w": entry(offsets=[16, 24])}, bytes(24)),
        CorruptFile,
        "header",
    ),
    "data-short": (one()[:-1], CorruptFile, "header"),
    "data-missing": (one()[:-8], CorruptFile, "header"),
    "data-excess": (one() + b"x", CorruptFile, "header"),
    "metadata-list": (build({"__metadata__": [], "w": entry()}), CorruptFile, "header"),
    "metadata-number": (build({"__metadata__": {"a": 1}, "w": entry()}), CorruptFile, "header"),
    "name-long-and-dirty": (
        build({"\n\x1b[2J\u202e" * 9000: entry("C64", [1])}),
        Unsupported,
        "unsupported type C64",
    ),
    "too-many-tensors": (
        build({f"{i}": entry("U8", [0], [0, 0]) for i in range(65537)}, b""),
        CorruptFile,
        "holds 65537 tensors",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, tmp_path: Path) -> None:
    content, error, says = MALFORMED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    budget = (1 << 20) + 20 * len(content)  # parsed JSON is larger than its text
    message = refusal(partial(SafetensorsFiles, path), error, budget)
    assert "x.safetensors: " in message
    assert re.search(says, message)


A = "a.safetensors"  # the shard that a folder of the cases below has: it holds `w`
BAD_INDEX: dict[str, Case] = {
    "empty": (b"", CorruptFile, "index is not JSON"),
    "not-json": (b"{", CorruptFile, "index is not JSON"),
    "not-utf8": (b'{"weight_map":{"\xff":"a"}}', CorruptFile, "index is not JSON"),
    "utf16": ('{"weight_map":{}}'.encode("utf-16"), CorruptFile, "index is not JSON"),
    "list": (b"[]", CorruptFile, "not a JSON object"),
    "nested-deep": (b'{"weight_map":' + b"[" * 200000, CorruptFile, "nested too deeply"),
    "digits": (b'{"weight_map":' + b"9" * 9999 + b"}", CorruptFile, "index is not JSON"),
    "too-large": (b" " * (reader.MAX_JSON + 1), CorruptFile, "16777217 bytes long"),
    "map-missing": (b'{"metadata":{}}', CorruptFile, "weight_map is missing"),
    "map-empty": (index({}), CorruptFile, "weight_map is missing, empty"),
    "map-list": (index([A]), CorruptFile, "weight_map is missing, empty or not an object"),
    "map-twice": (b'{"weight_map":{},"weight_map":{}}', CorruptFile, "holds weight_map twice"),
    "name-twice": (
        b'{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}',
        CorruptFile,
        "holds w twice",
    ),
    "shard-number": (index({"w": 1}), CorruptFile, "the shard of w is not a string"),
    "shard-null": (index({"w": None}), CorruptFile, "the shard of w is not a string"),
    "shard-list": (index({"w": [A]}), CorruptFile, "the shard of w is not a string"),
    "shard-empty": (index({"w": ""}), CorruptFile, "'' is not a plain file name"),
    "shard-dot": (index({"w": "."}), CorruptFile, "'.' is not a plain file name"),
    "shard-parent": (index({"w": ".."}), CorruptFile, "'..' is not a plain file name"),
    "shard-up": (index({"w": f"../{A}"}), CorruptFile, "is not a plain file name"),
    "shard-up-and-back": (index({"w": f"x/../{A}"}), CorruptFile, "is not a plain file name"),
    "shard-absolute": (index({"w": "/etc/passwd"}), CorruptFile, "'/etc/passwd' is not a plain"),
    "shard-backslash": (index({"w": f"..\\{A}"}), CorruptFile, "is not a plain file name"),
    "shard-drive": (index({"w": f"C:{A}"}), CorruptFile, "is not a plain file name"),
    "shard-nul": (index({"w": f"{A}\0"}), CorruptFile, "is not a plain file name"),
    "shard-surrogate": (index({"w": "\ud800"}), CorruptFile, "cannot be read"),
    "shard-newline": (index({"w": "a\n\x1b[2J"}), CorruptFile, "cannot be read: No such file"),
    "shard-a-megabyte": (index({"w": "a" * 10**6}), CorruptFile, "File name too long"),
    "shard-missing": (index({"w": "b.safetensors"}), CorruptFile, "b.safetensors cannot be read"),
    "shard-pickle": (index({"w": "pytorch_model.bin"}), Unsupported, "convert .* to safetensors"),
    "shard-is-folder": (index({"w": "folder"}), ModelNotFound, "is a folder"),
    "shard-is-fifo": (index({"w": "fifo"}), CorruptFile, "not a regular file"),
    "shard-is-the-index": (index({"w": INDEX}), CorruptFile, "the header"),
    "shard-links-out": (index({"w": "out"}), CorruptFile, "out is a link that leads out"),
    "shard-links-to-device": (index({"w": "zero"}), CorruptFile, "zero is a link that leads out"),
    "shard-links-to-folder-beside": (index({"w": "beside"}), CorruptFile, "beside is a link"),
    "shard-links-in-circle": (index({"w": "circle"}), CorruptFile, "circle cannot be read"),
    "shard-links-nowhere": (index({"w": "nowhere"}), CorruptFile, "nowhere cannot be read"),
    "shard-corrupt": (index({"w": "corrupt"}), CorruptFile, "corrupt: .*header"),
    "tensor-absent": (index({"v": A}), CorruptFile, f"v is in {A}; it is not"),
    "tensor-in-two-shards": (
        index({"w": A, "v": "copy"}),
        CorruptFile,
        f"w is in both {A} and copy",
    ),
    "long-and-dirty": (
        index({"\n" * 9999: A}),
        CorruptFile,
        f"is in {A}; it is not",
    ),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_malformed_index(case: str, tmp_path: Path) -> None:
    content, error, says = BAD_INDEX[case]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_bytes(content)
    (folder / A).write_bytes(one())
    (folder / "copy").write_bytes(build({"v": entry(), "w": entry(offsets=[8, 16])}, bytes(16)))
    (folder / "corrupt").write_bytes(one()[:-1])
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (tmp_path / A).write_bytes(one())
    (tmp_path / "model-beside").mkdir()  # its path begins like the folder's
    (tmp_path / "model-beside" / A).write_bytes(one())
    (folder / "out").symlink_to(tmp_path / A)
    (folder / "beside").symlink_to(tmp_path / "model-beside" / A)
    (folder / "zero").symlink_to(os.devnull)
    (folder / "circle").symlink_to("circle")
    (folder / "nowhere").symlink_to("missing")
    message = refusal(partial(SafetensorsFiles, folder), error, (1 << 20) + 20 * len(content))
    assert "/model" in message
    assert re.search(says, message)


def test_hub_links_lead_to_their_own_blobs_only(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    other = tmp_path / "models--org--other" / "blobs"
    for folder in snapshot, other:
        folder.mkdir(parents=True)
    (other / "0").write_bytes(one())
    (snapshot / SINGLE).symlink_to("../../../models--org--other/blobs/0")
    assert "leads out" in refusal(partial(SafetensorsFiles, snapshot), CorruptFile, 1 << 20)
    # A `blobs` that is itself a link somewhere else.
    (tmp_path / "models--org--name" / "blobs").symlink_to(other)
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../blobs/0")
    assert "leads out" in refusal(partial(SafetensorsFiles, snapshot), CorruptFile, 1 << 20)


@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_the_first_file_may_not_lead_out_either(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(one())
    (folder / name).symlink_to("../secret")
    message = refusal(partial(SafetensorsFiles, folder), CorruptFile, 1 << 20)
    assert f"{name} is a link that leads out" in message


@pytest.mark.parametrize("name", ["model.bin", "a.pt", "a.PTH", "a.ckpt", "a.pkl"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)  # opening it would block for ever
    for path in tmp_path / name, tmp_path:
        message = refusal(partial(SafetensorsFiles, path), Unsupported, 1 << 20)
        assert "safetensors" in message
        assert name in message


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, error, says in (
        (tmp_path / "no.safetensors", ModelNotFound, "no.safetensors: cannot be read: No such"),
        (tmp_path, ModelNotFound, "neither model.safetensors nor"),
        (tmp_path / "nul\0", ModelNotFound, "cannot be read"),
        (tmp_path / ("x" * 5000), ModelNotFound, "File name too long"),
        (tmp_path / "fifo", CorruptFile, "not a regular file"),
        (Path(os.devnull), CorruptFile, "not a regular file"),
    ):
        assert re.search(says, refusal(partial(SafetensorsFiles, path), error, 1 << 20))


def test_a_sparse_file_cannot_make_a_header_large(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({"w": entry()}, length=2**39))
    os.truncate(path, 2**40)
    message = refusal(partial(SafetensorsFiles, path), CorruptFile, 1 << 20)
    assert "claims 549755813888 bytes, but can have 16777216" in message


VALID = build(
    {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], [0, 24]),
        "b": entry("BF16", [4], [24, 32]),
        "c": entry("F8_E4M3", [2, 2], [32, 36]),
    },
    bytes(36),
)


def try_everything(path: Path) -> str:
    """Open and read it all; the refusal, or "". An error that is not ours escapes."""
    try:
        files = SafetensorsFiles(path)
        for name, shape in files.shapes.items():
            rows = shape[0] if shape else 1
            assert files.read(name, 0, rows, F32).shape == (shape or (1,))
    except JaxinferError as error:
        return str(error)
    return ""


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length in range(len(VALID)):
        path.write_bytes(VALID[:length])
        assert try_everything(path), length
    path.write_bytes(VALID)
    assert try_everything(path) == ""


def test_flipped_bytes_are_refused_or_read(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "x.safetensors"
    messages = []
    for _ in range(600):
        content = bytearray(VALID)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            content[rng.randrange(len(content))] = rng.choice(b'\0\1\x7f\xff019"{}[],:')
        path.write_bytes(content)
        messages.append(try_everything(path))
    assert all(message == "" or message.isprintable() for message in messages)
    assert max(map(len, messages)) < 300
    assert 50 < messages.count("") < 550  # both happen, or the test tests nothing
