"""jaxinfer plan: will a model fit, on which machine, and how fast at best.

For a TPU slice the real programs are compiled by the TPU compiler, which needs no TPU
(pip install 'jaxinfer[plan]'); GPUs and this CPU are planned from shapes. No weights are
downloaded.

  jaxinfer plan --model=llama-3-70b --topology=v5e:4x4 --quantize=int8
  jaxinfer plan --model=qwen3-8b --topology=h100:1 --drafter=qwen3-0.6b
  jaxinfer plan --model=llama-3.1-405b --sweep --topology=v5p
  jaxinfer plan --model=gemma-3-27b --sweep --plot=slices.png
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags

from jaxinfer.errors import InvalidArgument

PICTURES = (".png", ".pdf", ".svg")


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags on `values`."""
    to: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string(
        "model", "llama-3-8b", "Preset, alias, hf://org/name, folder or .gguf file.", **to
    )
    flags.DEFINE_list("topology", [], "v5e:4x4, h100:8, cpu; with --sweep several, or chips.", **to)
    flags.DEFINE_integer("batch", 8, "Rows at once.", **to)
    flags.DEFINE_integer("context", 8192, "Tokens a row, prompt and answer.", **to)
    flags.DEFINE_string("quantize", None, "int8, int4 or another recipe; default: none.", **to)
    flags.DEFINE_string("dtype", "bfloat16", "float32, bfloat16 or float16.", **to)
    flags.DEFINE_string("cache_dtype", None, "int8 or fp8: the cache too; default: as dtype.", **to)
    flags.DEFINE_string("drafter", "ngram", "none, ngram, or a second model by name.", **to)
    flags.DEFINE_integer("num_draft", 7, "Tokens it offers a round.", **to)
    flags.DEFINE_float("acceptance", 0.7, "Probability that one of them is kept.", **to)
    flags.DEFINE_integer("data", 1, "Chips along which the batch is cut.", **to)
    flags.DEFINE_boolean("compile", True, "Compile for TPUs; else from shapes alone.", **to)
    flags.DEFINE_boolean("sweep", False, "Compare machines in a table.", **to)
    flags.DEFINE_string("plot", None, "Save a picture in this file.", **to)
    flags.DEFINE_boolean("json", False, "Write one JSON object; with --sweep, a list.", **to)


def run(values: flags.FlagValues) -> int:
    """Plan as the flags say; 1 where the model does not fit."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # with libtpu installed, JAX would look for a TPU
    from jaxinfer.planner import report
    from jaxinfer.planner.plan import plan, sweep

    if len(values.topology) > 1 and not values.sweep:
        raise InvalidArgument("--topology names several: add --sweep to compare them")
    if values.plot:
        file = Path(values.plot).absolute()
        if not file.parent.is_dir() or file.is_dir() or file.suffix not in PICTURES:
            raise InvalidArgument(f"--plot={values.plot}: a file {', '.join(PICTURES)} in a folder")
    options: dict[str, Any] = {
        name: values[name].value
        for name in (
            *(
                "batch",
                "context",
                "quantize",
                "dtype",
                "cache_dtype",
                "drafter",
                "num_draft",
                "acceptance",
            ),
            *("data", "compile"),
        )
    }
    if values.sweep:
        plans = sweep(values.model, values.topology or ["v5e", "v6e", "v5p"], **options)
    else:
        plans = [plan(values.model, *values.topology, **options)]
    if values.json:
        found = [dataclasses.asdict(p) for p in plans]
        print(json.dumps(found if values.sweep else found[0]))
    else:
        print(report.table(plans) if values.sweep else report.text(plans[0]))
    if values.plot:
        report.draw(plans, values.plot)
    return 0 if any(p.fits for p in plans) else 1
