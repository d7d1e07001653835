"""Prompts as callers write them, to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinfer.errors import InvalidArgument
from jaxinfer.tokenizer import Tokenizer

Prompt = str | Sequence[int]  # text or token ids


def prompt_ids(prompts: Any, tokenizer: Tokenizer, vocab_size: int) -> tuple[list[list[int]], bool]:
    """Ids of each prompt, and whether there was one prompt instead of a list.

    Args:
      prompts: a `Prompt` or a sequence of them; arrays of ids are taken too.
      tokenizer: of the model.
      vocab_size: ids must lie below it.

    Raises:
      InvalidArgument: an empty prompt, an id that is none, something that is no prompt.
    """
    if not isinstance(prompts, str | Sequence):  # an array of ids, of one row or of several
        prompts = np.asarray(prompts).tolist()
    if not isinstance(prompts, str | Sequence):
        raise InvalidArgument(f"a prompt is text or token ids, not {prompts!r:.40}")
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
        return [_ids(prompts, tokenizer, vocab_size)], True
    if not len(prompts):
        raise InvalidArgument("no prompt: give a text or a list of at least one")
    return [_ids(p, tokenizer, vocab_size) for p in prompts], False


def _ids(prompt: Any, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    if not isinstance(prompt, str):
        prompt = np.asarray(prompt).tolist() if hasattr(prompt, "__array__") else prompt
        if not isinstance(prompt, Sequence):
            raise InvalidArgument(f"a prompt is text or token ids, not {prompt!r:.40}")
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) and prompt else prompt
    if not len(ids):
        raise InvalidArgument("the prompt is empty: give at least one character or token id")
    if isinstance(prompt, str):
        return list(ids)
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int | np.integer):
            kind = type(i).__name__
            raise InvalidArgument(f"a prompt is text or a list of token ids, not of {kind}")
        if not 0 <= i < vocab_size:
            raise InvalidArgument(f"token id {i}: must be 0 to {vocab_size - 1}")
    return [int(i) for i in ids]
