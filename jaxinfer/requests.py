"""What a caller asks, as rows of a batch: one `Request` for each sample of each prompt."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.distributed import agree
from jaxinfer.errors import InvalidArgument, PromptTooLong
from jaxinfer.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Request:
    """One row."""

    prompt: Sequence[int]  # at least one token
    params: SamplingParams
    seed: int
    sample: int  # tells apart rows that share a seed
    stop_ids: Sequence[int]  # end tokens and stop_token_ids, sorted
    limit: int  # most tokens in all, prompt included


def make_requests(
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    overrides: Mapping[str, Any],
    *,
    eos_ids: Sequence[int],
    max_len: int,
    vocab_size: int,
) -> list[Request]:
    """The rows of these prompts, in order, n of each.

    Rows under one `params` share its seed and are numbered through, so that no two draw the same
    noise; under a list of `params` each prompt's rows are numbered on their own, so that a row
    depends on its own parameters alone.

    Raises:
      InvalidArgument: lengths that differ, an unknown override, an id that no logit has.
      PromptTooLong: a prompt that leaves no room for a token.
    """
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown := set(overrides) - known:
        raise InvalidArgument(f"SamplingParams has no field {', '.join(sorted(unknown))}")
    shared = isinstance(params, SamplingParams)
    if not shared and not all(isinstance(p, SamplingParams) for p in _items(params)):
        raise InvalidArgument(
            "params: give a SamplingParams for all prompts, or a list of one each"
        )
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise InvalidArgument(
            f"{len(each)} params for {len(prompts)} prompts: give one for all, or one each"
        )
    # One for all rows, or one a prompt; on many processes those of the first.
    count = len(each) * any(dataclasses.replace(p, **overrides).seed is None for p in each)
    drawn = agree([secrets.randbits(32) for _ in range(count)])
    requests: list[Request] = []
    for i, (prompt, given) in enumerate(zip(prompts, each, strict=True)):
        p = dataclasses.replace(given, **overrides)
        _check(prompt, p, max_len, vocab_size)
        seed = p.seed if p.seed is not None else drawn[0 if shared else i]
        stop_ids = sorted({*p.stop_token_ids, *(() if p.ignore_eos else eos_ids)})
        limit = min(len(prompt) + p.max_tokens, max_len)
        first = i * p.n if shared else 0
        requests += [Request(prompt, p, seed, first + j, stop_ids, limit) for j in range(p.n)]
    return requests


def _items(params: Any) -> list[Any]:
    return list(params) if isinstance(params, Sequence) else [None]


def _check(prompt: Sequence[int], params: SamplingParams, max_len: int, vocab_size: int) -> None:
    if len(prompt) >= max_len:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens; the context has {max_len} and one must be left"
        )
    for i in [*params.stop_token_ids, *(params.logit_bias or {})]:
        if i >= vocab_size:
            raise InvalidArgument(f"token id {i}: must be 0 to {vocab_size - 1}")
