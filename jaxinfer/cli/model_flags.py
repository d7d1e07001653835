"""The flags that say which model and how it is loaded; every command shares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags

from jaxinfer.checkpoint.aliases import DEFAULT_MODEL
from jaxinfer.errors import InvalidArgument

DEVICES = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # our name -> JAX's


def define_model_flags(values: flags.FlagValues, many: bool = False) -> None:
    """Define the flags on `values`; `many`: --quantize may be given several times."""
    to: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("model", DEFAULT_MODEL, "Alias, hf://org/name, folder or .gguf file.", **to)
    flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; default: by device.", **to)
    define = flags.DEFINE_multi_string if many else flags.DEFINE_string
    define("quantize", None, "int8, int4, int2, fp8, w8a8, stored, or rules by name.", **to)
    what = "Round by GPTQ, as this text file suggests; own: Python's manual."
    flags.DEFINE_string("calibrate", None, what, **to)
    flags.DEFINE_string("device", None, "cpu, gpu or tpu; default: the best there is.", **to)
    flags.DEFINE_string("kernels", "auto", "Attention: xla, pallas_tpu or pallas_gpu.", **to)
    flags.DEFINE_string("cache_dtype", None, "int8 or fp8: keys and values in eight bits.", **to)
    flags.DEFINE_integer("max_len", None, "Context in tokens; default: the model's own.", **to)


def define_mesh_flags(values: flags.FlagValues) -> None:
    """Define the flags that spread a model over devices, and over processes."""
    to: dict[str, Any] = {"flag_values": values}
    what = "DATAxMODEL devices, such as 1x8: rows over DATA, weights over MODEL."
    flags.DEFINE_string("mesh", None, what, **to)
    what = "This is one of many processes, all started with the same flags."
    flags.DEFINE_boolean("distributed", False, what, **to)
    what = "host:port of process 0; with the next two, where JAX finds none."
    flags.DEFINE_string("coordinator", None, what, **to)
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", **to)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", **to)


def make_mesh(text: str | None) -> Any:
    """The mesh that --mesh says; of many processes all devices, where it says nothing."""
    import jax

    import jaxinfer

    if text is None:
        return jaxinfer.make_mesh(model=jax.device_count()) if jax.process_count() > 1 else None
    data, _, model = text.partition("x")
    if not (data.isdecimal() and model.isdecimal()):
        raise InvalidArgument(f"--mesh={text}: DATAxMODEL, such as 1x8")
    return jaxinfer.make_mesh(data=int(data), model=int(model))


def define_speculation_flags(values: flags.FlagValues) -> None:
    """Define the flags that say how tokens are drafted and verified."""
    to: dict[str, Any] = {"flag_values": values}
    what = "Guesses: auto, none, ngram, self, self:int8, a model by name."
    flags.DEFINE_string("drafter", "none", what, **to)
    flags.DEFINE_string("num_draft", None, "Tokens it offers a round; auto: as many as pay.", **to)
    judged = "exact, rejection or block; auto: as suits the drafter."
    flags.DEFINE_string("verifier", "auto", judged, **to)
    flags.DEFINE_boolean("exact", False, "The same bits with and without a drafter; slower.", **to)


def speculation_options(values: flags.FlagValues) -> dict[str, Any]:
    """Those flags as arguments of `load`."""
    return {
        "drafter": values.drafter,
        "num_draft": None if values.num_draft is None else draft_length(values.num_draft),
        "verifier": values.verifier,
        "exact": values.exact,
    }


def draft_length(text: str) -> Any:
    """The value of --num_draft: "auto" or a number."""
    if text != "auto" and not text.isdecimal():
        raise InvalidArgument(f"--num_draft={text}: 'auto' or a whole number")
    return text if text == "auto" else int(text)


def load_drafter(llm: Any, name: str, num_draft: str, quantize: str | None) -> Any:
    """The drafter `name` for an LLM that is loaded already; `name` may be that of a model, which is
    then kept in the same dtype and recipe, rounded to nearest."""
    import jaxinfer
    from jaxinfer.drafters import is_name

    other = (
        name
        if is_name(name)
        else jaxinfer.load(
            name,
            dtype=llm.model.dtype,
            quantize=quantize,
            cache_dtype=llm.model.store,
            kernels=llm.model.impl,
            mesh=llm.model.layout.mesh,
        )
    )
    return llm.speculation(other, draft_length(num_draft)).drafter


def load_model(values: flags.FlagValues, **options: Any) -> Any:
    """The LLM that the flags name; `options` of `load`, `name` among them, win."""
    import jax

    import jaxinfer

    if values.device:
        if values.device not in DEVICES:
            raise InvalidArgument(f"--device={values.device}: one of {', '.join(DEVICES)}")
        jax.config.update("jax_platforms", DEVICES[values.device])
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter from JAX without its CUDA plugin
        raise InvalidArgument(
            f"--device={values.device or 'default'} is not there: {error}"
        ) from error
    if "mesh" in values:
        options["mesh"] = make_mesh(values.mesh)
    named: dict[str, Any] = {"name": values.model} | {
        name: values[name].value
        for name in ("dtype", "quantize", "kernels", "max_len", "cache_dtype")
    }
    if values.calibrate is not None:
        named["calibration"] = [read_text(values.calibrate)]
    return jaxinfer.load(**(named | options))


def read_text(path: str) -> str:
    """The text at a path; "own": half of Python's documentation, for calibrating."""
    if path == "own":
        from jaxinfer.bench.prompts import own_text

        return own_text(1)
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: {error}") from error
