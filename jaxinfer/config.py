"""`ModelConfig`: one frozen, hashable description that covers every supported family.

It says everything that changes the maths and nothing else, so it can be a static argument of a
jitted step. `jaxinfer/checkpoint/` translates config.json and GGUF metadata into it.
Letters: D model width, F hidden width, N query heads, K key/value heads, H head width, V
vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

DTYPES = ("float32", "bfloat16", "float16")  # of weights and activations


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a layer (arXiv 2104.09864), with its long-context scaling.

    Units: `theta` is the base of the geometric series of wavelengths; lengths are in tokens.
    """

    theta: float
    dim: int  # leading channels of H that rotate; the rest pass through
    scaling: Literal["none", "linear", "llama3", "yarn", "factors"] = "none"
    factor: float = 1.0  # how many times the original context is stretched
    original_max_len: int = 0  # llama3, yarn: the context the model was first trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn (arXiv 2309.00071)
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole channels
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    factors: tuple[float, ...] = ()  # "factors": [dim/2] divisors of the frequencies, from the file


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What may differ from one layer to the next."""

    window: int | None = (
        None  # attends the last `window` tokens, itself included; None: all of them
    )
    rope: Rope | None = None  # None: no position embedding in this layer (NoPE)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer."""

    family: str  # "llama", "gemma3", ...: for messages; the maths never looks at it
    vocab_size: int  # V, the width of the logits (a tokenizer may know fewer ids)
    width: int  # D
    hidden: int  # F
    num_heads: int  # N
    num_kv_heads: int  # K, divides N
    head_dim: int  # H
    layers: tuple[LayerConfig, ...]  # L of them
    max_len: int  # context length in tokens
    norm_eps: float = 1e-6
    pre_norm: bool = True  # RMS norm in front of attention and MLP
    post_norm: bool = False  # RMS norm behind each of them, before the residual sum
    qk_norm: Literal["none", "head", "full"] = "none"  # over H, or all N*H (K*H) channels
    qkv_bias: bool = False
    out_bias: bool = False  # bias of the attention output projection
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    attention_scale: float = 0.0  # multiplies q.k; usually H**-0.5
    attention_softcap: float | None = None  # s -> cap * tanh(s / cap) on attention scores
    logit_softcap: float | None = None  # the same on the final logits
    embed_scale: float = 1.0  # multiplies the embeddings (sqrt(D) in Gemma)
    tied: bool = True  # the head is the embedding table
    # (N, K) of the checkpoint, where `sharding.spread_heads` raised those above to fit a mesh.
    checkpoint_heads: tuple[int, int] | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def kv_copies(self) -> int:
        """How many times each key/value head stands; 1 unless they were spread over a mesh."""
        n, k = self.checkpoint_heads or (self.num_heads, self.num_kv_heads)
        return -(-(n // k) // (self.num_heads // self.num_kv_heads))

    def real_size(self, axis: str) -> int:
        """`size` without heads of zeros."""
        if self.checkpoint_heads and axis in "NK":
            n, k = self.checkpoint_heads
            return n if axis == "N" else k * self.kv_copies
        return self.size(axis)

    def size(self, axis: str) -> int:
        """Length of the axis with this letter: D, F, N, K, H or V."""
        return {
            "D": self.width,
            "F": self.hidden,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_dim,
            "V": self.vocab_size,
        }[axis]
