"""GGUF: every type bit for bit through row slices, and what malformed files are answered with."""

from __future__ import annotations

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

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

from jaxinfer.checkpoint import source
from jaxinfer.checkpoint.gguf import NUMBERS, GGUFFile
from jaxinfer.checkpoint.source import TensorSource
from jaxinfer.errors import CorruptFile, InvalidArgument, JaxinferError, ModelNotFound
from jaxinfer.errors import UnsupportedModel as Unsupported

F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)

# --- A writer that can lie ---

U8, I8, U16, I16, U32, I32, FLOAT, BOOL, STRING, ARRAY, U64, I64, DOUBLE = range(13)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + payload


def tensor(
    name: str | bytes = "w",
    dims: tuple[int, ...] = (4, 2),
    kind: int = 0,
    offset: int = 0,
    num_dims: int | None = None,
) -> bytes:
    """A tensor's record; `dims` innermost first, as the file has them."""
    count = len(dims) if num_dims is None else num_dims
    return text(name) + u32(count) + u64(*dims) + u32(kind) + u64(offset)


def build(
    *records: bytes,
    keys: tuple[bytes, ...] = (),
    data: bytes = bytes(64),
    align: int = 32,
    head: bytes = b"GGUF" + u32(3),
    num_tensors: int | None = None,
    num_keys: int | None = None,
) -> bytes:
    counts = u64(
        len(records) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    out = head + counts + b"".join(keys) + b"".join(records)
    return out + bytes(-len(out) % align) + data


def save(folder: Path, content: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return path


def bits(values: np.ndarray) -> np.ndarray:
    """For comparing bit for bit; every NaN counts as the same one."""
    out = values.view(f"u{values.itemsize}").copy()
    out[np.isnan(values.astype(np.float32))] = 12345
    return out


# --- Reading ---


def test_metadata_of_every_type(tmp_path: Path) -> None:
    keys = (
        key("u8", U8, b"\xff"),
        key("i8", I8, b"\xff"),
        key("u16", U16, b"\xff\xff"),
        key("i16", I16, b"\xff\xff"),
        key("u32", U32, u32(2**32 - 1)),
        key("i32", I32, struct.pack("<i", -5)),
        key("f32", FLOAT, struct.pack("<f", 0.5)),
        key("bool", BOOL, b"\x01"),
        key("string", STRING, text("naïve\n🙂")),
        key("bytes", STRING, text(b"\xff\xfe")),
        key("u64", U64, u64(2**64 - 1)),
        key("i64", I64, struct.pack("<q", -(2**63))),
        key("f64", DOUBLE, struct.pack("<d", 1e300)),
        key("strings", ARRAY, array(STRING, 3, text("a") + text("") + text(b"\x80"))),
        key("floats", ARRAY, array(FLOAT, 2, struct.pack("<2f", 1.5, -2.0))),
        key("bools", ARRAY, array(BOOL, 3, b"\x00\x01\x01")),
        key("none", ARRAY, array(I32, 0)),
    )
    found = dict(GGUFFile(save(tmp_path, build(keys=keys))).metadata)
    arrays = {k: found.pop(k) for k in ("floats", "bools", "none")}
    assert found == {
        **{"u8": 255, "i8": -1, "u16": 65535, "i16": -1, "u32": 2**32 - 1, "i32": -5},
        **{"f32": 0.5, "bool": True, "string": "naïve\n🙂", "bytes": b"\xff\xfe"},
        **{"u64": 2**64 - 1, "i64": -(2**63), "f64": 1e300, "strings": ["a", "", b"\x80"]},
    }
    assert found["bool"] is True
    np.testing.assert_array_equal(arrays["floats"], np.array([1.5, -2.0], np.float32), strict=True)
    np.testing.assert_array_equal(arrays["bools"], np.array([False, True, True]), strict=True)
    np.testing.assert_array_equal(arrays["none"], np.array([], np.int32), strict=True)


def decodable() -> list[str]:
    """Names of the types that gguf can dequantize, and of plain numbers."""
    out = []
    for kind, (_, block_bytes) in GGML_QUANT_SIZES.items():
        try:
            quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            if kind.name not in NUMBERS:
                continue
        out.append(kind.name)
    return out


def reference(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The whole tensor; raw is uint8 [rows, bytes]."""
    if kind.name in ("F64", "I8", "I16", "I32", "I64"):
        return raw.view(NUMBERS[kind.name])
    with np.errstate(all="ignore"):
        return quants.dequantize(raw, kind)


@pytest.mark.parametrize("name", decodable())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_equal_the_whole_tensor_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "CHUNK_ELEMENTS", 1024)  # many chunks, cut inside rows
    kind = GGMLQuantizationType[name]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows, blocks = 37, 768 // block * 3
    rng = np.random.default_rng(int(kind))
    raw = rng.integers(0, 256, (rows, blocks * block_bytes), np.uint8)
    offset = -(-raw.size // 32) * 32
    path = save(
        tmp_path,
        build(
            tensor("matrix", (blocks * block, rows), kind),
            tensor("vector", (blocks * block,), kind, offset),
            tensor("experts", (block, 6, 8), kind, 2 * offset),
            data=raw.tobytes().ljust(offset, b"\0") * 3,
        ),
    )
    file = GGUFFile(path)
    want = reference(raw, kind)
    assert dict(file.types) == dict.fromkeys(("matrix", "vector", "experts"), name)
    assert file.shapes["matrix"] == want.shape == (rows, blocks * block)
    for a, b in (0, rows), (5, 9), (rows - 1, rows), (3, 3), (0, 1):
        for dtype in F32, BF16, np.dtype(np.float16):
            got = file.read("matrix", a, b, dtype)
            assert got.dtype == dtype
            np.testing.assert_array_equal(bits(got), bits(want[a:b].astype(dtype)))
    for a, b in (0, blocks * block), (1, 2), (block - 1, 2 * block + 1), (7, 7):
        got = file.read("vector", a, b, F32)
        np.testing.assert_array_equal(bits(got), bits(want[0, a:b].astype(F32)))
    experts = reference(raw.reshape(-1, block_bytes)[:48], kind).reshape(8, 6, block)
    np.testing.assert_array_equal(
        bits(file.read("experts", 2, 7, F32)), bits(experts[2:7].astype(F32))
    )


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ2_0"])
def test_what_gguf_quantized_comes_back_close(name: str, tmp_path: Path) -> None:
    """Independent of gguf's dequantize: the numbers are those that were stored."""
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(0).standard_normal((16, 512), np.float32)
    data = quants.quantize(values, kind).tobytes()
    file = GGUFFile(save(tmp_path, build(tensor("w", (512, 16), kind), data=data)))
    error = np.abs(file.read("w", 0, 16, F32) - values).max()
    assert error < {"F16": 2e-3, "BF16": 0.02, "Q8_0": 0.03, "TQ2_0": 2.5}.get(name, 0.6)


def test_versions_two_and_three_and_other_alignments(tmp_path: Path) -> None:
    want = np.arange(8, dtype=np.float32).reshape(2, 4)
    for version in 2, 3:
        for align in 1, 8, 64:
            content = build(
                tensor(),
                keys=(key("general.alignment", U32, u32(align)),),
                data=want.tobytes(),
                align=align,
                head=b"GGUF" + u32(version),
            )
            file: TensorSource = GGUFFile(str(save(tmp_path, content)))
            np.testing.assert_array_equal(file.read("w", 0, 2, F32), want, strict=True)


def test_smollm2_equals_the_gguf_package(smollm2_path: str) -> None:
    theirs, ours = gguf.GGUFReader(smollm2_path), GGUFFile(smollm2_path)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for name, field in fields.items():
        value = ours.metadata[name]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    assert ours.shapes == {t.name: tuple(t.shape.tolist()[::-1]) for t in theirs.tensors}
    assert ours.types == {t.name: t.tensor_type.name for t in theirs.tensors}
    for tensor in theirs.tensors[:12] + theirs.tensors[-3:]:
        rows = len(tensor.data)
        for a, b in (0, min(rows, 700)), (rows // 2, rows // 2 + 1), (max(0, rows - 99), rows):
            want = quants.dequantize(tensor.data[a:b], tensor.tensor_type)
            np.testing.assert_array_equal(ours.read(tensor.name, a, b, F32), want, strict=True)


def test_gemma_opens_in_half_a_second_with_its_vocabulary(gemma3_path: str) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        tokens = GGUFFile(gemma3_path).metadata["tokenizer.ggml.tokens"]
        seconds.append(time.perf_counter() - start)
    assert len(tokens) == 262144
    assert tokens[:3] == ["<pad>", "<eos>", "<bos>"]
    assert min(seconds) < 0.5


def test_temporaries_stay_small(gemma3_path: str) -> None:
    file = GGUFFile(gemma3_path)
    tracemalloc.start()
    try:
        out = file.read("token_embd.weight", 0, 65536, BF16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert out.nbytes == 65536 * 640 * 2
    assert peak - out.nbytes < 16 << 20


def test_a_file_cut_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = save(tmp_path, build(tensor("w", (1024, 64)), data=bytes(2**18)))
    file = GGUFFile(path)
    os.truncate(path, 9000)
    with pytest.raises(CorruptFile, match="w: the data ends early"):
        file.read("w", 0, 64, F32)
    path.unlink()
    with pytest.raises(ModelNotFound, match=r"model\.gguf: cannot be read: No such file"):
        file.read("w", 0, 64, F32)


def test_rows_and_names_outside_are_refused(tmp_path: Path) -> None:
    file = GGUFFile(save(tmp_path, build(tensor())))
    for a, b in (-1, 1), (0, 3), (2, 1):
        with pytest.raises(InvalidArgument, match=r"model\.gguf: rows"):
            file.read("w", a, b, F32)
    with pytest.raises(CorruptFile, match="tensor missing is missing"):
        file.read("missing", 0, 1, F32)


# --- Files that lie ---

HUGE = 2**64 - 1
Case = tuple[bytes, type[JaxinferError], str]  # content, error, what its message says

MALFORMED: dict[str, Case] = {
    "empty": (b"", CorruptFile, "the magic number"),
    "short-magic": (b"GG", CorruptFile, "the magic number"),
    "wrong-magic": (b"PK\x03\x04" + bytes(64), CorruptFile, "no GGUF file"),
    "lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\n", CorruptFile, "git lfs pull"),
    "no-version": (b"GGUF", CorruptFile, "the version"),
    "version-0": (build(head=b"GGUF" + u32(0)), CorruptFile, "version is 0"),
    "version-1": (build(head=b"GGUF" + u32(1)), Unsupported, "version 1"),
    "version-4": (build(head=b"GGUF" + u32(4)), Unsupported, "version 4"),
    "big-endian": (build(head=b"GGUF\0\0\0\3"), Unsupported, "big-endian"),
    "no-counts": (b"GGUF" + u32(3), CorruptFile, "the tensor count"),
    "tensor-count-huge": (build(num_tensors=HUGE), CorruptFile, "tensor count"),
    "tensor-count-million": (build(num_tensors=10**6), CorruptFile, "tensor count"),
    "tensor-count-beyond-file": (build(tensor(), num_tensors=60000), CorruptFile, "tensor 1"),
    "key-count-huge": (build(num_keys=HUGE), CorruptFile, "metadata count"),
    "key-count-beyond-file": (build(num_keys=60000, data=b""), CorruptFile, "metadata key 0"),
    "key-length-huge": (build(keys=(u64(HUGE) + b"k",)), CorruptFile, "metadata key 0"),
    "key-empty": (build(keys=(key("", U8, b"\0"),)), CorruptFile, "metadata key 0"),
    "key-too-long": (build(keys=(key("k" * 70000, U8, b"\0"),)), CorruptFile, "metadata key 0"),
    "key-beyond-file": (build(keys=(u64(60000) + b"k",)), CorruptFile, "metadata key 0"),
    "key-not-utf8": (build(keys=(key(b"\xff", U8, b"\0"),)), CorruptFile, "UTF-8"),
    "key-twice": (build(keys=(key("k", U8, b"\0"),) * 2), CorruptFile, "k appears twice"),
    "key-with-newlines": (build(keys=(key("\n\x1b[2J\u202e", 99, b""),)), Unsupported, "type 99"),
    "key-type-unknown": (build(keys=(key("k", 13, b""),)), Unsupported, "k has unknown .* 13"),
    "value-missing": (b"GGUF" + u32(3) + u64(0, 1) + key("k", U64, b"abc"), CorruptFile, "k needs"),
    "bool-is-two": (build(keys=(key("k", BOOL, b"\2"),)), CorruptFile, "k holds a boolean"),
    "bools-hold-two": (
        build(keys=(key("k", ARRAY, array(BOOL, 2, b"\1\2")),)),
        CorruptFile,
        "k holds a boolean",
    ),
    "string-length-huge": (build(keys=(key("k", STRING, u64(HUGE)),)), CorruptFile, "k needs"),
    "string-length-wraps": (
        build(keys=(key("k", STRING, u64(2**64 - 8)),)),
        CorruptFile,
        "k needs",
    ),
    "string-beyond-file": (build(keys=(key("k", STRING, u64(500)),)), CorruptFile, "k needs"),
    "array-count-huge": (build(keys=(key("k", ARRAY, array(U8, HUGE)),)), CorruptFile, "k needs"),
    "array-count-wraps": (
        build(keys=(key("k", ARRAY, array(U64, 2**61)),)),
        CorruptFile,
        "k needs",
    ),
    "array-beyond-file": (build(keys=(key("k", ARRAY, array(U32, 99)),)), CorruptFile, "k needs"),
    "strings-count-huge": (
        build(keys=(key("k", ARRAY, array(STRING, HUGE)),)),
        CorruptFile,
        f"k needs {8 * HUGE} bytes",
    ),
    "strings-item-huge": (
        build(keys=(key("k", ARRAY, array(STRING, 2, text("a") + u64(2**63))),)),
        CorruptFile,
        "string of k",
    ),
    "strings-run-out": (
        build(keys=(key("k", ARRAY, array(STRING, 6, text("a" * 90))),), data=b""),
        CorruptFile,
        "k",
    ),
    "array-of-arrays": (
        build(keys=(key("k", ARRAY, array(ARRAY, 1, array(U8, 0))),)),
        Unsupported,
        "k is an array of arrays",
    ),
    "arrays-nested-deep": (
        build(keys=(key("k", ARRAY, array(ARRAY, 1) * 100000),)),
        Unsupported,
        "k is an array of arrays",
    ),
    "array-type-unknown": (
        build(keys=(key("k", ARRAY, array(77, 1)),)),
        Unsupported,
        "k is an array of unknown metadata type 77",
    ),
    "name-length-huge": (build(u64(HUGE) + b"w"), CorruptFile, "name of tensor 0"),
    "name-empty": (build(tensor("")), CorruptFile, "name of tensor 0"),
    "name-not-utf8": (build(tensor(b"\xc3")), CorruptFile, "UTF-8"),
    "name-twice": (build(tensor(), tensor(offset=32)), CorruptFile, "w appears twice"),
    "name-long-and-dirty": (build(tensor("\r\n" * 9000, kind=99)), Unsupported, "type 99"),
    "dims-none": (build(tensor(dims=())), CorruptFile, "w has 0 dimensions"),
    "dims-five": (build(tensor(dims=(1,) * 5)), CorruptFile, "w has 5 dimensions"),
    "dims-huge": (build(tensor(num_dims=2**32 - 1)), CorruptFile, "4294967295 dimensions"),
    "dim-zero": (build(tensor(dims=(4, 0))), CorruptFile, "w has a dimension of size 0"),
    "dim-huge": (build(tensor(dims=(HUGE,))), CorruptFile, "w ends at byte"),
    "dims-wrap-to-zero": (build(tensor(dims=(2**32, 2**32))), CorruptFile, "w ends at byte"),
    "dims-wrap-to-four": (
        build(tensor(dims=(2**62 + 1, 4, 1, 1))),
        CorruptFile,
        "w ends at byte",
    ),
    "dim-not-whole-blocks": (build(tensor(dims=(33,), kind=8)), CorruptFile, "multiple of 32"),
    "type-removed": (build(tensor(kind=4)), Unsupported, "w has unknown quantization type 4"),
    "type-unknown": (build(tensor(kind=2**32 - 1)), Unsupported, "type 4294967295"),
    "type-not-decodable": (
        build(tensor(dims=(256,), kind=15), data=bytes(512)),
        Unsupported,
        "Q8_K",
    ),
    "offset-unaligned": (build(tensor(offset=8)), CorruptFile, "not a multiple of 32"),
    "offset-huge": (build(tensor(offset=2**64 - 32)), CorruptFile, "w ends at byte"),
    "offset-beyond-file": (build(tensor(offset=4096)), CorruptFile, "w ends at byte"),
    "data-one-byte-short": (build(tensor(), data=bytes(31)), CorruptFile, "w ends at byte"),
    "data-missing": (build(tensor(), data=b""), CorruptFile, "w ends at byte"),
    "tensors-overlap": (
        build(tensor("a", (16,)), tensor("b", (16,), offset=32), data=bytes(999)),
        CorruptFile,
        "b overlaps tensor a",
    ),
    "tensors-overlap-unsorted": (
        build(tensor("a", (4,), offset=32), tensor("b", (16,)), data=bytes(999)),
        CorruptFile,
        "a overlaps tensor b",
    ),
    "align-zero": (build(keys=(key("general.alignment", U32, u32(0)),)), CorruptFile, "power of"),
    "align-three": (build(keys=(key("general.alignment", U32, u32(3)),)), CorruptFile, "power of"),
    "align-huge": (
        build(keys=(key("general.alignment", U32, u32(2**31)),)),
        CorruptFile,
        "power of two within",
    ),
    "align-negative": (
        build(keys=(key("general.alignment", I32, b"\xe0\xff\xff\xff"),)),
        CorruptFile,
        "general.alignment is -32",
    ),
    "align-string": (
        build(keys=(key("general.alignment", STRING, text("32")),)),
        CorruptFile,
        "general.alignment",
    ),
    "align-bool": (
        build(keys=(key("general.alignment", BOOL, b"\1"),)),
        CorruptFile,
        "whole number",
    ),
    "split": (build(keys=(key("split.count", U16, b"\3\0"),)), Unsupported, "one of 3 parts"),
    "records-cut": (build(tensor(), data=b"")[:40], CorruptFile, "tensor"),
}


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


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, tmp_path: Path) -> None:
    content, error, says = MALFORMED[case]
    path = save(tmp_path, content)
    message = refusal(partial(GGUFFile, path), error, (1 << 20) + 3 * len(content))
    assert "model.gguf: " in message
    assert re.search(says, message)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, error, says in (
        (tmp_path / "missing.gguf", ModelNotFound, "missing.gguf: cannot be read: No such file"),
        (tmp_path, ModelNotFound, "is a folder"),
        (tmp_path / "nul\0.gguf", ModelNotFound, "cannot be read"),
        (tmp_path / ("x" * 5000), ModelNotFound, "File name too long"),
        (tmp_path / "fifo", CorruptFile, "not a regular file"),  # opening it would block
        (Path(os.devnull), CorruptFile, "not a regular file"),
    ):
        assert re.search(says, refusal(partial(GGUFFile, path), error, 1 << 20))


def test_a_sparse_file_cannot_make_a_header_large(tmp_path: Path) -> None:
    """A terabyte on paper: the file's size bounds nothing, so the header has its own limit."""
    path = save(tmp_path, build(keys=(key("k", ARRAY, array(U8, 2**39)),)))
    os.truncate(path, 2**40)
    message = refusal(partial(GGUFFile, path), CorruptFile, 1 << 20)
    assert "k needs 549755813888 bytes, but the 64 MB of a header" in message


VALID = build(
    tensor("a", (32, 3), 8),
    tensor("b", (256,), 12, 128),
    tensor("c", (4, 2), 0, 288),
    keys=(
        key("general.alignment", U32, u32(32)),
        key("tokens", ARRAY, array(STRING, 3, text("a") + text("bc") + text(""))),
        key("scores", ARRAY, array(FLOAT, 3, bytes(12))),
        key("name", STRING, text("tiny")),
    ),
    data=bytes(320),
)


def try_everything(path: Path) -> str:
    """Open and read it all; the refusal, or "". An error that is not ours escapes."""
    try:
        file = GGUFFile(path)
        for name, shape in file.shapes.items():
            assert file.read(name, 0, shape[0], F32).shape == shape
    except JaxinferError as error:
        return str(error)
    return ""


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    assert try_everything(save(tmp_path, VALID)) == ""
    for length in range(len(VALID)):
        assert try_everything(save(tmp_path, VALID[:length])), length


def test_flipped_bytes_are_refused_or_read(tmp_path: Path) -> None:
    rng = random.Random(0)
    messages = []
    for _ in range(600):
        content = bytearray(VALID)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            content[rng.randrange(len(content) - 320)] = rng.choice((0, 1, 8, 127, 128, 255))
        messages.append(try_everything(save(tmp_path, bytes(content))))
    assert all(message == "" or message.isprintable() for message in messages)
    assert max(map(len, messages)) < 300
    assert 50 < messages.count("") < 550  # both happen, or the test tests nothing
