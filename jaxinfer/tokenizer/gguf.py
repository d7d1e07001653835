"""A tokenizer rebuilt from the metadata of a GGUF file.

Such a file carries the vocabulary, but only the name of the rule that cuts a text into words. The
rules are facts about the models: each pattern is the one in the tokenizer.json of its family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxinfer.checkpoint.fields import REQUIRED, Fields
from jaxinfer.checkpoint.source import one_line
from jaxinfer.errors import CorruptFile
from jaxinfer.tokenizer import spm
from jaxinfer.tokenizer.base import MAX_VOCAB, Added, Settings, Tokenizer
from jaxinfer.tokenizer.bpe import bpe_tokenizer

MAX_MERGES = 1 << 23
MAX_ID = MAX_VOCAB - 1
KEY = "tokenizer.ggml."

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a family cuts a text into words, and what goes with it."""

    pattern: str | None = None  # of a word; None: that of GPT-2
    digits: bool = False  # cut out every digit first
    ignore_merges: bool = False  # a word that is a token is that token, however it merges
    adds_bos: bool = False  # unless the file says otherwise
    nfc: bool = False  # compose characters first


_LLAMA3_RULE = Rule(_LLAMA3, ignore_merges=True, adds_bos=True)
RULES: Mapping[str, Rule] = {
    "gpt-2": Rule(),
    "olmo": Rule(),
    "smollm": Rule(digits=True),
    "llama-bpe": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "smaug-bpe": Rule(_LLAMA3),  # SmolLM3
    "dbrx": Rule(_LLAMA3),  # OLMo 2, Phi-4
    "qwen2": Rule(_QWEN2, nfc=True),  # and Qwen3
    "deepseek-r1-qwen": Rule(_QWEN2),
    "tekken": Rule(_TEKKEN, ignore_merges=True, adds_bos=True),  # Mistral NeMo
}


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, where: str = "GGUF file") -> Tokenizer:
    """The tokenizer that a GGUF file describes.

    Args:
      metadata: key -> value as `jaxinfer.checkpoint.gguf.GGUFFile` reads it.
      where: the file, for messages.

    Raises CorruptFile for malformed metadata; UnsupportedModel, with its name, for a kind of
    tokenizer or of pre-tokenizer that no supported family uses.
    """
    fields = Fields(metadata, where)
    build = fields.choice(KEY + "model", REQUIRED, {"gpt2": _byte_level, "llama": _sentencepiece})
    return build(fields, _tokens(fields))


