"""The `tokenizers` backend: tokenizer.json, and byte-level BPE built from GGUF metadata.

A tokenizer.json is a small program written by a stranger. Its steps are checked before any text
goes through them: known ones only, and few enough that a text cannot grow out of hand.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tokenizers

from jaxinfer.checkpoint.source import one_line
from jaxinfer.errors import CorruptFile, UnsupportedModel
from jaxinfer.tokenizer.base import MAX_VOCAB, Settings, Tokenizer, find_eos_ids

MAX_STEPS = 8  # of a normalizer, or of a pre-tokenizer; each may at most double a text
MAX_GROWTH = 64  # how many times longer a normalizer may make a text
MAX_AROUND = 64  # tokens that a post-processor puts around a text
NORMALIZERS = frozenset(
    {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend", "Replace"}
)

# Byte-level BPE spells each byte as one printable character (the GPT-2 alphabet): bytes that are
# printable in Latin-1 as themselves, the others, in order, as the characters from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_OF: Mapping[str, int] = {chr(b): b for b in _PRINTABLE} | {
    chr(0x100 + n): b for n, b in enumerate(b for b in range(0x100) if b not in _PRINTABLE)
}
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")  # a byte in the other spelling, SentencePiece's
SPACE = "▁"  # and how that one writes a space


def load_bpe(raw: bytes, settings: Settings, *, where: str) -> Tokenizer:
    """A tokenizer from the bytes of a tokenizer.json.

    Raises CorruptFile or UnsupportedModel, naming `where` and the field.
    """
    with _one_line_errors(f"{where}: is no tokenizer"):
        backend = tokenizers.Tokenizer.from_buffer(raw)
        added = {token["content"]: token["id"] for token in _added_tokens(raw)}
    for text, wanted in added.items():
        got = backend.token_to_id(text)
        if got != wanted:  # the library renumbers in silence
            raise CorruptFile(
                f"{where}: added_tokens: {one_line(text)} has id {wanted}, but would get {got}"
            )
    # A file may carry the settings of a training run.
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    return bpe_tokenizer(backend, settings, where=where)


def bpe_tokenizer(
    backend: tokenizers.Tokenizer, settings: Settings, *, where: str, vocab_size: int | None = None
) -> Tokenizer:
    """The public face of a backend; `vocab_size` saves counting where it is known."""
    token_bytes, strips_space = _decoding(backend, where)
    _refuse_growth(backend, where)
    if vocab_size is None:
        vocab_size = _count(backend, where)
    added = backend.get_added_tokens_decoder()  # id -> token; spelled as they are, in any alphabet
    special = {token.content: i for i, token in added.items() if token.special}
    with _one_line_errors(f"{where}: post_processor"):
        around = backend.encode("", add_special_tokens=True).ids

    bos_id = _named(backend, settings.bos_token, "bos_token", where)
    if bos_id is None and around and around[0] in special.values():
        bos_id = around[0]
    adds_bos = settings.adds_bos  # None: what the post-processor does
    if adds_bos and bos_id is None:
        raise CorruptFile(f"{where}: add_bos_token is true, but there is no bos_token")
    eos_id = _named(backend, settings.eos_token, "eos_token", where)
    eos_ids = find_eos_ids([eos_id, *settings.eos_ids], special)
    if max(eos_ids, default=0) >= vocab_size:
        raise CorruptFile(f"{where}: eos_token_id {max(eos_ids)} is outside 0..{vocab_size - 1}")

    def encode(text: str, add_special: bool) -> list[int]:
        with _one_line_errors(f"{where}: cannot encode a text"):
            if adds_bos is None:
                return backend.encode(text, add_special_tokens=add_special).ids
            ids = backend.encode(text, add_special_tokens=False).ids
        return [bos_id, *ids] if adds_bos and add_special and bos_id is not None else ids

    def to_bytes(token_id: int) -> bytes:
        token = backend.id_to_token(token_id) or ""
        return token.encode() if token_id in added else token_bytes(token)

    return Tokenizer(
        vocab_size=vocab_size,
        bos_id=bos_id,
        eos_ids=eos_ids,
        adds_bos=bos_id is not None and (around[:1] == [bos_id] if adds_bos is None else adds_bos),
        bos_token="" if bos_id is None else backend.id_to_token(bos_id) or "",
        eos_token=backend.id_to_token(eos_ids[0]) or "" if eos_ids else "",
        chat_template=settings.chat_template,
        special_ids=frozenset(special.values()),
        strips_space=strips_space,
        encode_text=encode,
        token_text=lambda i: backend.id_to_token(i) or "",
        token_bytes=to_bytes,
        settings=settings,
        model_file=lambda: ("tokenizer.json", backend.to_str().encode()),
    )


@contextlib.contextmanager
def _one_line_errors(message: str) -> Iterator[None]:
    """Whatever the library raises, as one CorruptFile; a Rust panic is no Exception in Python."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CorruptFile(f"{message}: {one_line(error, 200)}") from None
        raise


