"""Runs a chat template, a program written by a stranger, without letting it take the process along.

jinja2's sandbox keeps a template away from Python's internals, but not from all of the time and all
of the memory (`{{ 'a' * 10**9 }}`, nested loops that print nothing). A signal or a child process
could end such a bomb, but works on the main thread only, or costs a process a prompt. So the limits
are built into the program itself. Three rules hold together:

1. No value is large. Whatever an expression makes is measured before it can be used: literals,
   slices and `~` through a filter that `_Rewrite` puts around them in the syntax tree, operators,
   calls and filters because the environment runs them. What could be large at once (a product, a
   join, a replacement) is computed in advance and refused before it exists. Nesting is measured
   too: a list that holds itself twice is small in memory, but its text doubles at every level.
2. Only what is known can be called: the methods and filters listed here. Each does an amount of
   work in proportion to its arguments, which are small.
3. So every single step is short, and between steps the clock and the sum of all that was made are
   checked: in the body and the condition of every loop, and at every operator, call and filter.
"""

from __future__ import annotations

import datetime
import functools
import json
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.runtime
import jinja2.sandbox
from jinja2 import nodes

from jaxinfer.checkpoint.source import one_line
from jaxinfer.errors import CorruptFile, InvalidArgument

MAX_TEMPLATE = 100_000  # characters; the longest in use have about a third
MAX_NODES = 50_000  # of its syntax tree
MAX_SECONDS = 1.0  # for compiling and rendering together; real templates take milliseconds
MAX_CHARS = 1 << 20  # of the text, or of any one value, besides MAX_RATIO times the input
MAX_RATIO = 16
MAX_MADE = 16  # times the size of the text: the sum of all values made on the way
MAX_DEPTH = 100  # of lists in lists: deeper ones overflow the C stack when hashed
MAX_BITS = 1024  # of an integer
MAX_WIDTH = 64  # of an indentation
ITEM = 16  # what an item of a list costs, in characters

FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float forceescape groupby indent"
    " int items join last length list lower map max min reject rejectattr replace reverse round"
    " safe select selectattr sort string title trim truncate unique upper"
).split()
METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit"
        " isidentifier islower isnumeric isprintable isspace istitle isupper join lower lstrip"
        " partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split"
        " splitlines startswith strip swapcase title upper".split()
    ),
    dict: frozenset("copy get items keys values".split()),
    list: frozenset("copy count index".split()),
    tuple: frozenset("count index".split()),
}
# Objects of jinja2 whose calls, and whose methods' calls, come back to the template's own code.
CALLABLE = (
    jinja2.runtime.BlockReference,
    jinja2.runtime.LoopContext,
    jinja2.runtime.Macro,
    jinja2.Undefined,
    jinja2.utils.Cycler,
    jinja2.utils.Joiner,
)


def render(source: str, variables: Mapping[str, Any], *, where: str = "chat template") -> str:
    """The text that a template makes of plain values (JSON's).

    Raises:
      InvalidArgument: with the template's own message, where it calls `raise_exception`.
      CorruptFile: for a template that is malformed, fails, or goes beyond a limit.
    """
    if len(source) > MAX_TEMPLATE:
        raise CorruptFile(f"{where}: has {len(source)} characters, above {MAX_TEMPLATE}")
    budget = Budget(sum(map(_size, variables.values())))
    try:
        code = _compile(source, budget)
        sandbox = Sandbox(budget)
        template = jinja2.Template.from_code(sandbox, code, dict(sandbox.globals))
        return budget.text(template.root_render_func(template.new_context(variables)))
    except _Raised as error:
        raise InvalidArgument(f"{where}: {one_line(error, 400)}") from None
    except jinja2.TemplateSyntaxError as error:
        detail = one_line(error.message, 200)
        raise CorruptFile(f"{where}: line {error.lineno}: {detail}") from None
    except RecursionError:
        raise CorruptFile(f"{where}: nests or calls itself too deeply") from None
    except Exception as error:  # a template can make any operation fail
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise CorruptFile(f"{where}: {kind}{one_line(error, 200)}") from None


class _Raised(Exception):
    """`raise_exception` of a template."""


class _Beyond(jinja2.TemplateError):
    """A limit was reached."""


