"""jaxinfer prune: make a smaller model out of a larger one, by what matters least for a text.

jaxinfer prune --drop_layers=6 --width=1024 --output=small
jaxinfer bench --drafters=small

What matters is measured on the text. Nothing is trained afterwards: such a model drafts, or is
where training begins. It is written as an Orbax checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from absl import flags

from jaxinfer.cli.model_flags import define_model_flags, load_model, read_text
from jaxinfer.errors import InvalidArgument


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags on `values`."""
    define_model_flags(values)
    to: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_integer("drop_layers", 0, "Layers that are left out.", lower_bound=0, **to)
    flags.DEFINE_integer("width", None, "Hidden units that each MLP keeps; default: all.", **to)
    flags.DEFINE_string("sparsity", None, "2:4: two of four neighbouring inputs are zero.", **to)
    flags.DEFINE_string("text", "own", "A text file; own: Python's documentation.", **to)
    flags.DEFINE_string("output", None, "The folder to write; must not exist.", **to)


def run(values: flags.FlagValues) -> None:
    """Prune as the flags say."""
    if not values.output:
        raise InvalidArgument("where to? give --output=FOLDER")
    if Path(values.output).exists():
        raise InvalidArgument(f"--output={values.output} is there already; name a new folder")
    if values.quantize:
        raise InvalidArgument("--quantize: prune first, then convert --quantize what came of it")
    from jaxinfer import layerwise, prune
    from jaxinfer.checkpoint.orbax import save_orbax
    from jaxinfer.checkpoint.placement import Checkpoint

    what = {"drop_layers": values.drop_layers, "width": values.width, "sparsity": values.sparsity}
    prune.check_options(**what)
    text = read_text(values.text)
    llm = load_model(values)
    layerwise.refuse_quantized(llm.params)
    prune.check(llm.config, **what)
    tokens = layerwise.stretches(llm.tokenizer, [text], llm.max_len)
    importance = prune.measure(llm.params, llm.config, tokens)
    params, config = prune.prune(llm.params, llm.config, importance, **what)
    made = Checkpoint(params, config, llm.tokenizer, llm.default_params, llm.eos_ids)
    save_orbax(Path(values.output), made)
    print(
        f"{values.output}: {config.num_layers} of {llm.config.num_layers} layers, hidden width"
        f" {config.hidden} of {llm.config.hidden}",
        file=sys.stderr,
    )
