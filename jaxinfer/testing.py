"""A tiny model and tokenizer, for users' tests as well as ours. No download, no file."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.checkpoint.placement import lay_params
from jaxinfer.config import LayerConfig, ModelConfig, Rope
from jaxinfer.generate import LLM
from jaxinfer.model import init_params
from jaxinfer.sharding import Rules, make_layout
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.tokenizer.base import Settings


def tiny_tokenizer(vocab_size: int = 64) -> Tokenizer:
    """Id i is one character: that of code point 33 + i. Id 0 ends a sequence and has no text."""

    def spell(token: int) -> str:
        point = 33 + token
        return chr(point if point < 0xD800 else point + 0x800)  # there are no characters between

    ids = {spell(i): i for i in range(vocab_size)}
    return Tokenizer(
        vocab_size=vocab_size,
        bos_id=None,
        eos_ids=(0,),
        adds_bos=False,
        bos_token="",
        eos_token=spell(0),
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        special_ids=frozenset({0}),
        strips_space=False,
        # Characters beyond the vocabulary wrap around.
        encode_text=lambda text, _: [ids.get(c, (ord(c) - 33) % vocab_size) for c in text],
        token_text=spell,
        token_bytes=lambda token: spell(token).encode(),
        settings=Settings(),
        model_file=lambda: ("tiny", b""),
    )


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
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    kernels: Any = "xla",
    drafter: Any = None,
    num_draft: Any = None,
    verifier: Any = "auto",
    exact: bool = False,
    **fields: Any,
) -> LLM:
    """A working LLM of a few thousand random parameters; `fields` are of `ModelConfig`."""
    config = tiny_config(vocab_size, **fields)
    # A standard deviation at which the next token depends on the context and is not yet certain.
    params = init_params(config, jax.random.key(seed), jnp.dtype(dtype), std=0.3)
    params, config = lay_params(params, config, make_layout(mesh, rules))
    return LLM(
        params,
        config,
        tiny_tokenizer(vocab_size),
        dtype=jnp.dtype(dtype),
        mesh=mesh,
        rules=rules,
        max_batch=max_batch,
        kernels=kernels,
        drafter=drafter,
        num_draft=num_draft,
        verifier=verifier,
        exact=exact,
    )
