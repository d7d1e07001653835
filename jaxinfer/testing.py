"""A tiny model and tokenizer, for users' tests as well as ours. No download, no file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.config import LayerConfig, ModelConfig, Rope
from jaxinfer.generate import LLM
from jaxinfer.model import init_params


class TinyDetokenizer:
    """One token, one character: nothing is ever held back."""

    def __init__(self, tokenizer: TinyTokenizer) -> None:
        self._tokenizer = tokenizer

    def push(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def finish(self) -> str:
        return ""


class TinyTokenizer:
    """Id i is the character of code point 33 + i; id 0 ends a sequence."""

    bos_id: int | None = None
    adds_bos = False
    bos_token = eos_token = ""
    chat_template: str | None = None
    eos_ids: tuple[int, ...] = (0,)

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of a text; characters beyond the vocabulary wrap around."""
        return [(ord(c) - 33) % self.vocab_size for c in text]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids."""
        return "".join(chr(33 + i) for i in ids if not (skip_special and i in self.eos_ids))

    def id_to_token(self, token: int) -> str:
        """Text of one id."""
        return chr(33 + token)

    def stream(self, *, skip_special: bool = True) -> TinyDetokenizer:
        """An incremental decoder."""
        return TinyDetokenizer(self)


def tiny_config(vocab_size: int = 64, **fields: Any) -> ModelConfig:
    """Two layers, width 16; `fields` replace any of the config's."""
    defaults = ModelConfig(
        family="tiny",
        vocab_size=vocab_size,
        width=16,
        hidden=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        layers=(LayerConfig(rope=Rope(theta=10000.0, dim=8)),) * 2,
        max_len=512,
        attention_scale=8**-0.5,
    )
    return dataclasses.replace(defaults, **fields)


def tiny_llm(
    vocab_size: int = 64,
    seed: int = 0,
    *,
    dtype: str = "float32",
    max_batch: int = 32,
    **fields: Any,
) -> LLM:
    """A working LLM of a few thousand random parameters; `fields` are of `ModelConfig`."""
    config = tiny_config(vocab_size, **fields)
    # A standard deviation at which the next token depends on the context and is not yet certain.
    params = init_params(config, jax.random.key(seed), jnp.dtype(dtype), std=0.3)
    return LLM(
        params, config, TinyTokenizer(vocab_size), dtype=jnp.dtype(dtype), max_batch=max_batch
    )
