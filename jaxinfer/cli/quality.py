"""jaxinfer quality: what quantizing and pruning cost, and what they gain.

jaxinfer quality --quantize=int8 --quantize=int4 --plot=quality.png
jaxinfer quality --model=gemma-3-270m --quantize='embed=int8,int4:g64' --text=book.txt
jaxinfer quality --other=pruned --other=converted

Each recipe, and each other model that was made from this one, is compared with it in float32, on
text: perplexity, KL divergence of next-token distributions, how often both would choose the same
token, bytes, and tokens a second.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxinfer.cli.model_flags import define_model_flags, load_model, read_text
from jaxinfer.errors import InvalidArgument

HEAD = (
    f"{'recipe':28} {'MB':>7} {'perplexity':>10} {'mean KL':>9} {'max KL':>8}"
    f" {'agree':>6} {'tok/s':>7} {'speed':>6}"
)
DEFAULT = ("int8", "w8a8", "fp8", "int4", "int2")


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags on `values`."""
    define_model_flags(values, many=True)
    to: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_multi_string("other", [], "A model made from it, such as a pruned one.", **to)
    flags.DEFINE_string("text", None, "A text file; default: Python's own documentation.", **to)
    flags.DEFINE_integer("tokens", 4096, "How much of it is read.", lower_bound=64, **to)
    flags.DEFINE_integer("runs", 3, "Runs of each model for its speed; 0: none.", **to)
    flags.DEFINE_string("plot", None, "Draw bytes against KL into this .png or .svg.", **to)
    flags.DEFINE_string("json", None, "Write the figures into this file.", **to)


def run(values: flags.FlagValues) -> None:
    """Compare as the flags say."""
    if not 0 <= values.runs <= 1000:
        raise InvalidArgument(f"--runs={values.runs}: 0 to 1000")
    from jaxinfer import layerwise
    from jaxinfer.bench import plot, quality
    from jaxinfer.bench.prompts import own_text
    from jaxinfer.checkpoint import hub
    from jaxinfer.recipes import make_recipe

    for path in filter(None, (values.plot, values.json)):
        if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
            raise InvalidArgument(f"{path}: name a file, in a folder that is there")
    if values.plot:
        plot.draw_quality([])  # before anything is measured: fails where it will fail

    text = own_text() if values.text is None else read_text(values.text)
    recipes = values.quantize or ([] if values.other else list(DEFAULT))
    made = [make_recipe(recipe, "cpu") for recipe in recipes]  # before anything is measured
    if values.calibrate is not None:
        if not recipes:
            raise InvalidArgument("--calibrate rounds what --quantize names: name one")
        if any(recipe and recipe.stored for recipe in made):
            raise InvalidArgument(
                "--calibrate does not go with --quantize=stored, which keeps blocks"
            )
        read_text(values.calibrate)
    # Where they are, before anything is measured.
    others = [(Path(name).name, str(hub.resolve(name))) for name in values.other]
    reference = load_model(
        values, dtype="float32", quantize=None, calibration=None, cache_dtype=None
    )
    layerwise.refuse_quantized(reference.params)
    rows = quality.stretches(reference, text, values.tokens)
    found = [_row("float32", reference, {})]
    print(HEAD, flush=True)
    for name, options in _rows(recipes, others):
        other = load_model(values, **options)
        row = _row(name, other, quality.summary(quality.compare(reference, other, rows)))
        if values.runs:
            row |= quality.speed(reference, other, rows[0][:32].tolist(), values.runs)
        if len(found) == 1:  # the text's own perplexity is known now
            found[0]["perplexity"] = row["reference_perplexity"]
            print(_line(found[0]), flush=True)
        found.append(row)
        print(_line(row), flush=True)
        del other
    if values.json:
        result = {"model": values.model, "tokens": int(rows.size), "rows": found}
        Path(values.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
    if values.plot:
        plot.draw_quality(found, values.plot)
        print(f"picture: {values.plot}", file=sys.stderr)


def _rows(
    recipes: Sequence[str], others: Sequence[tuple[str, str]]
) -> list[tuple[str, dict[str, Any]]]:
    """A row's name, and how its model is loaded; `others` are names and paths."""
    by_recipe = [(recipe, {"quantize": recipe}) for recipe in recipes]
    by_path = [
        (name, {"name": path, "quantize": None, "calibration": None}) for name, path in others
    ]
    return by_recipe + by_path


def _row(name: str, llm: Any, figures: dict[str, Any]) -> dict[str, Any]:
    return {"recipe": name, "bytes": llm.nbytes, "dtype": llm.model.dtype.name, **figures}


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['recipe'][:28]:28} {row['bytes'] / 1e6:7.1f} {row['perplexity']:10.3f}"]
    if "mean_kl" in row:
        cells.append(f"{row['mean_kl']:9.6f} {row['max_kl']:8.4f} {100 * row['agreement']:5.1f}%")
    if "speedup" in row:
        cells.append(f"{row['tokens_per_second']:7.1f} {row['speedup']:5.2f}x")
    return " ".join(cells)