def _byte_level(fields: Fields, tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE."""
    where = fields.where
    rule = fields.choice(KEY + "pre", REQUIRED, RULES)
    types = _types(fields, len(tokens)) or [spm.NORMAL] * len(tokens)
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    merges = fields.get(KEY + "merges", REQUIRED)
    if not isinstance(merges, list) or len(merges) > MAX_MERGES:
        raise fields.corrupt(KEY + "merges", f"a list of up to {MAX_MERGES} texts")
    try:
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    except (AttributeError, TypeError, ValueError):
        raise CorruptFile(f"{where}: {KEY}merges holds one that is not two words") from None
    try:
        model = models.BPE(vocab, pairs, ignore_merges=rule.ignore_merges)
    except Exception as error:  # words, alone or merged, that are no tokens
        raise CorruptFile(f"{where}: {KEY}merges: {one_line(error, 200)}") from None

    backend = tokenizers.Tokenizer(model)
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    by_word = [
        *([pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []),
        *([pre_tokenizers.Split(Regex(rule.pattern), "isolated")] if rule.pattern else []),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(by_word)
    backend.decoder = decoders.ByteLevel()
    for special, kinds in (True, (spm.CONTROL, spm.UNKNOWN)), (False, (spm.USER_DEFINED,)):
        texts = [text for text, kind in zip(tokens, types, strict=True) if kind in kinds]
        added = [AddedToken(text, special=special, normalized=False) for text in texts]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    bos_id = fields.integer_or_none(KEY + "bos_token_id", least=0, most=len(tokens) - 1)
    settings = _settings(fields, tokens, bos_id, None, rule.adds_bos, {})
    return bpe_tokenizer(backend, settings, where=where, vocab_size=len(tokens))


def _sentencepiece(fields: Fields, tokens: Sequence[str]) -> Tokenizer:
    """SentencePiece's BPE. Ids and flags that are absent are Llama's, as in llama.cpp."""
    most = len(tokens) - 1
    types = _types(fields, len(tokens))
    if types is None:
        raise CorruptFile(f"{fields.where}: {KEY}token_type is missing")
    scores = _numbers(fields, "scores", len(tokens))
    if scores is None or not np.isfinite(scores).all():
        raise fields.corrupt(KEY + "scores", "a finite number for every token")
    unk_id = fields.integer("tokenizer.ggml.unknown_token_id", 0, least=0, most=most)
    # SentencePiece wants one unknown piece; files also call it, and others, control tokens.
    types = [spm.CONTROL if kind == spm.UNKNOWN else kind for kind in types]
    types[unk_id] = spm.UNKNOWN
    space_prefix = fields.flag(KEY + "add_space_prefix", True)
    # Phi-3 was trained with tokens that swallow the white space behind them; no file says so.
    phi3 = fields.get("general.architecture") == "phi3"
    keeps_space = {"<unk>", "<s>", "<|endoftext|>"}
    # Where every text begins with a space, SentencePiece would put it in front of a user-defined
    # token too; the models saw it behind, so there these tokens are cut out beforehand.
    found = {spm.CONTROL, spm.USER_DEFINED} if space_prefix else {spm.CONTROL}
    added = {
        i: Added(text, special=kind == spm.CONTROL, rstrip=phi3 and text not in keeps_space)
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in found and (phi3 or kind == spm.USER_DEFINED)
    }
    raw = spm.build_model(tokens, scores.tolist(), types, space_prefix=space_prefix)
    bos_id = fields.integer(KEY + "bos_token_id", min(1, most), least=0, most=most)
    eos_id = fields.integer(KEY + "eos_token_id", min(2, most), least=0, most=most)
    settings = _settings(fields, tokens, bos_id, eos_id, True, added)
    return spm.spm_tokenizer(raw, settings, where=fields.where)


def _tokens(fields: Fields) -> list[str]:
    """The vocabulary: V different texts."""
    name = KEY + "tokens"
    tokens = fields.get(name, REQUIRED)
    if not isinstance(tokens, list) or not 0 < len(tokens) <= MAX_VOCAB:
        raise fields.corrupt(name, f"a list of 1 to {MAX_VOCAB} texts")
    try:
        "".join(tokens).encode()
    except (TypeError, UnicodeEncodeError):
        raise CorruptFile(f"{fields.where}: {name} holds a token that is not UTF-8 text") from None
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        raise CorruptFile(f"{fields.where}: {name} holds the same token twice")
    return tokens


def _numbers(fields: Fields, field: str, length: int) -> np.ndarray | None:
    """An array of `length` numbers; None where it is absent."""
    value = fields.get(KEY + field)
    if value is None:
        return None
    expected = f"{length} numbers, one a token"
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise fields.corrupt(KEY + field, expected) from None
    if array.shape != (length,) or array.dtype.kind not in "iuf":
        raise CorruptFile(
            f"{fields.where}: {KEY}{field} has shape {array.shape} of {array.dtype};"
            f" expected {expected}"
        )
    return array


def _types(fields: Fields, length: int) -> list[int] | None:
    """The type of every token; None where there are none."""
    array = _numbers(fields, "token_type", length)
    if array is None:
        return None
    wrong = np.flatnonzero((array < spm.NORMAL) | (array > spm.BYTE))
    if array.dtype.kind == "f" or wrong.size:
        at = wrong[0] if wrong.size else 0
        raise CorruptFile(
            f"{fields.where}: {KEY}token_type of token {at} is {array[at]}; expected 1 to 6"
        )
    return array.tolist()


def _settings(
    fields: Fields,
    tokens: Sequence[str],
    bos_id: int | None,
    eos_id: int | None,
    adds_bos: bool,
    added: Mapping[int, Added],
) -> Settings:
    """Everything besides the vocabulary; `eos_id` and `adds_bos` are defaults."""
    most = len(tokens) - 1
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    eos_ids = [
        i
        for name in names
        if (i := fields.integer_or_none(KEY + name, least=0, most=most)) is not None
    ] or ([] if eos_id is None else [eos_id])
    template = fields.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise fields.corrupt("tokenizer.chat_template", "a text")
    return Settings(
        bos_token=None if bos_id is None else tokens[bos_id],
        eos_token=tokens[eos_ids[0]] if eos_ids else None,
        eos_ids=tuple(eos_ids),
        adds_bos=fields.flag(KEY + "add_bos_token", adds_bos),
        chat_template=template,
        added=added,
    )
