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
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor
from jinja2 import nodes

from jaxinfer.checkpoint.source import one_line
from jaxinfer.errors import CorruptFile, InvalidArgument
from jaxinfer.template_budget import Beyond, Budget

MAX_TEMPLATE = 1 << 16  # characters; the longest in use have about half
MAX_NODES = 20_000  # of its syntax tree
MAX_WIDTH = 64  # of an indentation, and of what a slow method looks for


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILTERS = _words(
    "abs attr capitalize count d default dictsort e escape first float forceescape groupby int"
    " items last length list lower map max min reject rejectattr reverse safe select selectattr"
    " sort string title truncate unique upper"
)  # of jinja2's; the environment has more of its own
METHODS: Mapping[type, frozenset[str]] = {
    str: _words(
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit"
        " isidentifier islower isnumeric isprintable isspace istitle isupper join lower lstrip"
        " partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split"
        " splitlines startswith strip swapcase title upper"
    ),
    dict: _words("copy get items keys values"),
    list: _words("copy count index"),
    tuple: _words("count index"),
}
# Python takes time in proportion to the text times what is looked for.
SLOW_METHODS = _words("lstrip rfind rindex rpartition rsplit rstrip strip")
# Objects of jinja2 whose calls, and whose methods' calls, come back to the template's own code.
CALLABLE = (
    jinja2.runtime.BlockReference,
    jinja2.runtime.LoopContext,
    jinja2.runtime.Macro,
    jinja2.Undefined,
    jinja2.utils.Cycler,
    jinja2.utils.Joiner,
)


def render(source: str, variables: dict[str, Any], *, where: str = "chat template") -> str:
    """The text that a template makes of plain values (JSON's).

    Raises:
      InvalidArgument: with the template's own message, where it calls `raise_exception`.
      CorruptFile: for a template that is malformed, fails, or goes beyond a limit.
    """
    if len(source) > MAX_TEMPLATE:
        raise CorruptFile(f"{where}: has {len(source)} characters, above {MAX_TEMPLATE}")
    budget = Budget(variables.values())
    try:
        code = _compile(source)
        sandbox = Sandbox(budget)
        template = jinja2.Template.from_code(sandbox, code, dict(sandbox.globals))
        return budget.text(template.root_render_func(template.new_context(variables)))
    except _Raised as error:
        raise InvalidArgument(f"{where}: {one_line(error, 400)}") from None
    except jinja2.TemplateSyntaxError as error:
        detail = one_line(error.message, 200)
        raise CorruptFile(f"{where}: line {error.lineno}: {detail}") from None
    except Exception as error:  # a template can make any operation fail
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise CorruptFile(f"{where}: {kind}{one_line(error, 200)}") from None


class _Raised(Exception):
    """`raise_exception` of a template."""


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


