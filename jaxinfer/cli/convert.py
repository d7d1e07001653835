"""jaxinfer convert: write a model as an Orbax checkpoint, which loads straight to shardings.

jaxinfer convert --model=gemma-3-270m --output=gemma-orbax
jaxinfer generate --model=gemma-orbax --prompt="Once upon a time"
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from jaxinfer.cli.model_flags import define_model_flags, load_model
from jaxinfer.errors import InvalidArgument


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags on `values`."""
    define_model_flags(values)
    flags.DEFINE_string("output", None, "The folder to write; must not exist.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Convert as the flags say."""
    if not values.output:
        raise InvalidArgument("where to? give --output=FOLDER")
    if Path(values.output).exists():
        raise InvalidArgument(f"--output={values.output} is there already; name a new folder")
    from jaxinfer.checkpoint.orbax import save_orbax
    from jaxinfer.checkpoint.placement import Checkpoint
    from jaxinfer.layerwise import any_quantized

    llm = load_model(values)
    save_orbax(
        Path(values.output),
        Checkpoint(llm.params, llm.config, llm.tokenizer, llm.default_params, llm.eos_ids),
    )
    kind = values.quantize or ("few bits" if any_quantized(llm.params) else llm.model.dtype.name)
    print(f"{values.output}: {llm.nbytes:,} bytes of weights in {kind}", file=sys.stderr)
