"""The `sentencepiece` backend: tokenizer.model, and the same kind of model rebuilt from GGUF.

SentencePiece never finds control tokens in a text, by design; here they are cut out of the text
first, and what lies between them is encoded piece by piece, as llama.cpp and `tokenizers` do.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence, Set

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from jaxinfer.checkpoint.source import one_line
from jaxinfer.errors import CorruptFile
from jaxinfer.tokenizer.base import MAX_VOCAB, Added, Settings, Tokenizer, find_eos_ids

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of a piece
SPACE = "▁"  # how a piece spells a space


def build_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    space_prefix: bool,
) -> bytes:
    """A serialized BPE ModelProto.

    Args:
      pieces: V texts; spaces in them may be written as spaces.
      scores: V numbers: the pair whose joint piece scores highest is merged first.
      types: V of the numbers above, exactly one of them UNKNOWN.
      space_prefix: put a space in front of a text.
    """
    message = ModelProto()
    message.trainer_spec.model_type = message.trainer_spec.BPE
    message.trainer_spec.vocab_size = len(pieces)
    message.trainer_spec.byte_fallback = BYTE in types
    message.normalizer_spec.add_dummy_prefix = space_prefix
    message.normalizer_spec.remove_extra_whitespaces = False
    # The pieces are written in the wire format here, because filling in a Python object for each
    # takes ten times as long: field 1 of the model is a piece, with fields 1 text, 2 score, 3 type.
    out = []
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        text = piece.replace(" ", SPACE).encode()
        body = b"\n%b%b\x15%b\x18%c" % (_varint(len(text)), text, struct.pack("<f", score), kind)
        out.append(b"\n%b%b" % (_varint(len(body)), body))
    return b"".join([*out, message.SerializeToString()])


def _varint(number: int) -> bytes:
    """A non-negative integer in protobuf's wire format: 7 bits a byte, the lowest first."""
    if number < 0x80:
        return bytes((number,))
    return bytes((number & 0x7F | 0x80,)) + _varint(number >> 7)


def spm_tokenizer(raw: bytes, settings: Settings, *, where: str) -> Tokenizer:
    """A tokenizer from a serialized ModelProto, with `settings.added` appended or changed.

    Raises CorruptFile, naming `where`.
    """
    try:
        model = ModelProto.FromString(raw)
    except DecodeError:
        raise CorruptFile(f"{where}: is no SentencePiece model") from None
    if not 0 < len(model.pieces) <= MAX_VOCAB:
        raise CorruptFile(f"{where}: has {len(model.pieces)} pieces; expected 1 to {MAX_VOCAB}")
    _add(model, settings.added, where)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model.SerializeToString() if settings.added else raw)
    except (RuntimeError, ValueError) as error:
        raise CorruptFile(f"{where}: is no SentencePiece model: {one_line(error, 120)}") from None

    pieces = [piece.piece for piece in model.pieces]
    types = [piece.type for piece in model.pieces]
    if UNKNOWN not in types:
        raise CorruptFile(f"{where}: has no piece for what is unknown")
    special = {t: i for i, t in enumerate(pieces) if types[i] in (UNKNOWN, CONTROL)}
    special_ids = frozenset(special.values())
    vocab_size = len(pieces)
    byte_of = {i: int(t[3:5], 16) for i, t in enumerate(pieces) if types[i] == BYTE}

    def named(text: str | None, default: int, field: str) -> int | None:
        if not text:
            return None if default < 0 else default
        token_id = processor.piece_to_id(text)
        if pieces[token_id] != text:  # unknown texts get the unknown piece
            raise CorruptFile(f"{where}: {field} {one_line(text)} is not in the vocabulary")
        return token_id

    bos_id = named(settings.bos_token, processor.bos_id(), "bos_token")
    eos_id = named(settings.eos_token, processor.eos_id(), "eos_token")
    eos_ids = find_eos_ids([eos_id, *settings.eos_ids], special)
    if max(eos_ids, default=0) >= vocab_size:
        raise CorruptFile(f"{where}: eos_token_id {max(eos_ids)} is outside 0..{vocab_size - 1}")
    if settings.adds_bos and bos_id is None:
        raise CorruptFile(f"{where}: add_bos_token is true, but there is no bos_token")
    # Families with a SentencePiece vocabulary begin every text with BOS unless the files deny it.
    adds_bos = bos_id is not None and settings.adds_bos is not False
    encode_ids = _encoder(
        processor.encode,
        special | {token.text: i for i, token in settings.added.items()},
        frozenset(token.text for token in settings.added.values() if token.rstrip),
    )

    def encode(text: str, add_special: bool) -> list[int]:
        ids = encode_ids(text)
        return [bos_id, *ids] if adds_bos and add_special and bos_id is not None else ids

    def to_bytes(token_id: int) -> bytes:
        if token_id in byte_of:
            return bytes((byte_of[token_id],))
        text = pieces[token_id]
        return text.encode() if token_id in special_ids else text.replace(SPACE, " ").encode()

    return Tokenizer(
        vocab_size=vocab_size,
        bos_id=bos_id,
        eos_ids=eos_ids,
        adds_bos=adds_bos,
        bos_token="" if bos_id is None else pieces[bos_id],
        eos_token=pieces[eos_ids[0]] if eos_ids else "",
        chat_template=settings.chat_template,
        special_ids=special_ids,
        strips_space=model.normalizer_spec.add_dummy_prefix,
        encode_text=encode,
        token_text=pieces.__getitem__,
        token_bytes=to_bytes,
        settings=settings,
        model_file=lambda: ("tokenizer.model", processor.serialized_model_proto()),
    )


def _add(model: ModelProto, added: Mapping[int, Added], where: str) -> None:
    """Write tokens that the model does not have into it."""
    for token_id, token in sorted(added.items()):
        if token_id > len(model.pieces):
            raise CorruptFile(
                f"{where}: added token {token_id} leaves a gap after {len(model.pieces)} pieces"
            )
        piece = model.pieces.add() if token_id == len(model.pieces) else model.pieces[token_id]
        if piece.type != UNKNOWN:
            piece.type = CONTROL if token.special else USER_DEFINED
        piece.piece = token.text


def _encoder(
    encode: Callable[[str], list[int]], found: Mapping[str, int], rstrip: Set[str]
) -> Callable[[str], list[int]]:
    """An encoder that first looks for the tokens of `found` in the text, the longest first.

    A text is tried at the places where a token may begin, and there by length: with thousands of
    tokens this is far quicker than one regular expression with thousands of alternatives.
    """
    lengths = sorted({len(text) for text in found if text}, reverse=True)
    begins = re.compile("|".join(re.escape(c) for c in sorted({t[0] for t in found if t})))
    white = re.compile(r"\s*")

    def encode_ids(text: str) -> list[int]:
        ids: list[int] = []
        start = at = 0  # of the text not yet encoded; of the next look
        while lengths and (begin := begins.search(text, at)):
            at = begin.start()
            token = next((t for n in lengths if (t := text[at : at + n]) in found), None)
            if token is None:
                at += 1
                continue
            if at > start:
                ids += encode(text[start:at])
            ids.append(found[token])
            at += len(token)
            if token in rstrip:
                at = white.match(text, at).end()  # type: ignore[union-attr]
            start = at
        return ids + encode(text[start:]) if start < len(text) else ids

    return encode_ids
