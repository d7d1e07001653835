"""Tokenizer files and metadata that lie: each is refused, in one line, at once."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizer_golden as golden
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from jaxinfer.errors import CorruptFile, JaxinferError, ModelNotFound, UnsupportedModel
from jaxinfer.tokenizer import load_tokenizer, tokenizer_from_gguf

KEY = golden.KEY


def refused(run: Callable[[], Any], *named: str) -> None:
    """The refusal is ours, has one line that names what it should, and comes at once."""
    start = time.monotonic()
    with pytest.raises(JaxinferError) as caught:
        run()
    assert time.monotonic() - start < 2
    assert isinstance(caught.value, (CorruptFile, ModelNotFound, UnsupportedModel))
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 400, message
    for name in named:
        assert name in message


# ---- GGUF metadata ------------------------------------------------------------------------------


def bpe() -> dict[str, Any]:
    letters = golden._byte_alphabet()
    return {
        "general.architecture": "llama",
        KEY + "model": "gpt2",
        KEY + "pre": "gpt-2",
        KEY + "tokens": [*letters, "ab", "<s>", "</s>"],
        KEY + "token_type": np.array([1] * 257 + [3, 3], np.int32),
        KEY + "merges": ["a b"],
        KEY + "bos_token_id": 257,
        KEY + "eos_token_id": 258,
    }


def spm() -> dict[str, Any]:
    values = golden.spm_metadata()
    values[KEY + "scores"] = np.array(values[KEY + "scores"], np.float32)
    values[KEY + "token_type"] = np.array(values[KEY + "token_type"], np.int32)
    return values


def with_item(values: Any, at: int, item: Any) -> Any:
    values = values.copy()
    values[at] = item
    return values


GONE = object()
S = spm()
B = bpe()
GGUF_CASES: list[tuple[Callable[[], dict[str, Any]], str, Any]] = [
    *((make, field, GONE) for make in (bpe, spm) for field in ("model", "tokens")),
    *((make, "model", value) for make in (bpe, spm) for value in (7, None, "", ["gpt2"], "t5")),
    *((bpe, "pre", value) for value in (GONE, 3, "", "default", "\x1b[31m" * 99)),
    *((make, "tokens", value) for make in (bpe, spm) for value in ([], "text", 7, {"a": 1})),
    (bpe, "tokens", np.arange(5)),
    (bpe, "tokens", with_item(B[KEY + "tokens"], 3, b"\xff")),
    (bpe, "tokens", with_item(B[KEY + "tokens"], 3, 5)),
    (bpe, "tokens", with_item(B[KEY + "tokens"], 3, "\ud800")),
    (bpe, "tokens", with_item(B[KEY + "tokens"], 3, "ab")),  # twice
    (bpe, "tokens", B[KEY + "tokens"][:100]),  # fewer than types
    (spm, "tokens", with_item(S[KEY + "tokens"], 300, b"\xff")),
    (spm, "tokens", with_item(S[KEY + "tokens"], 300, "<s>")),
    (spm, "tokens", with_item(S[KEY + "tokens"], 5, "<0xZZ>")),  # a byte
    (spm, "tokens", with_item(S[KEY + "tokens"], 5, "byte")),
    (spm, "tokens", [*S[KEY + "tokens"], "one more"]),
    *((make, "token_type", S[KEY + "token_type"][:50]) for make in (bpe, spm)),
    *((make, "token_type", "1111") for make in (bpe, spm)),
    (bpe, "token_type", with_item(B[KEY + "token_type"], 7, 0)),
    (bpe, "token_type", with_item(B[KEY + "token_type"], 7, 7)),
    (bpe, "token_type", with_item(B[KEY + "token_type"], 7, -1)),
    (bpe, "token_type", B[KEY + "token_type"].astype(np.float32)),
    (bpe, "token_type", [[1]] * 259),
    (bpe, "token_type", [[1], [1, 2]]),
    (spm, "token_type", GONE),
    (spm, "token_type", with_item(S[KEY + "token_type"], 9, 1)),  # 255 bytes
    *((spm, "scores", value) for value in (GONE, [], "x", S[KEY + "scores"][:-1], 1.0)),
    (spm, "scores", with_item(S[KEY + "scores"], 400, np.nan)),
    (spm, "scores", with_item(S[KEY + "scores"], 400, np.inf)),
    (spm, "scores", ["a"] * len(S[KEY + "tokens"])),
    *((bpe, "merges", value) for value in (GONE, 3, "a b", np.arange(4), ["ab"], ["a b c"], [""])),
    *((bpe, "merges", value) for value in (["a zz"], ["zz a"], [3], [b"a b"], ["b a"], [None])),
    *(
        (make, f"{name}_token_id", value)
        for make in (bpe, spm)
        for name in ("bos", "eos", "eot", "eom")
        for value in (10**6, -1, "1", 1.5, True, [1], 2**32 - 1)
    ),
    *((spm, "unknown_token_id", value) for value in (10**6, -1, "0")),
    *((make, "add_bos_token", value) for make in (bpe, spm) for value in (1, "true", [])),
    *((spm, "add_space_prefix", value) for value in (1, "true")),
]


@pytest.mark.parametrize("case", range(len(GGUF_CASES)))
def test_gguf_metadata(case):
    make, field, value = GGUF_CASES[case]
    values = make()
    values[KEY + field] = value
    if value is GONE:
        del values[KEY + field]
    refused(lambda: tokenizer_from_gguf(values, where="x.gguf"), "x.gguf")


def test_gguf_metadata_names_the_field():
    for field, value in ("tokens", []), ("merges", 3), ("token_type", "1"), ("bos_token_id", -1):
        refused(lambda: tokenizer_from_gguf({**bpe(), KEY + field: value}), KEY + field)  # noqa: B023
    template = {**bpe(), "tokenizer.chat_template": 3}
    refused(lambda: tokenizer_from_gguf(template), "tokenizer.chat_template")
    begin = {**bpe(), KEY + "add_bos_token": True}
    del begin[KEY + "bos_token_id"]
    refused(lambda: tokenizer_from_gguf(begin), "bos_token")


def test_there_are_enough_cases():
    assert len(GGUF_CASES) >= 40
    assert len(JSON_CASES) >= 40
    assert len(MODEL_CASES) >= 40


# ---- tokenizer.json -----------------------------------------------------------------------------


LONG = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def spec() -> dict[str, Any]:
    letters = golden._byte_alphabet()
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 257, "content": "<s>", "special": True, **special}],
        "normalizer": None,
        "pre_tokenizer": LONG,
        "post_processor": None,
        "decoder": LONG,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {**{c: i for i, c in enumerate(letters)}, "ab": 256},
            "merges": ["a b"],
        },
    }


def steps(step: dict[str, Any], count: int) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": [step] * count}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern: str, behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def around(tokens: int, times: int) -> dict[str, Any]:
    name = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    ids = {"id": "<s>", "ids": [257] * tokens, "tokens": ["<s>"] * tokens}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [*[name] * times, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": ids},
    }


# A path into the spec, and what to write there.
JSON_CASES: list[tuple[str, Any]] = [
    *((field, 7) for field in ("version", "added_tokens", "normalizer", "pre_tokenizer", "model")),
    *((field, GONE) for field in ("model", "decoder", "model.vocab", "model.merges")),
    *(("model.vocab", value) for value in (7, [], {}, {"a": "b"}, {"a": -1}, {"a": 1.5})),
    *(("model.vocab", value) for value in ({"a": 2**32}, {"a": 2**32 - 1}, {"a": 0, "b": 0})),
    ("model.vocab", {"a": 1 << 22, "b": 0, "ab": 1}),
    *(("model.merges", value) for value in (7, ["ab"], ["a zz"], [["a"]], [["a", "b", "c"]], [1])),
    *(("model.type", value) for value in (7, "None", "Unigram", "WordPiece")),
    *(("model.dropout", value) for value in ("x", 2.0)),
    ("added_tokens", [{"id": 999, "content": "<s>", "special": True}]),
    ("added_tokens.0.id", 300),  # the library would give it 257
    ("added_tokens.0.id", -1),
    ("added_tokens.0.id", "257"),
    ("added_tokens.0.content", 5),
    ("added_tokens.0", "token"),
    *(("decoder", value) for value in (None, 7, {"type": "WordPiece"})),
    ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}),
    ("decoder", {"type": "BPEDecoder", "suffix": "</w>"}),
    ("decoder", {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True}),
    ("decoder", {"type": "Strip", "content": "x", "start": 1, "stop": 0}),
    ("decoder", {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}),
    ("decoder", {"type": "Sequence", "decoders": []}),
    ("decoder", {"type": "Fuse"}),
    ("normalizer", {"type": "NoSuch"}),
    ("normalizer", {"type": "Nmt"}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "!!"}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("normalizer", steps(replace({"String": "a"}, "a" * 20), 8)),  # a text grows 10^10 times
    ("normalizer", replace({"String": "a"}, "a" * 10**6)),
    ("normalizer", replace({"Regex": ""}, "a" * 1000)),
    ("normalizer", replace({"Regex": "("}, "a")),
    ("normalizer", {"type": "Prepend", "prepend": "a" * 10**6}),
    ("normalizer", steps({"type": "NFC"}, 9)),
    ("pre_tokenizer", {"type": "NoSuch"}),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [LONG] * 40}),  # each doubles a text
    ("pre_tokenizer", split("[", "Isolated")),
    ("pre_tokenizer", split("a", "NoSuch")),
    ("post_processor", {"type": "NoSuch"}),
    ("post_processor", around(100_000, 1)),
    ("post_processor", around(1000, 1000)),
    ("post_processor", {"type": "Sequence", "processors": [around(40, 1)] * 5}),
]


@pytest.mark.parametrize("case", range(len(JSON_CASES)))
def test_tokenizer_json(case, tmp_path):
    path, value = JSON_CASES[case]
    whole = copy.deepcopy(spec())
    *above, last = (int(key) if key.isdigit() else key for key in path.split("."))
    part: Any = whole
    for key in above:
        part = part[key]
    if value is GONE:
        del part[last]
    else:
        part[last] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    refused(lambda: load_tokenizer(tmp_path), "tokenizer.json")


@pytest.mark.parametrize(
    ("vocab", "what"),
    [
        ({}, "the vocabulary is empty"),
        ({"a": 0, "b": 0}, "two tokens share an id"),
        ({"a": 2**32 - 1}, "the highest token id is 4294967295"),
        ({"a": 1 << 22}, "the highest token id is 4194304"),
    ],
)
def test_vocabulary_of_tokenizer_json(vocab, what, tmp_path):
    whole = spec()
    whole["added_tokens"] = []
    whole["model"] |= {"vocab": vocab, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    refused(lambda: load_tokenizer(tmp_path), "tokenizer.json: model.vocab", what)


def test_the_json_they_were_made_from_is_sound(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec()))
    assert load_tokenizer(tmp_path).encode("ab<s>") == [256, 257]


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b'{"a": 1}', b"[" * 100_000, b'{"a":' * 50_000]
    + [json.dumps(spec()).encode()[:n] for n in (10, 100, 1000, 2000)]
    + [b'{"model": {}, "model": {}}', b"version https://git-lfs.github.com/spec/v1\noid sha256:0"],
)
def test_tokenizer_json_that_is_none(raw, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(raw)
    refused(lambda: load_tokenizer(tmp_path), "tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_what_is_no_file(name, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec()))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)  # opening it would wait for ever
    whole = name != "tokenizer.model"
    refused(lambda: load_tokenizer(tmp_path if whole else tmp_path / name), name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused(lambda: load_tokenizer(tmp_path if whole else tmp_path / name), name)


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    with open(path, "wb") as file:
        file.truncate(10**12)  # sparse
    refused(lambda: load_tokenizer(path), "tokenizer.json")


def test_a_pattern_that_runs_for_ever_ends_in_one_line(tmp_path):
    whole = spec()
    whole["pre_tokenizer"] = split("(a+)+$", "Isolated")
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer = load_tokenizer(tmp_path)
    refused(lambda: tokenizer.encode("a" * 5000 + "!"), "tokenizer.json")


# ---- the files beside ---------------------------------------------------------------------------

SIDE_CASES: list[tuple[str, Any]] = [
    *(("tokenizer_config.json", value) for value in (7, [], None, {"add_bos_token": "yes"})),
    *(("tokenizer_config.json", {f"{name}_token": 5}) for name in ("bos", "eos")),
    *(("tokenizer_config.json", {f"{name}_token": "<none>"}) for name in ("bos", "eos")),
    ("tokenizer_config.json", {"bos_token": {"content": 5}}),
    ("tokenizer_config.json", {"add_bos_token": True, "bos_token": ""}),
    *(
        ("tokenizer_config.json", {"eos_token_id": v})
        for v in (-1, "2", [1, "2"], 2**40, True, 999)
    ),
    *(("tokenizer_config.json", {"chat_template": v}) for v in (5, {"a": 1}, True)),
    *(("tokenizer_config.json", {"added_tokens_decoder": v}) for v in (5, [], {"x": {}})),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": ""}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": 5}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}),
    ("special_tokens_map.json", {"eos_token": ["</s>"]}),
    ("special_tokens_map.json", []),
    ("added_tokens.json", {"x": -1}),
    ("added_tokens.json", {"x": "1"}),
    ("chat_template.json", {"chat_template": 5}),
    ("chat_template.json", []),
    ("chat_template.jinja", b"\xff\xfe\x00"),
    ("tokenizer_config.json", b"{"),
    ("tokenizer_config.json", b'{"a": 1, "a": 2}'),
    ("tokenizer_config.json", b"[" * 100_000),
]


# What is well formed, but names something that the vocabulary lacks.
BETWEEN = [i for i, (_, v) in enumerate(SIDE_CASES) if "<none>" in str(v) or "999}" in str(v)]
BETWEEN += [i for i, (_, v) in enumerate(SIDE_CASES) if "add_bos_token': True" in str(v)]


@pytest.mark.parametrize("case", range(len(SIDE_CASES)))
def test_files_beside(case, tmp_path):
    name, value = SIDE_CASES[case]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec()))
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    (tmp_path / name).write_bytes(raw)
    refused(lambda: load_tokenizer(tmp_path), "tokenizer.json" if case in BETWEEN else name)


# ---- tokenizer.model ----------------------------------------------------------------------------


def sound_model() -> bytes:
    out = io.BytesIO()
    lines = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return out.getvalue()


def changed(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def run(raw: bytes) -> bytes:
        model = ModelProto.FromString(raw)
        change(model)
        return model.SerializeToString()

    return run


def set_piece(at: int, **fields: Any) -> Callable[[bytes], bytes]:
    def change(model: Any) -> None:
        for name, value in fields.items():
            setattr(model.pieces[at], name, value)

    return changed(change)


def normalize(charsmap: bytes) -> Callable[[bytes], bytes]:
    def change(model: Any) -> None:
        model.normalizer_spec.precompiled_charsmap = charsmap

    return changed(change)


def cut(n: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[: n if n > 0 else len(raw) + n]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0"
MODEL_CASES: list[Callable[[bytes], bytes]] = [
    *(lambda raw, b=b: b for b in (b"", b"\0", b"\xff" * 100, b"{}", LFS, b"GGUF" + b"\0" * 99)),
    *(cut(n) for n in (1, 2, 3, 5, 10, 100, 1000, 2000, -1, -2, -7, -40)),
    lambda raw: raw + b"\x0a",
    lambda raw: raw + b"\x0a\xff\xff\xff\xff\x0f",  # a piece of 4 GB
    lambda raw: b"\x0a\xff\xff\xff\xff\x0f" + raw,
    changed(lambda model: model.ClearField("pieces")),
    changed(lambda model: model.pieces.pop(0)),  # no unknown piece
    changed(lambda model: model.pieces.pop(10)),  # 255 bytes
    changed(lambda model: model.pieces.add(piece="▁the", type=1)),
    changed(lambda model: model.pieces.add(piece="", type=1)),
    changed(lambda model: model.pieces.add(piece="<unk2>", type=2)),
    changed(lambda model: model.pieces.add(piece="<0x00>", type=6)),
    changed(lambda model: model.pieces.add(piece="<0xZZ>", type=6)),
    changed(lambda model: model.pieces.add(piece="byte", type=6)),
    set_piece(0, type=1),
    set_piece(0, type=3),
    set_piece(0, piece=""),
    set_piece(5, piece="x"),
    set_piece(5, type=1),
    set_piece(300, piece="<s>"),
    set_piece(300, piece=""),
    set_piece(300, type=2),
    set_piece(300, type=6),
    *(normalize(raw) for raw in (b"x", b"\xff\xff\xff\xff", b"\4\0\0\0abcd", b"\0" * 4)),
    normalize(base64.b64decode("AAEAAA==") + bytes(range(256))),
    normalize(b"\0\1\0\0" + b"\xff" * 256 + b"abc\0"),
]


@pytest.fixture(scope="session")
def model_file() -> bytes:
    return sound_model()


@pytest.mark.parametrize("case", range(len(MODEL_CASES)))
def test_tokenizer_model(case, model_file, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MODEL_CASES[case](model_file))
    refused(lambda: load_tokenizer(tmp_path), "tokenizer.model")


def test_added_tokens_with_a_gap(model_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_file)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 4_000_000}))
    refused(lambda: load_tokenizer(tmp_path), "tokenizer.model", "gap")


@pytest.mark.parametrize("seed", range(6))
def test_bytes_changed_at_random(seed, model_file, tmp_path):
    """Whatever happens to a file: it loads and encodes, or is refused in one line."""
    rng = random.Random(seed)
    sources = {"tokenizer.model": model_file, "tokenizer.json": json.dumps(spec()).encode()}
    for _ in range(60):
        for name, raw in sources.items():
            data = bytearray(raw)
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path = Path(tmp_path / name)
            path.write_bytes(data)
            try:
                tokenizer = load_tokenizer(path)
                tokenizer.decode(tokenizer.encode("the quick ☃ fox <s>"))
            except JaxinferError as error:
                assert str(error).isprintable()  # noqa: PT017
