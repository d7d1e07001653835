"""Which tensor of a checkpoint, and which rows of it, each of our parameters is: one map a format.

Our paths and shapes, with the letters of config.py (`model.param_specs` is the authority):
    embed/table [V,D]      head/table [V,D] unless tied      final_norm/scale [D]
    layer_i/{attn_norm, attn_post_norm, mlp_norm, mlp_post_norm}/scale [D]
    layer_i/attn/{q, k, v}/{kernel [D,N,H], bias [N,H]}, K for N in k and v
    layer_i/attn/out/{kernel [N,H,D], bias [D]}
    layer_i/attn/{q_norm, k_norm}/scale [H], or [N,H] and [K,H]
    layer_i/mlp/{gate, up}/{kernel [D,F], bias [F]}, mlp/down/{kernel [F,D], bias [D]}
A kernel is the checkpoint's own (out, in) matrix transposed; the others are, read row by row, the
checkpoint's matrix or vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from jaxinfer.config import ModelConfig
from jaxinfer.errors import CorruptFile, UnsupportedModel

# What may stand before a transformers tensor's name, and what the head is called beside it.
HF_HEADS = {
    "model.": "lm_head.weight",
    "": "lm_head.weight",
    "language_model.model.": "language_model.lm_head.weight",
    "model.language_model.": "lm_head.weight",
}
HF_NAMES = {
    **{"embed": "embed_tokens", "final_norm": "norm"},
    **{"attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm"},
    **{"mlp_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    **{"attn/q": "self_attn.q_proj", "attn/k": "self_attn.k_proj", "attn/v": "self_attn.v_proj"},
    **{"attn/q_norm": "self_attn.q_norm", "attn/k_norm": "self_attn.k_norm"},
    **{"attn/out": "self_attn.o_proj", "attn/qkv": "self_attn.qkv_proj"},
    **{"mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj"},
    **{"mlp/gateup": "mlp.gate_up_proj"},
}
GGUF_NAMES = {
    **{"embed": "token_embd", "head": "output", "final_norm": "output_norm"},
    **{"attn_norm": "attn_norm", "attn_post_norm": "post_attention_norm"},
    **{"mlp_norm": "ffn_norm", "mlp_post_norm": "post_ffw_norm"},
    **{"attn/q": "attn_q", "attn/k": "attn_k", "attn/v": "attn_v", "attn/out": "attn_output"},
    **{"attn/q_norm": "attn_q_norm", "attn/k_norm": "attn_k_norm", "attn/qkv": "attn_qkv"},
    **{"mlp/gate": "ffn_gate", "mlp/up": "ffn_up", "mlp/down": "ffn_down", "mlp/gateup": "ffn_up"},
}
# llama.cpp's converter reorders q and k of these for rotary over neighbouring channels.
INTERLEAVED = frozenset({"llama", "smollm3"})


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where one parameter comes from: rows start:stop of a tensor, whose rows are OUT features."""

    source: str  # the tensor's name
    source_shape: tuple[int, ...]  # what it must be
    start: int
    stop: int
    # H: each head's rows stand as 0, H/2, 1, H/2 + 1, ... and are to be put back in order.
    interleaved: int = 0
    transposed: bool = False  # the parameter's rows are IN features
    add_one: bool = False  # the checkpoint stores a norm's scale less one


def hf_prefix(names: Iterable[str], where: str = "the checkpoint") -> str:
    """What stands before `layers.0...` in this checkpoint's names: a key of `HF_HEADS`.

    Raises CorruptFile when no name is that of an embedding.
    """
    found = set(names)
    for prefix in HF_HEADS:
        if f"{prefix}embed_tokens.weight" in found:
            return prefix
    raise CorruptFile(f"{where}: tensor model.embed_tokens.weight is missing")


def hf_pieces(config: ModelConfig, prefix: str = "model.") -> dict[str, Piece]:
    """Path of each parameter -> its piece of a transformers checkpoint (safetensors)."""
    names = dict(HF_NAMES)
    if config.pre_norm and config.post_norm:  # Gemma's four norms
        names["mlp_norm"] = "pre_feedforward_layernorm"
    gemma = config.family in ("gemma2", "gemma3")

    def source(part: str, layer: int | None) -> str:
        if part == "head":
            return HF_HEADS[prefix].removesuffix(".weight")
        return prefix + ("" if layer is None else f"layers.{layer}.") + names[part]

    pieces = _pieces(config, source, fused=config.family == "phi3", interleaved=False)
    if gemma:
        pieces = {
            path: dataclasses.replace(piece, add_one=path.endswith("/scale"))
            for path, piece in pieces.items()
        }
    return pieces


def gguf_pieces(config: ModelConfig, arch: str) -> dict[str, Piece]:
    """Path of each parameter -> its piece of a GGUF file, where Gemma's norms have their one."""

    def source(part: str, layer: int | None) -> str:
        return ("" if layer is None else f"blk.{layer}.") + GGUF_NAMES[part]

    return _pieces(config, source, fused=arch == "phi3", interleaved=arch in INTERLEAVED)


