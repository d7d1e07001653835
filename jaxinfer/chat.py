"""Messages -> the prompt a chat model was trained on, by the template its files carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer import template as templates
from jaxinfer.checkpoint.source import one_line
from jaxinfer.errors import InvalidArgument
from jaxinfer.tokenizer import Tokenizer

MAX_DEPTH = 64  # of lists and objects in a message or a tool


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **extra: Any,
) -> str:
    """The text of a conversation.

    Args:
      template: jinja source, as `Tokenizer.chat_template` holds it. It is a stranger's program and
        runs within limits of time and memory; see `jaxinfer.template`.
      messages: each with "role" and "content", a text or a list of {"type": "text", "text": ...}.
      bos_token: text that the template may put in front. Encode the result with add_special=False,
        as `encode_chat` does, or the model sees BOS twice.
      eos_token: text that the template may put behind a message.
      add_generation_prompt: end with what begins the model's answer.
      tools: JSON descriptions of functions the model may call.
      **extra: further variables of the template, such as enable_thinking=False; plain JSON values.

    Raises InvalidArgument for messages that are malformed or that the template refuses, with the
    template's own message; CorruptFile for a template that is broken or goes beyond a limit.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InvalidArgument("messages: expected a list of at least one message")
    variables = {
        **{name: _plain(value, name) for name, value in extra.items()},
        "messages": [_message(message, f"messages[{i}]") for i, message in enumerate(messages)],
        "tools": _plain(tools, "tools"),
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
    }
    return templates.render(template, variables)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **extra: Any,
) -> list[int]:
    """Ids of a conversation, with BOS exactly where and if the template writes it.

    Raises what `render_chat` raises, and InvalidArgument where the tokenizer has no template.
    """
    if tokenizer.chat_template is None:
        raise InvalidArgument("this model has no chat template; give it a prompt instead")
    text = render_chat(
        tokenizer.chat_template,
        messages,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        **extra,
    )
    return tokenizer.encode(text, add_special=False)


def _message(message: Any, where: str) -> dict[str, Any]:
    """A plain copy whose content is one text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidArgument(f"{where}: expected an object with a role and a content")
    out = _plain(message, where)
    content = out.get("content")
    if isinstance(content, list):
        # The parts, joined as they are: few templates know of parts, and all know of texts.
        out["content"] = "".join(
            _part(part, f"{where}.content[{i}]") for i, part in enumerate(content)
        )
    elif content is None:  # a message that calls tools may have none
        if message["role"] != "assistant":
            raise InvalidArgument(f"{where}: has no content")
    elif not isinstance(content, str):
        raise InvalidArgument(f"{where}.content: expected a text or a list of parts")
    return out


def _part(part: Any, where: str) -> str:
    """The text of one part of a content."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise InvalidArgument(f"{where}: {one_line(kind)} is not supported; expected a text part")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in lists, dicts and scalars: a template must not get at objects with methods."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth == MAX_DEPTH:
        raise InvalidArgument(f"{where}: holds lists in lists, more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item, where, depth + 1) for item in value]
    raise InvalidArgument(f"{where}: holds a {type(value).__name__}; expected plain JSON values")
