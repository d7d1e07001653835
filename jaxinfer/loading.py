"""`load`: from a model's name to an `LLM` with its weights in place."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer import gptq, layerwise, smooth, steps
from jaxinfer.attend import Store, check_store
from jaxinfer.checkpoint.aliases import DEFAULT_MODEL
from jaxinfer.checkpoint.placement import Checkpoint, schemes_of
from jaxinfer.config import DTYPES
from jaxinfer.drafters import is_name, recipe_of
from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM, DrafterLike
from jaxinfer.recipes import Recipe, make_recipe
from jaxinfer.sharding import Rules, make_layout, spread_note
from jaxinfer.speculative.ngram import NGramDrafter
from jaxinfer.speculative.speculation import Speculation, Verifier
from pallas_kernels import Impl

logger = logging.getLogger("jaxinfer")


def load(
    name: str | Path = DEFAULT_MODEL,
    *,
    dtype: str | jnp.dtype | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    quantize: str | None = None,
    calibration: Sequence[str] | None = None,
    kernels: Impl = "auto",
    cache_dtype: Store | None = None,
    drafter: DrafterLike = None,
    num_draft: int | Literal["auto"] | None = None,
    verifier: Verifier = "auto",
    exact: bool = False,
    max_len: int | None = None,
    max_batch: int = 32,
    cache_dir: str | Path | None = None,
) -> LLM:
    """Load a model by name.

    Args:
      name: an alias (`smollm2-135m-instruct`, `gemma-3-270m`), `hf://org/name[@revision]`, a folder
        (safetensors or Orbax) or a .gguf file.
      dtype: of weights, activations and cache: "float32", "bfloat16" or "float16"; None: what an
        Orbax checkpoint holds, else float32 on CPU and bfloat16 elsewhere.
      mesh: spreads the weights, see `make_mesh`; None: one device.
      rules: what lies along which axis of the mesh, instead of `sharding.RULES`: {"hidden": None}
        leaves hidden widths whole. A drafter given by name lies like the model, in the same dtype
        and recipe, but rounded to nearest; one that was saved quantized stays as it is.
      quantize: None, or how matrices are kept: "int8", "int4", "int2", "fp8", "w8a8" (int8, and
        activations too), rules by name, or "stored", the blocks of a GGUF file; see `recipes`.
      calibration: a list of texts whose activations say how to round, by GPTQ, and for w8a8 how
        to even them out first, by SmoothQuant; None: to nearest, as fp8 always is. Takes seconds a
        layer, and the memory of the model as it is, twice for w8a8.
      kernels: attention by "xla", "pallas_tpu" or "pallas_gpu"; "auto": Pallas on a TPU where it
        covers the model, else XLA.
      cache_dtype: None, as dtype; "int8" or "fp8": keys and values in eight bits, with a scale a
        token and head.
      drafter: guesses tokens for the model to verify, see `LLM.speculation`; None: plain decoding.
      num_draft: tokens that it offers a round at most; "auto": as many as pay; None: its own.
      verifier: how they are judged, "exact", "rejection" or "block"; "auto": as suits the drafter.
      exact: with and without a drafter the output is the same bits, at the cost of some speed.
      max_len: context in tokens; None: the model's own.
      max_batch: most rows that run at once; more prompts run in turns.
      cache_dir: where downloads and compiled programs are kept; None: JAXINFER_CACHE, else
        ~/.cache/jaxinfer.

    Raises:
      JaxinferError: ModelNotFound, UnsupportedModel, CorruptFile, OutOfMemory or InvalidArgument.
    """
    if max_len is not None and max_len < 2:
        raise InvalidArgument(f"max_len={max_len}: must be 2 or more")
    from jaxinfer.checkpoint import hub
    from jaxinfer.checkpoint.load import load_checkpoint
    from jaxinfer.checkpoint.orbax import is_orbax, is_quantized, stored_dtype

    # What can be refused now is refused before anything is fetched or read.
    Speculation(NGramDrafter(num_draft="auto" if num_draft is None else num_draft), verifier, exact)
    check_store(cache_dtype)
    layout = make_layout(mesh, rules)
    recipe = make_recipe(quantize, layout.platform)
    if recipe_of(drafter, layout.platform) and recipe:
        raise InvalidArgument(
            f"quantize={quantize!r:.40}, drafter={drafter!r:.40}: both would quantize"
        )
    if calibration is not None and not _are_texts(calibration):
        raise InvalidArgument("calibration: a list of texts, and not an empty one")
    if calibration is not None and (recipe is None or recipe.stored or mesh is not None):
        raise InvalidArgument(
            "calibration needs quantize, of another kind than stored, and no mesh"
        )
    impl = _kernels(kernels, layout.platform, exact)
    folder = Path(cache_dir) if cache_dir else hub.cache_dir()
    steps.enable_compile_cache(folder / "compiled")
    path = hub.resolve(str(name), cache=folder)
    kind = _dtype(
        stored_dtype(path) if dtype is None and is_orbax(path) else dtype, layout.platform
    )
    if isinstance(drafter, str | Path) and not is_name(drafter):
        small = hub.resolve(str(drafter), cache=folder)
        drafter = load(
            drafter,
            dtype=kind,
            mesh=mesh,
            rules=rules,
            quantize=None if is_orbax(small) and is_quantized(small) else quantize,
            kernels=kernels,
            cache_dtype=cache_dtype,
            cache_dir=cache_dir,
        )
    to_nearest = None if calibration else recipe
    checkpoint = load_checkpoint(path, dtype=kind, layout=layout, quantize=to_nearest)
    if recipe and calibration:
        checkpoint = _calibrated(checkpoint, recipe, calibration, kind)
    if note := spread_note(checkpoint.config):
        logger.warning("%s: %s", name, note)
    return LLM(
        checkpoint.params,
        checkpoint.config,
        checkpoint.tokenizer,
        dtype=kind,
        mesh=mesh,
        rules=rules,
        kernels=impl,
        cache_dtype=cache_dtype,
        max_len=max_len,
        max_batch=max_batch,
        default_params=checkpoint.default_params,
        eos_ids=checkpoint.eos_ids,
        drafter=drafter,
        num_draft=num_draft,
        verifier=verifier,
        exact=exact,
    )


def _are_texts(given: object) -> bool:
    if isinstance(given, str) or not isinstance(given, Sequence):
        return False
    return bool(given) and all(isinstance(text, str) for text in given)


def _calibrated(
    checkpoint: Checkpoint, recipe: Recipe, texts: Sequence[str], dtype: jnp.dtype
) -> Checkpoint:
    """A checkpoint with its matrices rounded as the texts suggest."""
    layerwise.refuse_quantized(checkpoint.params)
    tokens = layerwise.stretches(checkpoint.tokenizer, texts, checkpoint.config.max_len)
    schemes = schemes_of(checkpoint.config, recipe)
    params = smooth.smooth_model(checkpoint.params, checkpoint.config, schemes, tokens)
    params = gptq.round_model(params, checkpoint.config, schemes, tokens, dtype)
    return dataclasses.replace(checkpoint, params=params)


def _kernels(kernels: Impl, platform: str, exact: bool) -> Impl:
    """What runs on these devices.

    XLA can read new keys beside the cache, which is its fast way on CPU. The GPU kernels have not
    been run on a card yet: who wants them asks for them.
    """
    if kernels == "auto":
        return "auto" if platform == "tpu" else "xla"
    needs = {"xla": platform, "pallas_tpu": "tpu", "pallas_gpu": "gpu"}
    if kernels not in needs:
        raise InvalidArgument(f"kernels={kernels!r:.40}: one of auto, {', '.join(needs)}")
    if needs[kernels] != platform:
        raise InvalidArgument(f"kernels={kernels!r} runs on a {needs[kernels]}, not on {platform}")
    if exact and kernels == "pallas_gpu":
        raise InvalidArgument(
            "kernels='pallas_gpu' splits a row's keys by its length, so that exact=True would not"
            " hold; kernels='xla' holds it"
        )
    return kernels


def _dtype(dtype: str | jnp.dtype | None, platform: str) -> jnp.dtype:
    if dtype is None:
        return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    if str(dtype) not in DTYPES and getattr(dtype, "__name__", None) not in DTYPES:
        raise InvalidArgument(f"dtype={dtype!r}: one of {', '.join(DTYPES)}")
    return jnp.dtype(dtype)
