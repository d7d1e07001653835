"""jaxinfer: run a language model fast in JAX.

Commands:
  generate   continue prompts, or answer them where the model chats
  convert    write a model as an Orbax checkpoint, which loads straight to shardings
  prune      make a smaller model, by what matters least for a text
  bench      measure tokens per second, plain and with drafters
  audit      prove that a drafter does not change what a model says
  quality    say what quantizing a model costs, and what it gains
  plan       say whether a model fits a machine, and how fast at best

`jaxinfer COMMAND --help` lists the flags of a command.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

import jaxinfer
from jaxinfer.errors import JaxinferError, OutOfMemory

COMMANDS = ("generate", "convert", "prune", "bench", "audit", "quality", "plan")
HELP = ("-h", "--h", "-help", "--help", "--helpshort", "--helpfull")


def main(argv: Sequence[str]) -> int:
    """Run the command that argv[1] names; its exit code, or 2 for bad input."""
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout has gone: not a fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(argv: Sequence[str]) -> int:
    if len(argv) < 2 or argv[1] in HELP:
        print((__doc__ or "").strip())
        return 0 if len(argv) >= 2 else 2
    if argv[1] == "--version":
        print(jaxinfer.__version__)
        return 0
    name, rest = argv[1], list(argv[2:])
    if name not in COMMANDS:
        return _complain(f"no command {name!r}; there are: {', '.join(COMMANDS)}")
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    command = importlib.import_module(f"jaxinfer.cli.{name}")
    values = flags.FlagValues()
    command.define_flags(values)
    summary = (command.__doc__ or "").strip()
    if any(arg in HELP for arg in rest):
        print(f"{summary}\n\nFlags:\n{_describe(values)}")
        return 0
    try:
        extra = values([name, *rest])[1:]
        if extra:
            raise flags.Error(f"{extra[0]!r} is no flag; flags look like --prompt='...'")
        if getattr(values, "distributed", False):
            return _run_together(command, values)
        with _out_of_memory_in_one_line():
            return command.run(values) or 0
    except (flags.Error, JaxinferError) as error:
        return _complain(str(error))


def _run_together(command: Any, values: flags.FlagValues) -> int:
    """The command in one of many processes: only the first writes to stdout."""
    from jaxinfer import distributed

    results = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)  # the library that connects CPUs writes there by itself
    sys.stdout = results
    with distributed.start(values.coordinator, values.num_processes, values.process_id):
        if not distributed.is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
        try:
            with _out_of_memory_in_one_line():
                return command.run(values) or 0
        except BrokenPipeError:  # the reader of stdout has gone
            sys.exit(141)
        finally:
            sys.stdout.flush()


@contextlib.contextmanager
def _out_of_memory_in_one_line() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(
            f"out of memory: {error}: fewer or shorter prompts, or a smaller model"
        ) from error


def _describe(values: flags.FlagValues) -> str:
    """A line a flag, in the order in which the command defines them."""
    lines = []
    for module, defined in values.flags_by_module_dict().items():
        for flag in defined if not module.startswith("absl") else ():
            name = f"[no]{flag.name}" if flag.boolean else f"{flag.name}=..."
            shown = str(flag.default)[:30]
            default = "" if flag.default in (None, False, []) else f" [{shown}]"
            text = flag.help.split(";\n")[0]  # absl adds how to repeat a flag
            lines.append(f"  --{name:<24} {text}{default}")
    return "\n".join(lines)


def _complain(message: str) -> int:
    print("jaxinfer: " + " ".join(message.split()), file=sys.stderr)
    return 2


def run() -> None:
    """Entry point of the `jaxinfer` command."""
    sys.exit(main(sys.argv))
