"""What is measured: short prompts in four kinds, which differ in how much of the answer stands in
the prompt; and prose of any length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jaxinfer.errors import InvalidArgument
from jaxinfer.generate import LLM

_HARBOUR = (
    "The old harbour of Lindvik was built in 1712 by order of the governor, Anna Brandt. It had"
    " room for forty ships and a stone tower with a lamp that burned whale oil. In 1840 a storm"
    " broke the northern wall, and the town had no money to repair it. Trade moved to Karsund,"
    " twelve miles to the south. In 1903 the fishermen of Lindvik rebuilt the wall themselves,"
    " stone by stone, and the harbour opened again in May 1907."
)
_MINUTES = (
    "Maria Lopez reported that the printer on the second floor is broken and that a new one costs"
    " 340 euros. Tom Becker asked for two more desks. Maria Lopez said that the desks arrive on"
    " 14 June. Ines Falk will send the invoice to the office in Lyon by Friday. Tom Becker will"
    " order coffee. The next meeting is on 21 June at ten o'clock in room 4."
)
_CONFIG = """def load_settings(path):
    settings = {}
    with open(path) as file:
        for line in file:
            key, value = line.split("=")
            settings[key.strip()] = value.strip()
    return settings"""

PROMPTS: dict[str, tuple[str, ...]] = {
    "chat": (
        "What should I pack for a weekend in the mountains in October?",
        "Explain to a ten-year-old why the sky is blue.",
        "Write a short letter to my landlord: the heating has been off for three days.",
    ),
    "code": (
        f"Add a docstring and type hints to this function:\n\n{_CONFIG}",
        "Write a Python function that returns the n-th Fibonacci number, and a test for it.",
        f"Rename the variable `settings` to `options` in this function:\n\n{_CONFIG}",
    ),
    "extract": (
        f"Summarize this text in a few sentences:\n\n{_HARBOUR}",
        f"List every sentence of this text that contains a year, word for word:\n\n{_HARBOUR}",
        f"Write down what each person said or will do, from these minutes:\n\n{_MINUTES}",
    ),
    "maths": (
        "A train leaves at 9:40 and arrives at 13:25. How long is the journey? Think step by step.",
        "Solve 3x + 7 = 25 for x and show each step.",
        "A shop sells pens at 3 for 2 euros. What do 18 pens cost? Show how you found it.",
    ),
}


def read_prompts(path: str) -> dict[str, tuple[str, ...]]:
    """Prompts by kind from a file: JSON lines {"kind": .., "prompt": ..}, or a prompt a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"--prompts={path}: {error}") from error
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        kind, prompt = "file", line
        if path.endswith(".jsonl"):
            try:
                record = json.loads(line)
                kind, prompt = record["kind"], record["prompt"]
            except (ValueError, KeyError, TypeError, RecursionError):
                kind = prompt = ""
            named = isinstance(kind, str) and kind not in ("", "all")  # "all" is their sum
            if not named or not isinstance(prompt, str) or not prompt:
                raise InvalidArgument(
                    f'--prompts={path}: line {number} is not {{"kind": "..", "prompt": ".."}},'
                    ' where "all" is no kind'
                )
        found.setdefault(kind, []).append(prompt)
    if not found:
        raise InvalidArgument(f"--prompts={path}: holds no prompt")
    return {kind: tuple(prompts) for kind, prompts in found.items()}


def contexts(llm: LLM, texts: Sequence[str], room: int) -> dict[str, list[list[int]]]:
    """Token ids of Python's own documentation, cut to each of these numbers of tokens, by number.

    Raises InvalidArgument where one is longer than the text, or leaves no room for `room` more.
    """
    wanted = max(int(text[:9]) for text in texts)
    ids = llm.tokenizer.encode(own_text()[: 10 * wanted])
    most = min(llm.max_len - room, len(ids)) if len(ids) < wanted else llm.max_len - room
    for text in texts:
        if not 1 <= int(text[:9]) <= most:
            raise InvalidArgument(f"--contexts={text}: 1 to {most} tokens")
    return {text: [ids[: int(text)]] for text in texts}


def own_text(part: int = 0) -> str:
    """Every other topic of the documentation that comes with Python, English prose on every
    machine: part 0 is for measuring, part 1 for calibrating."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics)[part::2])


def chat_or_plain(llm: LLM, text: str) -> list[int]:
    """Token ids of a prompt: a user's turn where the model chats, else the text alone."""
    if llm.chats:
        return llm.chat_ids([{"role": "user", "content": text}])
    return llm.tokenizer.encode(text)
