"""`Fields`: a description written by a stranger, read field by field with types and ranges checked.

config.json and GGUF metadata both go through it. What is malformed raises `CorruptFile`; what is
well formed but asks for maths we do not have raises `UnsupportedModel`; either in one line that
names the file and the field. `refuse_rest` turns whatever nobody read into such a line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from jaxinfer.errors import CorruptFile, UnsupportedModel

T = TypeVar("T")
REQUIRED: Any = object()  # as a default: the field must be there

# Far beyond any model known, and small enough that no loop or product of ours runs away.
MAX_LAYERS = 1000
MAX_VOCAB = 10_000_000
MAX_WIDTH = 2**20
MAX_HEADS = 2**14
MAX_LEN = 2**30


class Fields:
    """Values of a mapping, each read at most by name, and a memory of which were read.

    Args:
      values: what a JSON or GGUF parser returned.
      where: the file, for messages.
      prefix: what stands before every field's name in messages, such as "rope_scaling.".
    """

    def __init__(self, values: Any, where: str, prefix: str = "") -> None:
        if not isinstance(values, Mapping):
            field = prefix.rstrip(".") or "the file"
            raise CorruptFile(f"{where}: {field} is {_show(values)}; expected an object")
        self.values = values
        self.where = where
        self.prefix = prefix
        self._seen: set[Any] = set()

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and is not null."""
        return self.values.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands; the field counts as read."""
        self._seen.add(name)
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise CorruptFile(f"{self.where}: {self.prefix}{name} is missing")
        return value

    def corrupt(self, name: str, expected: str) -> CorruptFile:
        """The error that says what a field holds and what it should hold."""
        held = _show(self.values.get(name))
        return CorruptFile(f"{self.where}: {self.prefix}{name} is {held}; expected {expected}")

    def unsupported(self, name: str, why: str = "not supported") -> UnsupportedModel:
        """The error that says a field asks for something this library does not do."""
        held = _show(self.values.get(name))
        return UnsupportedModel(f"{self.where}: {self.prefix}{name} = {held} is {why}")

    def integer_or_none(
        self, name: str, default: Any = None, *, least: int = 1, most: int
    ) -> int | None:
        """A whole number in [least, most]; null and, by default, absence give None."""
        value = self.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.corrupt(name, "a whole number")
        if not least <= value <= most:
            raise self.corrupt(name, f"a whole number from {least} to {most}")
        return int(value)

    def integer(self, name: str, default: Any = REQUIRED, *, least: int = 1, most: int) -> int:
        """As `integer_or_none`, but null is an error."""
        value = self.integer_or_none(name, default, least=least, most=most)
        if value is None:
            raise self.corrupt(name, "a whole number")
        return value

    def number_or_none(
        self, name: str, default: Any = None, *, least: float = 0.0, most: float = 1e12
    ) -> float | None:
        """A number above 0, in [least, most]; null and, by default, absence give None."""
        value = self.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.corrupt(name, "a number")
        if not (value > 0 and least <= value <= most):  # false for NaN too
            raise self.corrupt(name, f"a number from {least:g} (above 0) to {most:g}")
        return float(value)

    def number(
        self, name: str, default: Any = REQUIRED, *, least: float = 0.0, most: float = 1e12
    ) -> float:
        """As `number_or_none`, but null is an error."""
        value = self.number_or_none(name, default, least=least, most=most)
        if value is None:
            raise self.corrupt(name, "a number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.corrupt(name, "true or false")
        return value

    def choice(self, name: str, default: Any, choices: Mapping[str, T]) -> T:
        """What `choices` gives for the text of this field; another text is unsupported."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.corrupt(name, "a text")
        if value not in choices:
            raise UnsupportedModel(
                f"{self.where}: {self.prefix}{name} = {_show(value)} is not supported;"
                f" supported: {', '.join(sorted(choices))}"
            )
        return choices[value]

    def items(self, name: str, length: int) -> list[Any] | None:
        """A list of at least `length` items, cut to it; None where it is null or absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not length <= len(value) <= MAX_LAYERS:
            raise self.corrupt(name, f"a list of {length} items, one a layer")
        return list(value[:length])

    def table(self, name: str) -> Fields | None:
        """A nested object; None where it is null, empty or absent."""
        value = self.get(name)
        if value is None or value == {}:
            return None
        return Fields(value, self.where, f"{self.prefix}{name}.")

    def only(self, name: str, *allowed: Any, why: str = "not supported") -> None:
        """Refuse the field unless it is absent, null or one of `allowed`."""
        value = self.get(name)
        same = (type(value) is type(a) and value == a for a in allowed)
        if value is not None and not any(same):
            raise self.unsupported(name, why)

    def ignore(self, names: Iterable[str]) -> None:
        """These fields are known not to change the maths of a forward, whatever they hold."""
        self._seen.update(names)

    def refuse_rest(self) -> None:
        """Refuse the first field that nobody read. A null says "not set", and passes."""
        for name, value in self.values.items():
            if name not in self._seen and value is not None:
                raise UnsupportedModel(
                    f"{self.where}: field {_show(f'{self.prefix}{name}')} (= {_show(value)}) is not"
                    " understood and may change what the model computes"
                )


def _show(value: Any) -> str:
    """The value on one line of at most about 60 characters; containers by their size only."""
    if isinstance(value, Mapping):
        return f"an object of {len(value)} items"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)} items"
    if isinstance(value, int) and abs(value) > 10**40:
        return "a whole number of over 40 digits"  # Python itself refuses to print very long ones
    text = repr(value)
    return text if len(text) <= 64 else f"{text[:60]}..."
