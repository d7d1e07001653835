"""The one forward, in Flax Linen; the only file that does.

    hidden, cache = forward(params, tokens, num_new, cache, config=config)
    logits = head(params, hidden, config=config)

prefill is T = a bucket of the prompt, decode T = 1, verify T = draft + 1: nothing else tells them
apart. A parameter is declared once, by its letters: shape, sharding and init follow from them.
Letters: B batch, T new tokens, S slots, D width, F hidden, N query heads, K kv heads, H head width,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxinfer import rotary
from jaxinfer.attend import XLA, Kernels, attend
from jaxinfer.cache import MAX_BLOCK, KVCache, LayerCache, init_cache
from jaxinfer.config import LayerConfig, ModelConfig
from jaxinfer.quantize import Quantized, lookup, project, scores
from jaxinfer.xla import once

Params = dict[str, Any]  # nested dict of arrays

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


class Linear(nn.Module):
    """A projection from axes `inp` to axes `out`, each a string of letters.

    The kernel is [*inp,*out]: float32 on XLA:CPU multiplies eight rows with it in three quarters of
    the time that [*out,*inp] takes, and one row in the same.
    """

    config: ModelConfig
    inp: str
    out: str
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = _param(self, "kernel", self.inp + self.out, nn.initializers.normal(0.02))
        y = project(x, kernel, len(self.inp))
        if self.use_bias:
            y += _param(self, "bias", self.out, nn.initializers.normal(0.02))
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the trailing `axes` (arXiv 1910.07467), in float32."""

    config: ModelConfig
    axes: str = "D"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = _param(self, "scale", self.axes, nn.initializers.ones)
        y = x.astype(jnp.float32)
        over = tuple(range(-len(self.axes), 0))
        count = math.prod(map(self.config.real_size, self.axes))  # heads of zeros do not count
        mean = jnp.sum(y * y, axis=over, keepdims=True) / count
        y = y * jax.lax.rsqrt(mean + self.config.norm_eps)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) over the cache."""

    config: ModelConfig
    layer: LayerConfig
    kernels: Kernels

    @nn.compact
    def __call__(
        self,
        x: jax.Array,  # [B,T,D]
        rope: tuple[jax.Array, jax.Array] | None,
        start: jax.Array,  # [B]
        num_new: jax.Array,  # [B]
        cache: LayerCache,
    ) -> tuple[jax.Array, LayerCache]:
        c = self.config
        # One product for the three, or for gate and up, is no faster: XLA:CPU runs two at once.
        q = Linear(c, "D", "NH", c.qkv_bias, name="q")(x)  # [B,T,N,H]
        k = Linear(c, "D", "KH", c.qkv_bias, name="k")(x)  # [B,T,K,H]
        v = Linear(c, "D", "KH", c.qkv_bias, name="v")(x)
        if c.qk_norm != "none":
            full = c.qk_norm == "full"
            q = RMSNorm(c, "NH" if full else "H", name="q_norm")(q)
            k = RMSNorm(c, "KH" if full else "H", name="k_norm")(k)
        if rope is not None:
            q, k = rotary.rotate(q, *rope), rotary.rotate(k, *rope)
        y, held = attend(
            q,
            k,
            v,
            cache.held,
            start,
            num_new,
            kernels=self.kernels,
            scale=c.attention_scale,
            window=self.layer.window,
            softcap=c.attention_softcap,
        )
        return Linear(c, "NH", "D", c.out_bias, name="out")(y), LayerCache(*held)


class MLP(nn.Module):
    """Gated MLP (arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = Linear(c, "D", "F", c.mlp_bias, name="gate")(x)
        up = Linear(c, "D", "F", c.mlp_bias, name="up")(x)
        return Linear(c, "F", "D", c.mlp_bias, name="down")(ACTIVATIONS[c.activation](gate) * up)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream, with norms before or behind them."""

    config: ModelConfig
    layer: LayerConfig
    kernels: Kernels

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array] | None,
        start: jax.Array,
        num_new: jax.Array,
        cache: LayerCache,
    ) -> tuple[jax.Array, LayerCache]:
        c = self.config
        y = RMSNorm(c, name="attn_norm")(x) if c.pre_norm else x
        y, cache = Attention(c, self.layer, self.kernels, name="attn")(
            y, rope, start, num_new, cache
        )
        x = x + (RMSNorm(c, name="attn_post_norm")(y) if c.post_norm else y)
        y = RMSNorm(c, name="mlp_norm")(x) if c.pre_norm else x
        y = MLP(c, name="mlp")(y)
        x = x + (RMSNorm(c, name="mlp_post_norm")(y) if c.post_norm else y)
        return x, cache


class Embedding(nn.Module):
    """A table of one vector a token: looked up at the entrance, multiplied with at the head."""

    config: ModelConfig

    def setup(self) -> None:
        self.table = _param(self, "table", "VD", nn.initializers.normal(0.02))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = lookup(self.table, tokens)
        return x * jnp.asarray(self.config.embed_scale, x.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        return scores(self.table, x)


def _param(module: Any, name: str, axes: str, init: Callable[..., Any]) -> Any:
    shape = tuple(module.config.size(a) for a in axes)
    held = module.get_variable("params", name)
    if isinstance(held, Quantized):  # Flax would compare the shapes of its parts
        if held.shape != shape:
            raise ValueError(f"{name} has shape {held.shape}; the config asks for {shape}")
        return held
    return module.param(name, nn.with_partitioning(init, tuple(axes)), shape)


def forward(
    params: Params,
    tokens: jax.Array,
    num_new: jax.Array,
    cache: KVCache,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, KVCache]:
    """Feed T tokens a row; row b writes its num_new[b] of them behind the lengths[b] it holds.

    Args:
      params: nested dict; `param_specs` gives its shapes.
      tokens: [B,T] int32; what stands behind num_new[b] is padding.
      num_new: [B] int32 in 0..T; 0 leaves a row idle.
      cache: what came before; lengths[b] + num_new[b] must not exceed its capacity.
      config: static.

    Returns:
      hidden [B,T,D] behind the final norm, and the cache with lengths + num_new.
    """
    hidden, cache, _ = forward_with_states(params, tokens, num_new, cache, config=config)
    return hidden, cache


def forward_with_states(
    params: Params,
    tokens: jax.Array,
    num_new: jax.Array,
    cache: KVCache,
    *,
    config: ModelConfig,
    layers: tuple[int, ...] = (),
) -> tuple[jax.Array, KVCache, dict[int, jax.Array]]:
    """`forward`, and the residual stream [B,T,D] behind each of `layers`, for research."""
    if tokens.shape[1] > MAX_BLOCK and any(layer.window for layer in config.layers):
        raise ValueError(f"T={tokens.shape[1]}: a window layer takes {MAX_BLOCK} tokens at once")
    start = cache.lengths
    positions = start[:, None] + jnp.arange(tokens.shape[1])  # [B,T]
    # Layers that share a rope share its tables, and none computes them anew.
    ropes = {layer.rope for layer in config.layers if layer.rope is not None}
    turns: dict[Any, Any] = {r: tuple(map(once, rotary.tables(r, positions))) for r in ropes}
    lay: Any = partial(cache.kernels.layout.constrain, axes="BTD")  # between layers whole along D
    x: Any = lay(Embedding(config).apply({"params": params["embed"]}, tokens))
    states, held = {}, []
    for i, (layer, kv) in enumerate(zip(config.layers, cache.layers, strict=True)):
        rope = turns.get(layer.rope)
        block = partial(_block, config=config, layer=layer, kernels=cache.kernels)
        x, kv = block(params[f"layer_{i}"], x, rope, start, num_new, kv)
        x = lay(x)
        held.append(kv)
        if i in layers:
            states[i] = x
    hidden: Any = RMSNorm(config).apply({"params": params["final_norm"]}, x)
    return hidden, cache.after(held, num_new), states


# Jitted on its own so that like layers are traced once, not L times; XLA inlines them all the same.
@partial(jax.jit, static_argnames=("config", "layer", "kernels"))
def _block(
    params: Params,
    x: jax.Array,  # [B,T,D]
    rope: tuple[jax.Array, jax.Array] | None,
    start: jax.Array,  # [B]
    num_new: jax.Array,  # [B]
    cache: LayerCache,
    *,
    config: ModelConfig,
    layer: LayerConfig,
    kernels: Kernels,
) -> tuple[jax.Array, LayerCache]:
    block = Block(config, layer, kernels)
    out: Any = block.apply({"params": params}, x, rope, start, num_new, cache)
    return out


def layer_with_inputs(
    params: Params, x: jax.Array, *, config: ModelConfig, layer: LayerConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer over the residual stream [B,T,D] of texts from their beginning.

    Returns:
      The stream behind it; and what each of its projections was fed with [B,T,*in], by a name such
      as "attn/q". For calibration and pruning.
    """
    inputs: dict[str, jax.Array] = {}

    def note(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            inputs["/".join(context.module.path)] = args[0]
        return run(*args, **kwargs)

    batch, width, _ = x.shape
    rope = None if layer.rope is None else rotary.tables(layer.rope, jnp.arange(width)[None])
    start, num_new = jnp.zeros((batch,), jnp.int32), jnp.full((batch,), width)
    alone = dataclasses.replace(config, layers=(layer,))
    cache = init_cache(alone, batch, width, x.dtype).layers[0]
    with nn.intercept_methods(note):
        block: Any = Block(config, layer, XLA)
        x, _ = block.apply({"params": params}, x, rope, start, num_new, cache)
    return x, inputs


def head(params: Params, hidden: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Logits [B,T,V] float32 of hidden [B,T,D]; call it only for positions that somebody needs."""
    table = params["embed" if config.tied else "head"]
    y: Any = Embedding(config).apply({"params": table}, hidden, method="attend")
    cap = config.logit_softcap
    return y if cap is None else cap * jnp.tanh(y / cap)


class ParamSpec(NamedTuple):
    """A parameter before there is an array: its shape, and a letter an axis."""

    shape: tuple[int, ...]
    axes: str

    @property
    def inputs(self) -> tuple[int, ...]:
        """Of a kernel or a table, the axes that a product sums over."""
        if self.axes == "VD":
            return (1,)
        return (0, 1) if self.axes == "NHD" else (0,)


def param_specs(config: ModelConfig) -> Any:
    """The parameter tree with a `ParamSpec` at each leaf; no array is made."""
    x = jnp.zeros((1, 1, config.width))
    one = jnp.zeros((1,), jnp.int32)
    cache = init_cache(config, 1, 1, x.dtype).layers[0]

    def specs(module: nn.Module, *args: Any) -> Any:
        def spec(box: nn.Partitioned) -> ParamSpec:
            return ParamSpec(box.value.shape, "".join(map(str, box.names)))

        boxes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
        return jax.tree.map(spec, boxes, is_leaf=lambda x: isinstance(x, nn.Partitioned))

    # The parameters of a layer depend on the model's config alone, never on its LayerConfig.
    block = specs(Block(config, LayerConfig(), XLA), x, None, one, one, cache)
    tree = {"embed": specs(Embedding(config), one[None]), "final_norm": specs(RMSNorm(config), x)}
    tree |= {f"layer_{i}": block for i in range(config.num_layers)}
    return tree if config.tied else {**tree, "head": tree["embed"]}


def param_dtype(path: str, dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of the parameter at a path such as "layer_0/attn/q/kernel".

    Vectors stay float32 whatever the model's dtype: they weigh nothing, and norms need the bits.
    """
    return jnp.dtype(jnp.float32 if path.endswith(("scale", "bias")) else dtype)


def init_params(config: ModelConfig, key: jax.Array, dtype: jnp.dtype, std: float = 0.02) -> Params:
    """Random weights: norms are one, everything else normal with this standard deviation."""
    specs, tree = jax.tree.flatten_with_path(
        param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec)
    )

    def draw(path: tuple[Any, ...], spec: ParamSpec, key: jax.Array) -> jax.Array:
        name = path[-1].key
        if name == "scale":
            return jnp.ones(spec.shape, jnp.float32)
        return (std * jax.random.normal(key, spec.shape)).astype(param_dtype(name, dtype))

    keys = jax.random.split(key, len(specs))
    return jax.tree.unflatten(tree, [draw(p, s, k) for (p, s), k in zip(specs, keys, strict=True)])
