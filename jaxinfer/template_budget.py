"""`Budget`: how much a stranger's template may compute; `jaxinfer.template` has the whole idea."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
import jinja2.runtime

MAX_SECONDS = 1.0  # of the thread's CPU, compiling included; real templates take milliseconds
MAX_CHARS = 1 << 20  # of the text, or of any one value, besides MAX_RATIO times the input
MAX_RATIO = 16
MAX_MADE = 16  # times the size of the text: the sum of all values made on the way
MAX_DEPTH = 100  # of lists in lists: deeper ones overflow the C stack when hashed
MAX_BITS = 60  # of an integer: Python hashes larger ones alike, and dictionaries get slow
ITEM = 16  # what an item of a list costs, in characters


class Beyond(jinja2.TemplateError):
    """A limit was reached."""


class Budget:
    """What one rendering may still use.

    Args:
      given: the plain values (JSON's) that the template is given: longer ones allow longer texts.
    """

    def __init__(self, given: Iterable[Any] = ()) -> None:
        self.most = MAX_CHARS + MAX_RATIO * sum(map(_size, given))
        self._left = self.most * MAX_MADE
        self._deadline = time.thread_time() + MAX_SECONDS
        # id -> (the container, its size, its depth). The container is kept so that no other can
        # get its id; they are immutable for a template, so that a size stays true.
        self._known: dict[int, tuple[Any, int, int]] = {}

    def spend(self, chars: int) -> None:
        """Account for work or memory, before it happens. Raises where there is too much of it."""
        self._left -= chars
        if chars > self.most:
            raise Beyond(f"makes a value of more than {self.most} characters")
        if self._left < 0:
            raise Beyond("makes too many values")
        if time.thread_time() > self._deadline:
            raise Beyond(f"runs longer than {MAX_SECONDS:g} s")

    def take(self, value: Any) -> Any:
        """Account for a value that was just made, and return it."""
        if isinstance(value, Iterator) and not isinstance(value, jinja2.runtime.LoopContext):
            # Some filters are lazy; here nothing is. Like an iterator, what they return is true.
            value = _Items(self.each(value))
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise Beyond(f"makes an integer of more than {MAX_BITS} bits")
        size = self.size(value)
        self.spend(size if isinstance(value, str) else 1)
        return value

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each accounted for."""
        for item in items:
            self.spend(ITEM)
            yield item

    def size(self, value: Any) -> int:
        """Characters of the value's text, about."""
        return len(value) if isinstance(value, str) else self.measure(value)[0]

    def measure(self, value: Any) -> tuple[int, int]:
        """What a value takes as an item of a list, in characters, and how deep lists nest in it."""
        if isinstance(value, str):
            return ITEM + len(value), 0
        if isinstance(value, range):
            return ITEM + ITEM * len(value), 1
        if not isinstance(value, (list, tuple, dict)):
            return ITEM, 0
        known = self._known.get(id(value))
        if known is None:
            items = [*value, *value.values()] if isinstance(value, dict) else value
            self.spend(ITEM * len(items))
            inner = [self.measure(item) for item in items]
            size = ITEM + sum(size for size, _ in inner)
            depth = 1 + max((depth for _, depth in inner), default=0)
            if size > self.most or depth > MAX_DEPTH:
                raise Beyond("makes a list that is too large or too deep")
            self._known[id(value)] = known = value, size, depth
        return known[1:]

    def text(self, pieces: Iterable[str]) -> str:
        """The pieces in one, once it is known to be small."""
        held = list(self.each(pieces))
        self.spend(sum(map(len, held)))
        return "".join(held)


class _Items(list):
    """What a lazy filter returns."""

    def __bool__(self) -> bool:
        return True


def _size(value: Any) -> int:
    """Characters of a plain value, about."""
    if isinstance(value, str):
        return ITEM + len(value)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return ITEM + sum(map(_size, value)) if isinstance(value, list) else ITEM