def _added_tokens(raw: bytes) -> list[dict[str, Any]]:
    """The list of that name in a tokenizer.json that has already been read once.

    Only this list: as Python objects, a vocabulary takes a second and most of a gigabyte.
    """
    text = raw.decode()
    found = re.search(r'"added_tokens"\s*:\s*', text)
    value = json.JSONDecoder().raw_decode(text, found.end())[0] if found else None
    return value if isinstance(value, list) else []


def _count(backend: tokenizers.Tokenizer, where: str) -> int:
    """One more than the highest id, once ids are known to be unique and sane."""
    ids = backend.get_vocab(with_added_tokens=True).values()
    highest = max(ids, default=-1)
    if not 0 <= highest < MAX_VOCAB:
        what = f"the highest token id is {highest}" if ids else "the vocabulary is empty"
        raise CorruptFile(f"{where}: model.vocab: {what}; expected 1 to {MAX_VOCAB} tokens")
    if len(set(ids)) != len(ids):
        raise CorruptFile(f"{where}: model.vocab: two tokens share an id")
    return highest + 1


def _named(backend: tokenizers.Tokenizer, text: str | None, field: str, where: str) -> int | None:
    """The id of a special token; an empty or missing text names none."""
    token_id = backend.token_to_id(text) if text else None
    if text and token_id is None:
        raise CorruptFile(f"{where}: {field} {one_line(text)} is not in the vocabulary")
    return token_id


def _spec(part: Any) -> Any:
    """A step of the pipeline as the JSON it was read from; None where there is none."""
    return None if part is None else json.loads(part.__getstate__())


def _steps(spec: Any) -> list[dict[str, Any]]:
    """The steps of a possibly nested Sequence, in order."""
    if spec is None:
        return []
    if spec["type"] != "Sequence":
        return [spec]
    inner = next(value for value in spec.values() if isinstance(value, list))
    return [step for item in inner for step in _steps(item)]


def _decoding(backend: tokenizers.Tokenizer, where: str) -> tuple[Callable[[str], bytes], bool]:
    """How a token becomes bytes, and whether a text loses its first space."""
    steps = _steps(_spec(backend.decoder))
    kinds = [step["type"] for step in steps]
    strips = False
    for step in steps:
        match step:
            case {"type": "ByteLevel" | "ByteFallback" | "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                pass
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                strips = True
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}:
                strips = scheme != "never"
            case _:
                raise UnsupportedModel(f"{where}: decoder {one_line(step)} is not supported")
    if "ByteLevel" in kinds:
        return _from_alphabet, strips
    if "Replace" in kinds or "Metaspace" in kinds:
        return _from_pieces if "ByteFallback" in kinds else _from_spaces, strips
    raise UnsupportedModel(f"{where}: decoder is missing; supported: ByteLevel, Replace, Metaspace")


def _from_alphabet(token: str) -> bytes:
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError:  # not in the byte alphabet: the token is the text itself
        return token.encode()


def _from_spaces(token: str) -> bytes:
    return token.replace(SPACE, " ").encode()


def _from_pieces(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else _from_spaces(token)


def _refuse_growth(backend: tokenizers.Tokenizer, where: str) -> None:
    """Ten steps that each replace a letter by a hundred turn one letter into all of memory."""
    normalizer = _steps(_spec(backend.normalizer))
    for field, steps in (
        ("normalizer", normalizer),
        ("pre_tokenizer", _steps(_spec(backend.pre_tokenizer))),
    ):
        if len(steps) > MAX_STEPS:
            raise UnsupportedModel(f"{where}: {field} has {len(steps)} steps, above {MAX_STEPS}")
    for step in normalizer:
        if step["type"] not in NORMALIZERS:
            raise UnsupportedModel(f"{where}: normalizer {step['type']} is not supported")
    growth = math.prod(map(_growth, normalizer))
    if growth > MAX_GROWTH:
        raise CorruptFile(
            f"{where}: normalizer may make a text {growth:.0f} times longer, above {MAX_GROWTH}"
        )
    around = 0
    for step in _steps(_spec(backend.post_processor)):
        if step["type"] == "TemplateProcessing":
            length = {name: len(t["ids"]) for name, t in step["special_tokens"].items()}
            pieces = [piece.get("SpecialToken") for piece in step["single"]]
            around += sum(length[piece["id"]] for piece in pieces if piece)
    if around > MAX_AROUND:
        raise CorruptFile(
            f"{where}: post_processor puts {around} tokens around a text, above {MAX_AROUND}"
        )


def _growth(step: dict[str, Any]) -> float:
    """How many times longer this step of a normalizer makes a text of one character, at most."""
    if step["type"] == "Prepend":
        return max(1.0, len(step["prepend"]))
    if step["type"] != "Replace":
        return 1.0
    shortest = len(step["pattern"].get("String", "")) or 0.5  # a regex matches even nothing
    return max(1.0, len(step["content"]) / shortest)
