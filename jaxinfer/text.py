"""From token ids to the text a user sees: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Turns ids into text as they come; see `Tokenizer.stream`."""

    def push(self, token: int) -> str:
        """New text; never half a character."""
        ...

    def finish(self) -> str:
        """What was held back."""
        ...


class TextWriter:
    """Writes one sequence. Text that may yet become a stop string is held back until it cannot."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self.text = ""  # all that was handed out so far
        self.token_ids: list[int] = []
        self.stopped = False  # a stop string was met
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token: int, *, silent: bool = False) -> str:
        """Add a token and return the text that is now certain; a `silent` one (an end) has none."""
        self.token_ids.append(token)
        return "" if silent else self._write(self._detokenizer.push(token))

    def finish(self) -> str:
        """Return what was held back, at the end of the sequence."""
        if self.stopped:
            return ""
        certain = self._write(self._detokenizer.finish())
        rest, self._held = self._held, ""
        self.text += rest
        return certain + rest

    def _write(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            certain, self._held = text[: min(found)], ""
        else:
            keep = max((_overlap(text, s) for s in self._stop), default=0)
            certain, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
