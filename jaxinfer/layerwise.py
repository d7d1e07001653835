"""A text through a model layer by layer, and what each layer's projections are fed with on the way.

What rounding (`gptq.py`) and pruning (`prune.py`) measure. Activations lie on the host between two
layers, so a layer's own are all that a device holds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.errors import InvalidArgument
from jaxinfer.model import Embedding, Params, RMSNorm, layer_with_inputs
from jaxinfer.quantize import Quantized
from jaxinfer.tokenizer import Tokenizer

WINDOW = 256  # tokens of a stretch
STRETCHES = 48  # most that are read
ROWS = 8  # stretches that a layer reads at once

Moments = dict[str, np.ndarray]  # sum of x x^T [I,I] f64 over inputs x [I], by "attn/q" and so on


def stretches(tokenizer: Tokenizer, texts: Any, max_len: int) -> np.ndarray:
    """The beginning of texts in stretches [n,W] int32, each as if a text began there.

    Raises InvalidArgument where they are too short for one.
    """
    # Without its first token a model such as Gemma feeds its layers with something else altogether.
    front = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    size = max(1, min(WINDOW, max_len) - len(front))
    ids: list[int] = []
    for text in texts:
        if len(ids) < size * STRETCHES:
            # A token has ten bytes at most, on average: not all of a long text is tokenized.
            ids += tokenizer.encode(text[: 10 * size * STRETCHES], add_special=False)
    count = min(len(ids) // size, STRETCHES)
    if not count:
        raise InvalidArgument(f"the text has {len(ids)} tokens; {size} are the least")
    return np.array([front + ids[i * size : (i + 1) * size] for i in range(count)], np.int32)


def any_quantized(params: Params) -> bool:
    """Whether any weight is quantized."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    return any(isinstance(leaf, Quantized) for leaf in leaves)


def refuse_quantized(params: Params) -> None:
    """Raise InvalidArgument where a weight is quantized."""
    if any_quantized(params):
        raise InvalidArgument("the model is quantized already: take the original")


def embed(params: Params, tokens: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The residual stream [n,W,D] in front of the first layer."""
    x: Any = Embedding(config).apply({"params": params["embed"]}, jnp.asarray(tokens))
    return np.asarray(x)


def read_layer(
    params: Params, x: np.ndarray, config: ModelConfig, layer: LayerConfig, *, measured: bool
) -> tuple[np.ndarray, Moments]:
    """What a layer makes of the residual stream [n,W,D], and if `measured` the moments.

    Raises InvalidArgument where activations overflow.
    """
    out: list[np.ndarray] = []
    total: Moments = {}
    for first in range(0, len(x), ROWS):
        part = x[first : first + ROWS]
        y, moments = _some(params, part, config=config, layer=layer, measured=measured)
        out.append(np.asarray(y))
        for name, m in moments.items():
            total[name] = total.get(name, 0) + np.asarray(m, np.float64)
    return np.concatenate(out), {name: _finite(m) for name, m in total.items()}


@partial(jax.jit, static_argnames=("config", "layer", "measured"))
def _some(
    params: Params, x: jax.Array, *, config: ModelConfig, layer: LayerConfig, measured: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    y, inputs = layer_with_inputs(params, x, config=config, layer=layer)
    return y, jax.tree.map(_moments, inputs) if measured else {}


def _moments(x: jax.Array) -> jax.Array:
    """Sum of x x^T [I,I] f32 over rows and tokens of x [B,T,*in]."""
    rows = x.astype(jnp.float32).reshape(x.shape[0] * x.shape[1], -1)
    return jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


def final_moments(params: Params, x: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Those of what the head is fed with, behind the final norm, of the stream [n,W,D]."""
    parts = (x[a : a + ROWS] for a in range(0, len(x), ROWS))
    total: Any = sum(
        np.asarray(_final(params["final_norm"], part, config=config), np.float64) for part in parts
    )
    return _finite(total)


def _finite(moments: np.ndarray) -> np.ndarray:
    if not np.isfinite(moments).all():
        raise InvalidArgument("activations overflow; load the model in float32 or bfloat16")
    return moments


@partial(jax.jit, static_argnames=("config",))
def _final(params: Params, x: jax.Array, *, config: ModelConfig) -> jax.Array:
    return _moments(RMSNorm(config).apply({"params": params}, x))  # type: ignore[arg-type]
