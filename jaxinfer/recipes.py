"""Recipes: which matrix of a model is kept in how many bits, as one line of text.

    int8                                   every matrix, a scale an output channel
    int4:g64:zero                          groups of 64 inputs, with zero points
    embed|head=int8,layer_(0|29)/=int8,int4    the first rule whose pattern is found in a name
    down=none,w8a8                         `none` leaves a matrix as it is

A name is a path such as "layer_0/attn/q/kernel" or "embed/table". "stored" keeps the blocks of a
GGUF file; those of five and six bits take eight.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from jaxinfer.errors import InvalidArgument
from jaxinfer.quantize import Scheme

KINDS = {
    "int8": Scheme(),
    "int4": Scheme(bits=4, group=32, zero=True, scale_dtype="bfloat16"),
    "int2": Scheme(bits=2, group=16, zero=True, scale_dtype="bfloat16"),
    "fp8": Scheme(fp8=True),
    "w8a8": Scheme(digits=1),
    "none": None,
}
STORED = "stored"
MAX_RULES = 64


def is_matrix(path: str) -> bool:
    """Whether the parameter at a path is a matrix, and not the scale or bias beside one."""
    return path.endswith(("kernel", "table"))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A scheme for each matrix; hashable."""

    text: str
    rules: tuple[tuple[str, Scheme | None], ...]  # a pattern, and what it means where it is found
    platform: str

    def scheme(self, path: str, outputs: int, inputs: int) -> Scheme | None:
        """Of the parameter at `path`, a matrix of so many outputs and inputs; None: as it is.

        Raises InvalidArgument where the matrix does not divide; says what would.
        """
        if not is_matrix(path):
            return None
        found = next((s for pattern, s in self.rules if re.search(pattern, path)), None)
        if found is None:
            return None
        if inputs % (found.group or 1):
            fits = [n for n in (16, 32, 64, 128, 256) if not inputs % n]
            raise InvalidArgument(
                f"quantize={self.text:.60}: groups of {found.group} do not divide the {inputs}"
                f" inputs of {path}; {', '.join(map(str, fits)) or 'a scale a channel'} would"
            )
        if outputs % found.in_byte:
            raise InvalidArgument(
                f"quantize={self.text:.60}: {found.in_byte} codes a byte do not divide the"
                f" {outputs} outputs of {path}; int8 would"
            )
        return on_platform(found, self.platform)

    @property
    def stored(self) -> bool:
        """Whether the blocks of a GGUF file are kept."""
        return self.text == STORED


def make_recipe(text: str | None, platform: str) -> Recipe | None:
    """The recipe that a text names, for devices of a platform ("cpu", "gpu", "tpu").

    Raises InvalidArgument where the text is no recipe; says what is.
    """
    if text is None:
        return None
    if not isinstance(text, str) or not text.strip():
        raise InvalidArgument(f"quantize={text!r:.40}: a text such as {', '.join(KINDS)}")
    if text == STORED:
        return Recipe(text, (), platform)
    parts = text.split(",")
    if len(parts) > MAX_RULES:
        raise InvalidArgument(f"quantize={text[:40]!r}...: more than {MAX_RULES} rules")
    return Recipe(text, tuple(_rule(text, part) for part in parts), platform)


def _rule(text: str, part: str) -> tuple[str, Scheme | None]:
    pattern, equals, spec = (x.strip() for x in part.rpartition("="))
    if equals and not pattern:
        raise InvalidArgument(f"quantize={text!r:.60}: no pattern before {part!r:.30}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise InvalidArgument(f"quantize={text!r:.60}: {pattern!r:.30}: {error}") from error
    name, *changes = spec.strip().split(":")
    if name not in KINDS:
        raise InvalidArgument(
            f"quantize={text!r:.60}: {name!r:.30} is none of {', '.join([*KINDS, STORED])}"
        )
    scheme = KINDS[name]
    for change in changes:
        scheme = _changed(scheme, change, text)
    return pattern, scheme


def _changed(scheme: Scheme | None, change: str, text: str) -> Scheme:
    size = change[1:]
    if scheme is not None and not scheme.fp8 and not scheme.digits:
        if change in ("zero", "symmetric"):
            return dataclasses.replace(scheme, zero=change == "zero")
        if change == "channel":
            return dataclasses.replace(scheme, group=None, scale_dtype="float32")
        if change[:1] == "g" and size.isdecimal() and len(size) < 6 and int(size) >= 8:
            return dataclasses.replace(scheme, group=int(size), scale_dtype="bfloat16")
    raise InvalidArgument(
        f"quantize={text!r:.60}: {change!r:.20} is none of g32 (or another number from 8),"
        " channel, zero, symmetric, and only int8, int4 and int2 take them"
    )


def on_platform(scheme: Scheme, platform: str) -> Scheme:
    """The scheme as a platform multiplies with it.

    Whole numbers are what a CPU is fast with: two digits of an activation stand for a float. Bytes
    with a scale an output are multiplied as they lie; all else is unpacked, matrix by matrix.
    """
    if platform != "cpu":
        return scheme
    digits = scheme.digits if scheme.fp8 or scheme.digits else 2
    outlined = scheme.fp8 or scheme.bits < 8 or scheme.group is not None
    return dataclasses.replace(scheme, digits=digits, outlined=outlined)


def scheme_fields(scheme: Scheme) -> dict[str, Any]:
    """What a file keeps of a scheme: all but what `on_platform` has made of it."""
    one = scheme.digits % 2  # two are how a CPU multiplies by a float
    fields = {**dataclasses.asdict(scheme), "digits": one}
    del fields["outlined"]
    return fields


def read_scheme(fields: dict[str, Any], outputs: int, inputs: int) -> Scheme:
    """The scheme of a matrix from fields that a file holds (`scheme_fields`); believes none.

    Raises InvalidArgument where they are no scheme, or none of such a matrix.
    """
    names = set(scheme_fields(Scheme()))
    if set(fields) != names:
        raise InvalidArgument(f"fields {sorted(set(map(str, fields)) ^ names)[:3]}")
    scheme = Scheme(**fields)
    group, scales = scheme.group, ("float32", "bfloat16", "float16")
    if (
        any(type(x) is not int for x in (scheme.bits, scheme.digits))
        or scheme.bits not in (8, 4, 2)
        or not all(isinstance(x, bool) for x in (scheme.zero, scheme.fp8))
        or scheme.scale_dtype not in scales
        or scheme.digits not in (0, 1)
        or (group is not None and (type(group) is not int or group < 1 or inputs % group))
        or outputs % scheme.in_byte
        or (scheme.fp8 and (scheme.bits != 8 or scheme.zero))
        or (scheme.digits and scheme != KINDS["w8a8"])
    ):
        raise InvalidArgument(f"no scheme of {outputs} outputs and {inputs} inputs")
    return scheme


Schemes = dict[str, Scheme]  # of each parameter that is quantized, by its path


def matrix_size(shape: tuple[int, ...], inputs: tuple[int, ...]) -> tuple[int, int]:
    """Outputs and inputs of a weight of this shape, whose products sum over the axes `inputs`."""
    count = math.prod(shape[i] for i in inputs)
    return math.prod(shape) // count, count