class _Generator(jinja2.compiler.CodeGenerator):
    """Watches the clock while it compiles."""

    environment: Sandbox

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Compile one part of the tree."""
        self.environment.budget.spend(0)
        return super().visit(node, *args, **kwargs)


# Names of filters that the rewritten tree calls; no template can spell them.
TAKE, CONCAT, TICK = "take it", "concat them", "tick"


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of one rendering."""

    code_generator_class = _Generator
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
        own = {"join": self._join, "replace": self._replace, "indent": self._indent}
        own |= {"round": self._round, "tojson": self._to_json, "trim": self._trim}
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

    def concat(self, pieces: Iterable[str]) -> str:
        """Join what a block, a macro or a `{% set %}` collected."""
        return self.budget.text(pieces)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Run an operator of the template."""
        if operator == "%" and isinstance(left, str):
            raise jinja2.TemplateError("formats with %, which is not supported")
        if operator == "**" and not (abs(left) <= 2**64 and abs(right) <= 16):
            raise Beyond("makes a power that is too large")
        if operator == "*":
            for value, times in (left, right), (right, left):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int) and times > 0:
                    self.budget.spend(self.budget.size(value) * times)
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
            elif name in SLOW_METHODS:
                function, args = _search, (name, function, *args)
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
        self.budget.spend(self.budget.size(value))
        text = str(value)
        self.budget.spend(len(text))
        return text

    def _concat(self, values: Iterable[Any]) -> str:
        return self.budget.text(map(self._to_text, values))

    def _join(self, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        """The filter and the method of this name."""
        if attribute is not None:
            value = map(jinja2.filters.make_attrgetter(self, attribute), value)
        parts = [self._to_text(item) for item in self.budget.each(value)]
        self.budget.spend(sum(map(len, parts)) + len(d) * len(parts))
        return str(d).join(parts)

    def _replace(self, s: str, old: str, new: str, count: int | None = None) -> str:
        """The filter and the method of this name."""
        s = str(s)
        times = s.count(old) if count is None or count < 0 else min(s.count(old), count)
        self.budget.spend(len(s) + times * len(new))
        return s.replace(old, new, times)

    def _indent(
        self, s: str, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        size = _width(width)
        self.budget.spend(len(s) + (1 + len(s.splitlines())) * size)
        return jinja2.filters.do_indent(s, width, first, blank)

    def _round(self, value: float, precision: int = 0, method: Any = "common") -> float:
        _width(abs(precision))  # computes a power of ten
        return jinja2.filters.do_round(value, precision, method)

    def _trim(self, value: str, chars: str | None = None) -> str:
        return _search("trim", str(value).strip, chars)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as models saw it in training: without the escapes that web pages need."""
        _width(indent or 0)
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return self.budget.text(encoder.iterencode(value))


def _width(width: int | str) -> int:
    """The columns of an indentation, when they are few."""
    size = len(width) if isinstance(width, str) else width
    if size > MAX_WIDTH:
        raise Beyond(f"asks for a width of more than {MAX_WIDTH}")
    return size


def _search(name: str, method: Callable[..., Any], *args: Any) -> Any:
    """Call a method whose time is the product of the lengths of a text and of what it looks for."""
    if any(isinstance(arg, str) and len(arg) > MAX_WIDTH for arg in args):
        raise Beyond(f"looks with {name} for more than {MAX_WIDTH} characters")
    return method(*args)


def _raise_exception(message: Any) -> None:
    raise _Raised(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > MAX_WIDTH:
        raise Beyond(f"asks for a date of more than {MAX_WIDTH} characters")
    return datetime.datetime.now().strftime(pattern)


class _Rewrite(jinja2.visitor.NodeTransformer):
    """Puts rule 1 and rule 3 into the tree of a template, where the environment is not asked."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Count the rounds of a loop, those that its condition skips too."""
        self.generic_visit(node)
        tick = _filter(nodes.Const(None, lineno=node.lineno), TICK)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        if node.test is not None:
            node.test = _filter(node.test, TICK)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`~`."""
        self.generic_visit(node)
        return _filter(nodes.Tuple(node.nodes, "load", lineno=node.lineno), CONCAT)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        """A literal."""
        return _filter(self.generic_visit(node), TAKE)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """A literal, or the names that a value is unpacked into."""
        self.generic_visit(node)
        return _filter(node, TAKE) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """A slice makes a new value; a subscript does not."""
        self.generic_visit(node)
        return _filter(node, TAKE) if isinstance(node.arg, nodes.Slice) else node


def _filter(node: Any, name: str) -> nodes.Filter:
    """`node | name` in the syntax tree."""
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> types.CodeType:
    """The Python code of a template; the same for every rendering."""
    environment = Sandbox(Budget())
    tree = environment.parse(source)
    if sum(1 for _ in tree.find_all(nodes.Node)) > MAX_NODES:
        raise Beyond(f"has more than {MAX_NODES} parts")
    for node in tree.find_all((nodes.EvalContextModifier, nodes.ScopedEvalContextModifier)):
        raise jinja2.TemplateSyntaxError("autoescape is not supported", node.lineno)
    code = environment.compile(_Rewrite().visit(tree), raw=True)
    return compile(code, "<chat template>", "exec")
