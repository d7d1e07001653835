"""jaxinfer: run a language model fast in JAX.

Commands:
  generate   continue prompts, or answer them where the model chats
  convert    write a model as an Orbax checkpoint, which loads straight to shardings

`jaxinfer COMMAND --help` lists the flags of a command.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from absl import flags

from jaxinfer.errors import JaxinferError

COMMANDS = ("generate", "convert")
HELP = ("-h", "--h", "-help", "--help", "--helpshort", "--helpfull")


def main(argv: Sequence[str]) -> int:
    """Run the command that argv[1] names and return its exit code: 0, or 2 for bad input."""
    if len(argv) < 2 or argv[1] in HELP:
        print(__doc__.strip())
        return 0 if len(argv) >= 2 else 2
    name, rest = argv[1], list(argv[2:])
    if name not in COMMANDS:
        return _complain(f"no command {name!r}; there are: {', '.join(COMMANDS)}")
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    command = importlib.import_module(f"jaxinfer.cli.{name}")
    values = flags.FlagValues()
    command.define_flags(values)
    if any(arg in HELP for arg in rest):
        print(f"{command.__doc__.strip()}\n\nFlags:\n{values.get_help()}")
        return 0
    try:
        extra = values([name, *rest])[1:]
        if extra:
            raise flags.Error(f"{extra[0]!r} is no flag; flags look like --prompt='...'")
        command.run(values)
        return 0
    except (flags.Error, JaxinferError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout has gone: not a fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _complain(message: str) -> int:
    print("jaxinfer: " + " ".join(message.split()), file=sys.stderr)
    return 2


def run() -> None:
    """Entry point of the `jaxinfer` command."""
    sys.exit(main(sys.argv))
