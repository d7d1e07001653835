"""What generation gives back."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax

FinishReason = Literal["stop", "length"]


class TokenLogprob(NamedTuple):
    """Log-probability (natural) of a chosen token under the model itself, before any processing."""

    token_id: int
    logprob: float
    top: dict[int, float]  # the likeliest token ids, largest first; as many as were asked for


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts in tokens, wall-clock times in seconds; times are those of the row's whole batch."""

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float  # from the start of the row's batch to the first token
    prefill_seconds: float  # putting the prompt into the cache
    decode_seconds: float  # everything after that
    tokens_per_second: float  # new_tokens / decode_seconds
    rounds: int  # forwards of the model that made these tokens; plain decoding takes one each
    drafted: int  # tokens that the drafter offered; a few more where a stop string ended the text
    accepted: int  # of those, how many were kept
    accepted_by_position: list[int]  # rounds that kept the first of a draft, the second, ...
    tokens_per_round: float  # new_tokens / rounds, so the token behind an accepted draft counts
    draft_seconds: float  # of decode_seconds, by the measured cost of a draft and of a verification
    verify_seconds: float


@dataclasses.dataclass(frozen=True)
class GenerationOutput:
    """One continuation of one prompt."""

    text: str
    token_ids: list[int]  # the new ones, an end token included
    finish_reason: FinishReason  # "stop": end token or stop string; "length": max_tokens or context
    stats: Stats
    logprobs: list[TokenLogprob] | None = None  # one a token, if asked for


class Piece(str):
    """A piece of streamed text: a `str`, so that "".join(pieces) is the whole, with its origin."""

    row: int  # of the prompts in order, n samples each
    token_ids: list[int]  # tokens committed since the last piece of this row
    drafted: list[bool]  # which of them a drafter had offered
    finish_reason: FinishReason | None  # set on the last piece of a row

    def __new__(
        cls,
        text: str,
        row: int,
        token_ids: list[int],
        drafted: list[bool],
        finish_reason: FinishReason | None,
    ) -> Piece:
        """A piece of row `row`."""
        piece = super().__new__(cls, text)
        piece.row, piece.token_ids, piece.drafted = row, token_ids, drafted
        piece.finish_reason = finish_reason
        return piece


@dataclasses.dataclass(frozen=True)
class ForwardOutput:
    """Result of `LLM.forward`; row b of a ragged batch is meaningful up to its own length."""

    logits: jax.Array  # [B,T,V] f32
    lengths: jax.Array  # [B] i32
    hidden: dict[int, jax.Array]  # layer -> [B,T,D] residual stream behind that layer