class Budget:
    """What one rendering may still use.

    Args:
      input_size: characters of all that the template is given.
    """

    def __init__(self, input_size: int) -> None:
        self.most = MAX_CHARS + MAX_RATIO * input_size
        self._left = self.most * MAX_MADE
        self._deadline = time.monotonic() + MAX_SECONDS
        # id -> (the container, its size, its depth). The container is kept so that no other can
        # get its id; they are immutable for a template, so that a size stays true.
        self._known: dict[int, tuple[Any, int, int]] = {}

    def spend(self, chars: int) -> None:
        """Account for work or memory, before it happens. Raises where there is too much of it."""
        self._left -= chars
        if chars > self.most:
            raise _Beyond(f"makes a value of more than {self.most} characters")
        if self._left < 0:
            raise _Beyond("makes too many values")
        if time.monotonic() > self._deadline:
            raise _Beyond(f"runs longer than {MAX_SECONDS:g} s")

    def take(self, value: Any) -> Any:
        """Account for a value that was just made, and return it."""
        if isinstance(value, Iterator) and not isinstance(value, CALLABLE):
            # Some filters are lazy; here nothing is. Like an iterator, what they return is true.
            value = _Items(self.each(value))
        self.spend(len(value) if isinstance(value, str) else 1)
        self.measure(value)
        return value

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each accounted for."""
        for item in items:
            self.spend(ITEM)
            yield item

    def measure(self, value: Any) -> tuple[int, int]:
        """Characters that the text of a value takes, about, and how deep lists nest in it."""
        if isinstance(value, str):
            return ITEM + len(value), 0
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise _Beyond(f"makes an integer of more than {MAX_BITS} bits")
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
                raise _Beyond("makes a list that is too large or too deep")
            self._known[id(value)] = known = value, size, depth
        return known[1:]

    def text(self, pieces: Iterable[str]) -> str:
        """The pieces in one, once it is known to be small."""
        held = []
        total = 0
        for piece in pieces:
            total += len(piece)
            self.spend(ITEM)
            if total > self.most:
                raise _Beyond(f"makes a text of more than {self.most} characters")
            held.append(piece)
        self.spend(total)
        return "".join(held)


class _Items(list):
    """What a lazy filter returns."""

    def __bool__(self) -> bool:
        return True


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, whose text would show what it holds: the one container that a template changes."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the model said, for training; here it is a plain block."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        """Read up to the end of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


# Names of filters that the rewritten tree calls; no template can spell them.
TAKE, CONCAT, TICK = "take it", "concat them", "tick"


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of one rendering."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, budget: Budget) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _Generation],
            # Nothing is computed while compiling: taking the context marks `finalize` as impure.
            optimized=False,
            finalize=jinja2.pass_context(lambda _, value: self._to_text(value)),
        )
        self.budget = budget
        self.concat = budget.text  # of what blocks, macros and `{% set %}` collect
        own = {"join": self._join, "replace": self._replace, "indent": self._indent}
        own |= {"round": self._round, "tojson": self._to_json}
        own |= {TAKE: lambda value: value, CONCAT: self._concat, TICK: lambda value: value}
        builtin = {name: jinja2.filters.FILTERS[name] for name in FILTERS}
        self.filters = {name: self._metered(f) for name, f in {**builtin, **own}.items()}
        self.globals = {
            "cycler": jinja2.utils.Cycler,
            "dict": dict,
            "joiner": jinja2.utils.Joiner,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "range": jinja2.sandbox.safe_range,
            "strftime_now": _strftime_now,
        }

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Run an operator of the template."""
        if operator == "%" and isinstance(left, str):
            raise jinja2.TemplateError("formats with %, which is not supported")
        if operator == "**" and not (abs(left) <= 2**64 and abs(right) <= 16):
            raise _Beyond("makes a power that is too large")
        if operator == "*":
            for value, times in (left, right), (right, left):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int) and times > 0:
                    self.budget.spend(self.budget.measure(value)[0] * times)
        return self.budget.take(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run a call of the template."""
        self.budget.spend(1)
        owner = getattr(function, "__self__", None)
        if not (
            isinstance(function, CALLABLE)
            or isinstance(owner, CALLABLE)
            or any(function is f for f in self.globals.values())
        ):
            kind = next((t for t in METHODS if isinstance(owner, t)), None)
            name = getattr(function, "__name__", "")
            if kind is None or name not in METHODS[kind]:
                what = name or type(function).__name__
                raise jinja2.TemplateError(f"calls {what}, which is not supported")
            if name == "join":
                function, args = self._join, (*args, owner)
            elif name == "replace":
                function, args = self._replace, (owner, *args)
        return self.budget.take(super().call(context, function, *args, **kwargs))

    def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that accounts for what it makes; jinja2's marks on it are kept."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.budget.spend(1)
            return self.budget.take(function(*args, **kwargs))

        return run

    def _to_text(self, value: Any) -> str:
        """The text of an expression that is printed."""
        if isinstance(value, str):
            return value
        self.budget.spend(self.budget.measure(value)[0])
        return str(value)

    def _concat(self, values: Iterable[Any]) -> str:
        return self.budget.text(map(self._to_text, values))

    @jinja2.pass_environment
    def _join(self, environment: Any, values: Any, separator: Any = "", attribute: Any = None) -> str:
        raise NotImplementedError

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as models saw it in training: without the escapes that web pages need."""
        self._check_width(indent)
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return self.budget.text(encoder.iterencode(value))