def _pieces(
    config: ModelConfig,
    source: Callable[[str, int | None], str],
    *,
    fused: bool,
    interleaved: bool,
) -> dict[str, Piece]:
    """The map of one format.

    Args:
      source: (part, layer or None) -> the tensor's name without its .weight or .bias.
      fused: q, k, v lie one below the other in one tensor, and so do gate and up.
      interleaved: heads of q and k are stored for rotary over neighbouring channels.
    """
    d, f, h = config.width, config.hidden, config.head_dim
    q, kv = config.num_heads * h, config.num_kv_heads * h
    pieces = {}

    def vector(path: str, part: str, layer: int | None, length: int) -> None:
        name = f"{source(part, layer)}.weight"
        pieces[f"{path}/scale"] = Piece(name, (length,), 0, length)

    def table(part: str) -> None:
        v = config.vocab_size
        pieces[f"{part}/table"] = Piece(f"{source(part, None)}.weight", (v, d), 0, v)

    def linears(layer: int, room: str, rows: dict[str, int], columns: int, bias: bool) -> None:
        """Projections of one input, by name -> OUT features."""
        joint = fused and len(rows) > 1
        start = 0
        for name, count in rows.items():
            tensor = source(f"{room}/{''.join(rows) if joint else name}", layer)
            total = sum(rows.values()) if joint else count
            heads = h if interleaved and name in ("q", "k") else 0
            path = f"layer_{layer}/{room}/{name}"
            pieces[f"{path}/kernel"] = Piece(
                f"{tensor}.weight", (total, columns), start, start + count, heads, True
            )
            if bias:
                pieces[f"{path}/bias"] = Piece(
                    f"{tensor}.bias", (total,), start, start + count, heads
                )
            start += count if joint else 0

    table("embed")
    if not config.tied:
        table("head")
    vector("final_norm", "final_norm", None, d)
    for i in range(config.num_layers):
        for norm in ("attn_norm", "mlp_norm") if config.pre_norm else ():
            vector(f"layer_{i}/{norm}", norm, i, d)
        for norm in ("attn_post_norm", "mlp_post_norm") if config.post_norm else ():
            vector(f"layer_{i}/{norm}", norm, i, d)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            vector(f"layer_{i}/attn/q_norm", "attn/q_norm", i, q if full else h)
            vector(f"layer_{i}/attn/k_norm", "attn/k_norm", i, kv if full else h)
        linears(i, "attn", {"q": q, "k": kv, "v": kv}, d, config.qkv_bias)
        linears(i, "attn", {"out": d}, q, config.out_bias)
        linears(i, "mlp", {"gate": f, "up": f}, d, config.mlp_bias)
        linears(i, "mlp", {"down": d}, f, config.mlp_bias)
    return pieces


def check(
    config: ModelConfig,
    pieces: Mapping[str, Piece],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """Compare a checkpoint's tensors with the map, before anything is read.

    Raises:
      CorruptFile: a tensor is missing or has another shape than the config says.
      UnsupportedModel: a tensor that no parameter uses, and that is not known to be harmless.
    """
    for piece in pieces.values():
        shape = shapes.get(piece.source)
        if shape is None:
            raise CorruptFile(f"{where}: tensor {piece.source} is missing")
        if tuple(shape) != piece.source_shape:
            raise CorruptFile(
                f"{where}: tensor {piece.source} has shape {tuple(shape)};"
                f" the config asks for {piece.source_shape}"
            )
    extra = unused(config, pieces, shapes)
    if extra:
        raise UnsupportedModel(
            f"{where}: tensor {extra[0][:100]!r} is not understood"
            + (f", nor are {len(extra) - 1} others" if len(extra) > 1 else "")
        )


def unused(config: ModelConfig, pieces: Mapping[str, Piece], names: Iterable[str]) -> list[str]:
    """Names that no piece uses and that may change the maths, sorted.

    Harmless: buffers that follow from the config; the copy of a tied head; in a Gemma 3 checkpoint,
    what only images reach.
    """
    used = {piece.source for piece in pieces.values()}
    harmless: tuple[str, ...] = ()
    if config.family == "gemma3":
        harmless = ("vision_tower.", "multi_modal_projector.", "v.", "mm.")
        harmless += tuple(f"model.{prefix}" for prefix in harmless[:2])
    tails: tuple[str, ...] = (".rotary_emb.inv_freq", ".attn_rot_embd.weight")
    if config.layers and any(x.rope and x.rope.scaling == "factors" for x in config.layers):
        tails += ("rope_freqs.weight",)
    if config.tied:
        used |= set(HF_HEADS.values())
    return sorted(
        name
        for name in names
        if name not in used and not name.startswith(harmless) and not name.endswith(tails)
    )
