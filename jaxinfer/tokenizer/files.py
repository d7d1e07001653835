"""Tokenizer files: a folder as the model hub has it, or a single file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.json_file import read_json
from jaxinfer.checkpoint.source import corrupt, label, one_line, regular_file_size, unreadable
from jaxinfer.errors import InvalidArgument, ModelNotFound
from jaxinfer.tokenizer.base import MAX_VOCAB, Added, Settings, Tokenizer
from jaxinfer.tokenizer.bpe import load_bpe
from jaxinfer.tokenizer.spm import spm_tokenizer

MAX_BYTES = 256 << 20  # of a tokenizer file; the largest of a supported family has 34 MB
CONFIG = "tokenizer_config.json"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.

    Args:
      path: a folder with tokenizer.json or tokenizer.model, where tokenizer_config.json,
        special_tokens_map.json, added_tokens.json and chat_template.jinja (or .json) are read too
        when they are there; or one such file alone.

    generation_config.json is not read here: whoever loads the model needs it for more, and joins
    its end tokens to `eos_ids`.

    Raises ModelNotFound where there is none, CorruptFile or UnsupportedModel, each with one line
    that names the file and the field.
    """
    path = Path(path)
    settings = Settings()
    if path.is_dir():
        settings = _read_settings(path)
        names = [n for n in ("tokenizer.json", "tokenizer.model") if (path / n).exists()]
        if not names:
            raise ModelNotFound(f"{label(path)}: has no tokenizer.json and no tokenizer.model")
        path = path / names[0]
    load = load_bpe if path.suffix == ".json" else spm_tokenizer
    return load(_read(path, MAX_BYTES), settings, where=label(path))


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write files from which `load_tokenizer` makes the same tokenizer, whatever it came from."""
    if not isinstance(tokenizer, Tokenizer):
        raise InvalidArgument(f"a {type(tokenizer).__name__} has no files to save")
    name, content = tokenizer.model_file()
    settings = tokenizer.settings
    config = {
        "bos_token": settings.bos_token,
        "eos_token": settings.eos_token,
        "eos_token_id": list(settings.eos_ids),
        "add_bos_token": settings.adds_bos,
        "chat_template": tokenizer.chat_template,
        "added_tokens_decoder": {
            str(i): {"content": token.text, "special": token.special, "rstrip": token.rstrip}
            for i, token in settings.added.items()
        },
    }
    (Path(folder) / name).write_bytes(content)
    (Path(folder) / CONFIG).write_text(json.dumps(config, indent=1))


def _read(path: Path, limit: int) -> bytes:
    """The bytes of a file that is known to be one, and not too large."""
    size = regular_file_size(path)
    if not 0 < size <= limit:
        raise corrupt(path, f"has {size} bytes; expected 1 to {limit}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None


def _optional(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file, an empty one where there is no file."""
    return read_json(path) if path.exists() else {}


def _read_settings(folder: Path) -> Settings:
    """What the files beside the vocabulary say."""
    path = folder / CONFIG
    config = _optional(path)
    adds_bos = config.get("add_bos_token")
    if adds_bos not in (None, True, False):
        raise corrupt(path, f"add_bos_token is {one_line(adds_bos)}; expected true or false")
    eos_ids = config.get("eos_token_id")
    eos_ids = eos_ids if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids]
    for i in eos_ids:
        _check_id(path, "eos_token_id", i)
    return Settings(
        bos_token=_named_token(folder, "bos_token", config),
        eos_token=_named_token(folder, "eos_token", config),
        eos_ids=tuple(eos_ids),
        adds_bos=adds_bos,
        chat_template=_chat_template(folder, config),
        added=_added(folder, config),
    )


def _named_token(folder: Path, field: str, config: Mapping[str, Any]) -> str | None:
    """A token: a text, or an object whose "content" is one."""
    path = folder / (CONFIG if field in config else "special_tokens_map.json")
    value = config[field] if field in config else _optional(path).get(field)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise corrupt(path, f"{field} is {one_line(value)}; expected a text")
    return value


def _check_id(path: Path, field: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < MAX_VOCAB:
        raise corrupt(path, f"{field} holds {one_line(value)}; expected a token id")


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template: a file of its own wins over the field of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return _read(path, MAX_BYTES).decode()
        except UnicodeDecodeError:
            raise corrupt(path, "is not UTF-8 text") from None
    path = folder / "chat_template.json"
    if not path.exists():
        path = folder / CONFIG
    value = (config if path.name == CONFIG else _optional(path)).get("chat_template")
    if isinstance(value, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise corrupt(path, f"chat_template is {one_line(value)}; expected a text")
    return value


def _added(folder: Path, config: Mapping[str, Any]) -> Mapping[int, Added]:
    """Tokens beside a tokenizer.model, from tokenizer_config.json or from added_tokens.json."""
    path = folder / CONFIG
    table = config.get("added_tokens_decoder", {})
    if not isinstance(table, dict):
        raise corrupt(path, "added_tokens_decoder is not an object")
    added: dict[int, Added] = {}
    for key, token in table.items():
        text = token.get("content") if isinstance(token, dict) else None
        if not key.isdecimal() or len(key) > 9 or not isinstance(text, str) or not text:
            raise corrupt(path, f"added_tokens_decoder: {one_line(key)} is no id with a content")
        special, rstrip = token.get("special") is True, token.get("rstrip") is True
        added[int(key)] = Added(text, special=special, rstrip=rstrip)
    path = folder / "added_tokens.json"  # as older versions of transformers wrote them
    for text, i in {} if table else _optional(path).items():
        _check_id(path, one_line(text), i)
        added[i] = Added(text, special=False)
    return added
