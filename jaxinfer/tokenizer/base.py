"""`Tokenizer` and `Detokenizer`: what the rest of the library sees, the same for every backend.

A backend says which bytes an id stands for; turning bytes into text happens here, once. So decoding
a whole list and decoding it id by id are the same computation and cannot differ. (The incremental
decoder of `tokenizers` raises on some byte tokens that are no valid UTF-8, and takes quadratic time
on long runs of them.)
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from jaxinfer.errors import InvalidArgument

MAX_VOCAB = 1 << 22  # ids; the largest vocabulary of a supported family has 262,144

# Control tokens with these texts end an answer, whether or not the files name them as such: chat
# models leave their turn with one of them, and many files name only the end of a document.
END_TOKENS = frozenset(
    {
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>"),
        *("<|endoftext|>", "<|end_of_text|>", "<EOT>"),
    }
)
# Ends of a document, for files that name no end token at all.
DOCUMENT_ENDS = ("</s>", "<eos>")


@dataclasses.dataclass(frozen=True)
class Added:
    """A token that is looked for in the text itself, before the text is cut into pieces."""

    text: str
    special: bool  # a control token: no part of the text
    rstrip: bool = False  # swallows the white space behind it


@dataclasses.dataclass(frozen=True)
class Settings:
    """What files say about a tokenizer besides its vocabulary; None where they say nothing."""

    bos_token: str | None = None
    eos_token: str | None = None
    eos_ids: tuple[int, ...] = ()  # besides `eos_token`
    adds_bos: bool | None = None
    chat_template: str | None = None
    added: Mapping[int, Added] = dataclasses.field(default_factory=dict)  # id -> token


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text <-> ids.

    `eos_ids` joins what the tokenizer's own files name with the well-known `END_TOKENS`; whoever
    loads a model joins the end tokens of its generation_config to them.
    """

    vocab_size: int  # ids are 0 .. vocab_size-1; the logits of a model may be wider
    bos_id: int | None
    eos_ids: tuple[int, ...]  # any of them ends a sequence; the first is `eos_token`
    adds_bos: bool  # `encode` puts `bos_id` in front when asked for special tokens
    bos_token: str  # text of the tokens, "" when absent: chat templates write them
    eos_token: str
    chat_template: str | None  # jinja source
    special_ids: frozenset[int]  # control tokens: no part of the text
    strips_space: bool  # encoding puts a space in front of a text; decoding takes one away
    encode_text: Callable[[str, bool], list[int]]  # (text, add_special) -> ids
    token_text: Callable[[int], str]  # id -> the token as the vocabulary spells it
    token_bytes: Callable[[int], bytes]  # id -> the bytes of text it stands for
    settings: Settings  # what it was made with, besides the model file
    model_file: Callable[[], tuple[str, bytes]]  # name and content of that file

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of a text. Special tokens spelled in the text become their ids.

        Args:
          text: what to encode.
          add_special: put in front (or behind) what the model expects around a text, such as BOS.
            False for a rendered chat template, which has written them already.

        Raises InvalidArgument for something that is no text.
        """
        if not isinstance(text, str):
            raise InvalidArgument(f"text to encode is a {type(text).__name__}; expected a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(
                f"text to encode holds half a character (a lone surrogate) at {error.start}"
            ) from None
        return self.encode_text(text, add_special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids. Ids that the tokenizer does not know (a padded vocabulary) have no text."""
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.finish()])

    def stream(self, *, skip_special: bool = True, continues: bool = False) -> Detokenizer:
        """An incremental decoder: its pieces, joined, are what `decode` returns.

        Where it `continues` a text, the space in front of the first word is the text's own.
        """
        return Detokenizer(self, skip_special=skip_special, continues=continues)

    def id_to_token(self, token_id: int) -> str:
        """The token as the vocabulary spells it ("Ġthe", "▁the", "<0x0A>"), for display.

        Raises InvalidArgument for an id outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise InvalidArgument(f"token id {token_id} is outside 0..{self.vocab_size - 1}")
        return self.token_text(int(token_id))


class Detokenizer:
    """Ids -> text, one id at a time; see `Tokenizer.stream`."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, continues: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset[int]()
        self._strip = tokenizer.strips_space and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes; a character whose bytes are not all there waits."""
        if token_id in self._skip or not 0 <= token_id < self._tokenizer.vocab_size:
            return ""
        piece = self._tokenizer.token_bytes(int(token_id))
        if self._strip and piece:
            self._strip = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What was held back: U+FFFD where the ids end inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)


def find_eos_ids(named: Iterable[int | None], special: Mapping[str, int]) -> tuple[int, ...]:
    """End tokens: those the files name, in their order, then the well-known ones.

    Args:
      named: ids from the files' fields; None where a field is absent.
      special: text -> id of the control tokens.
    """
    ids = [i for i in named if i is not None] or [
        special[text] for text in DOCUMENT_ENDS if text in special
    ]
    ids += sorted(i for text, i in special.items() if text in END_TOKENS)
    return tuple(dict.fromkeys(ids))
