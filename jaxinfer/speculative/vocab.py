"""A draft model with another vocabulary: which of its tokens are which of the target's.

Token-level intersection (TLI, arXiv 2502.05202, algorithm 4): the drafter offers only tokens that
both vocabularies have, with its distribution cut to those. It is lossless under every verifier and
needs no text on the way, so it runs inside the compiled loop; the string-level methods of that
paper must detokenize each round. A committed token that the drafter lacks is spelled to it in
pieces that it has.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import InvalidArgument
from jaxinfer.tokenizer import Tokenizer

MAX_PIECES = (
    8  # of the drafter's tokens for one of the target's; what is longer loses its beginning
)
MIN_SHARED = 2  # with fewer tokens in common there is nothing to choose from


class VocabMap(NamedTuple):
    """Between the ids of a target (V) and of its drafter (U)."""

    own: jax.Array  # [V,E] i32, the drafter's ids for a token of the target, then -1
    # [U] i32, the target's id of the drafter's token; V: none. None: the same id.
    target: jax.Array | None


def identity(size: int, own_size: int) -> VocabMap:
    """The same tokenizer behind logits of `size` and of `own_size`, which may be padded."""
    ids = jnp.arange(size, dtype=jnp.int32)
    return VocabMap(jnp.where(ids < own_size, ids, -1)[:, None], None)


def map_vocabularies(
    target: Tokenizer, own: Tokenizer, target_size: int, own_size: int
) -> VocabMap:
    """Match tokens by the bytes they stand for, control tokens by their spelling.

    Args:
      target, own: the tokenizers of the target and of the drafter.
      target_size, own_size: widths V and U of their logits.

    Raises:
      InvalidArgument: fewer than two tokens in common.
    """
    keys = _keys(target, target_size)
    own_keys = _keys(own, own_size)
    if keys == own_keys:
        return identity(target_size, own_size)
    own_ids = {key: i for i, key in reversed(own_keys.items())}  # of equal ones the first
    if target.eos_ids and own.eos_ids:  # an end is an end, however it is spelled
        own_ids.setdefault(keys[target.eos_ids[0]], own.eos_ids[0])
    shared = {i: own_ids[key] for i, key in keys.items() if key in own_ids}
    if len(shared) < MIN_SHARED:
        raise InvalidArgument(
            f"the drafter's vocabulary shares {len(shared)} of {len(keys)} tokens with the model's:"
            " take a drafter of the same language and kind of tokenizer"
        )
    pieces = np.full((target_size, MAX_PIECES), -1, np.int32)
    spelled = {key[1]: i for key, i in own_ids.items() if not key[0]}
    longest = max(map(len, spelled), default=0)
    for i, key in keys.items():
        found = [shared[i]] if i in shared else _spell(key, spelled, longest)
        pieces[i, : len(found)] = found
    back = np.full((own_size,), target_size, np.int32)
    back[list(shared.values())] = list(shared)
    return VocabMap(jnp.asarray(pieces), jnp.asarray(back))


Key = tuple[bool, bytes]  # whether it is a control token, and its spelling or its bytes of text


def _keys(tokenizer: Tokenizer, size: int) -> dict[int, Key]:
    return {
        i: (True, tokenizer.token_text(i).encode())
        if i in tokenizer.special_ids
        else (False, tokenizer.token_bytes(i))
        for i in range(min(size, tokenizer.vocab_size))
    }


def _spell(key: Key, spelled: dict[bytes, int], longest: int) -> list[int]:
    """The bytes of a token in the drafter's tokens, the longest first; no control token has any."""
    special, text = key
    found, at = [], 0
    while at < len(text) and not special:
        ends = range(min(len(text), at + longest), at, -1)
        end = next((end for end in ends if text[at:end] in spelled), None)
        if end is None:  # a byte that the drafter cannot write: it does not see it
            at += 1
            continue
        found.append(spelled[text[at:end]])
        at = end
    return found[-MAX_PIECES:]
