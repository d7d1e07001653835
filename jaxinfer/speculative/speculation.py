"""How a caller wants tokens to be made: by which drafter, judged how."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from jaxinfer.errors import InvalidArgument
from jaxinfer.speculative.drafter import Drafter, NoDrafter
from jaxinfer.speculative.round import Plan

Verifier = Literal["auto", "exact", "rejection", "block"]

CANONICAL = 8  # T of every forward in exact mode; XLA:CPU charges 1.6 to 2.1 times one for it
MAX_DRAFT = 64  # bounds what is compiled; below MAX_BLOCK, so no cache is ever refused a rewind


@dataclasses.dataclass(frozen=True)
class Speculation:
    """A drafter, the rule that judges it, and whether rounding may differ from plain decoding.

    Raises:
      InvalidArgument: an unknown verifier, a bad draft length, a verifier that is not exact.
    """

    drafter: Drafter = dataclasses.field(default_factory=NoDrafter)
    verifier: Verifier = "auto"
    exact: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.drafter, Drafter):
            raise InvalidArgument(
                f"drafter={self.drafter!r:.60}: give a jaxinfer.speculative.Drafter, a name or None"
            )
        if self.verifier not in get_args(Verifier):
            choices = ", ".join(get_args(Verifier))
            raise InvalidArgument(f"verifier={self.verifier!r}: one of {choices}")
        length = self.drafter.num_draft
        fits = length == "auto" or (type(length) is int and 0 <= length <= MAX_DRAFT)
        if not fits:
            raise InvalidArgument(
                f"num_draft={length!r}: 'auto', or a number from 0 to {MAX_DRAFT}"
            )
        if self.exact and self.verifier not in ("auto", "exact"):
            raise InvalidArgument(
                f"exact=True samples as plain decoding does, verifier={self.verifier!r} does not:"
                " leave it out or say verifier='exact'"
            )

    def plan(self, narrow: int) -> Plan:
        """What to compile; `narrow` is the cheapest width of a forward that feeds one token."""
        # Only the exact rule gives the same tokens however much is drafted, which for "auto" is a
        # matter of the machine's speed: a seed shall mean one text.
        free = self.drafter.draws and not self.exact and self.drafter.num_draft != "auto"
        verifier = self.verifier if self.verifier != "auto" else "block" if free else "exact"
        if not self.drafter.max_draft:
            verifier = "exact"
        size = self.drafter.max_draft + 1
        if self.exact:
            whole = -(-size // CANONICAL) * CANONICAL
            return Plan(verifier, (whole,), CANONICAL)
        # A draft of a single token is the one that a short match pays for.
        middle = (2, 4) if self.drafter.num_draft == "auto" else ()
        widths = {narrow, *(w for w in middle if narrow < w < size), max(size, narrow)}
        return Plan(verifier, tuple(sorted(widths)))
