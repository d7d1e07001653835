"""What the tokenizers are held against: strings, and digests of the ids a reference gives for them.

    python tests/tokenizer_golden.py SMOLLM2.gguf GEMMA3.gguf

writes tokenizer_golden.json anew. The reference is llama.cpp, an independent implementation, from
the wheel `xllamacpp`; it reads the two real files, and small files with made-up vocabularies that
are written here, one for every rule that cuts a text into words.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("tokenizer_golden.json")
PRE = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "deepseek-r1-qwen", "tekken")
KEY = "tokenizer.ggml."
# Letters of Unicode 16, which only one of the two sides has heard of.
NEW = [(0x1C89, 0x1C8A), (0x10D40, 0x10D8F), (0x13460, 0x143FA), (0x16100, 0x16139)]
NEW += [(0x16D40, 0x16D79), (0x11380, 0x113E2), (0x11BC0, 0x11BF9), (0x116D0, 0x116E3)]
NEW += [(0x1E5D0, 0x1E5FF), (0xA7CB, 0xA7CD), (0xA7DA, 0xA7DC), (0x1CCF0, 0x1CCF9)]


# ---- strings ------------------------------------------------------------------------------------
# They must be the same on every Python: no Unicode tables, and of `random` only `random()`.


def base_strings() -> dict[str, list[str]]:
    """Kind -> strings of that kind, about 15,000 in all."""
    rng = random.Random(20240607)
    parts = str.split

    def below(n: int) -> int:
        return int(rng.random() * n)

    def pick(items: Sequence[str]) -> str:
        return items[below(len(items))]

    def some(n: int, *parts: Callable[[], str] | Sequence[str]) -> str:
        """Up to n times one of each part, in order."""
        return "".join(
            part() if callable(part) else pick(part) for _ in range(1 + below(n)) for part in parts
        )

    def in_page(page: int, i: int) -> str:
        return chr(page if any(a <= page + i <= b for a, b in NEW) else page + i)

    pages = [
        *range(0, 0x3400, 0x80),  # the alphabets
        *range(0x3400, 0xD800, 0x400),  # Han, Yi, Hangul
        *range(0xE000, 0xF900, 0x800),  # private use
        *range(0xF900, 0x10000, 0x80),
        *range(0x10000, 0x13480, 0x100),  # ancient scripts
        *range(0x14400, 0x20000, 0x100),  # more of them, symbols, emoji
        *range(0x20000, 0x32400, 0x800),
        *(0xE0000, 0xE0100, 0xF0000, 0x10FF80),
    ]
    blocks = []
    for page in pages:
        for _ in range(4):
            chars = [in_page(page, below(0x80)) for _ in range(1 + below(12))]
            word = "".join(chars)
            blocks += [word, " ".join(chars), f"a{word} b1"]
        blocks.append("".join(in_page(page, i) for i in range(0, 0x80, 3)))

    faces = parts("😀 👍 👨 👩 👧 ❤ 🏳 🌈 ✋ 🇫 🇷 🇺 🇸 🏴 1 # ☠ 🚀")
    joins = ["", "\u200d", "\ufe0f", "\ufe0e", "\U0001f3fb", "\U0001f3ff", "\u20e3", " "]
    joins += ["\u200d♂\ufe0f", "\U000e0067\U000e007f"]
    emoji = [some(8, faces, joins) for _ in range(1200)]

    odd = [*range(0x20), *range(0x7F, 0xA1), 0xAD, *range(0x200B, 0x2010), 0x2028, 0x2029, 0x202E]
    odd += [0x2060, 0xFEFF, 0xFFFC, 0xFFFD, 0xFFFE, 0xFFFF, 0x10FFFF]
    controls = []
    for c in map(chr, odd):
        controls += [c, "a" + c, c + "a", f"a{c}b", f" {c} ", c * 3, f"\n{c}x{c}{c}"]

    spaces = [" ", "  ", "   ", "\t", "\n", "\r", "\r\n", "\v", "\f", "\xa0", "\u2003", "\u3000"]
    spaces += ["\u0085", "\u1680", "▁"]
    solid = ["x", "Word", "9", ".", "é", "中"]
    white = [some(16, lambda: pick(spaces) if below(3) else pick(solid)) for _ in range(1200)]
    for n in range(1, 70):
        white += [" " * n, "\n" * n, "\t" * n, f"a{' ' * n}b", "\r\n" * n, f"{' ' * n}x"]
        white += [f"x\n{' ' * n}y"]

    digits = []
    for _ in range(700):
        n = some(12, "0123456789")
        forms = [n, f"${n}.{n[:2]}", f"{n}%", f"x{n}", f" {n} {n}", f"{n[:1]},{n}"]
        forms += [f"-{n}e+{n[:2]}"]
        digits.append(pick([*forms, f"٣{n}߁", f"Ⅷ{n}½", f"{n}²³"]))

    words = parts(
        "the Of And MODEL tokenizer don won It I you we they isn could Straße naïve Ελλάδα Привет"
        " мир שלום مرحبا नमस्ते 你好 こんにちは 안녕 สวัสดี ខ្មែរ İstanbul ŒUVRE ǅ ﬁn ẞ"
    )
    tails = parts("'s 'S 't 'RE 've 'LL 'd 'm \u2019s \u2019re ' '' 'x - -- … . !? , ; :")
    tails += [""] * len(tails)
    gaps = [" ", " ", " ", "  ", "_", "/", " - "]
    starts = ["", "", " ", "  ", "\n", '"', "("]
    prose = [pick(starts) + some(9, words, tails, gaps) for _ in range(1800)]

    code = ["def f(x):", "\n    return x**2 # ok", "if (a != b) {", "}", "/* c */", "&&", "!=="]
    code += ["\t\tfor i in range(10):", 'print("hi\\n")', '<div class="a">', "</div>", "a->b::c"]
    code += ['{"k": [1, 2.5e-3]}', "SELECT * FROM t;", "http://x.y/z?q=1&r=%20", "\\frac{a}{b}"]
    code += ["$$", "```py\n", "\n```", "@x", "#!", "0xFF", "CamelCaseWord", "snake_case", "x=y;"]
    code += ["\r\n", "    ", "\t", "λ: Int", "»«", "<b>", "</s>", "<table>", "<|", "|>", "[INST]"]
    code += ["<s>", "<0x41>", "<unk>", "<pad>", "<|im_end|>", "<end_of_turn>", "<|endoftext|>"]
    programs = [some(8, code, ["\n", " ", ""]) for _ in range(1800)]

    pool = [*map(chr, range(0x20, 0x7F)), *"éüñßøåçžæŁğıİσςЖяжЁ中文字漢日本語ひらカタ한국어"]
    pool += "ไทยहिन्दीعربي"
    pool += ["e\u0301", "o\u0308\u0323", "ﬃ", "Å", "\u1100\u1161", "क्ष", *" " * 30, *"\n" * 4]
    mixed = [some(40, pool) for _ in range(1500)]
    edges = ["", "\0", "a" * 300, "ab" * 500, " " * 500, "é" * 200, "の" * 150, "0" * 100]
    edges += ["!" * 200, "\n \n" * 50]
    return {
        **{"blocks": blocks, "emoji": emoji, "controls": controls, "white": white},
        **{"digits": digits, "prose": prose, "programs": programs, "mixed": mixed, "edges": edges},
    }


def special_strings(tokens: Sequence[str]) -> list[str]:
    """Special tokens alone, cut short, and inside a text."""
    rng = random.Random(7)
    texts = ["", " ", "\n", "user\n", "Hello", "  x ", "a", "é😀", "1", "<", "|", ">", ".", "\t"]
    out = []
    for t in tokens:
        out += [t, "a" + t, t + "b", f" {t} ", t + t, f"x {t}\ny", t[:-1], t[1:], t.upper()]

    def pick(items: Sequence[str]) -> str:
        return items[int(rng.random() * len(items))]

    for _ in range(600):
        n = 1 + int(rng.random() * 5)
        out.append("".join(pick(texts) + pick(tokens) + pick(texts) for _ in range(n)))
    return out


def strings_for(metadata: Mapping[str, Any], *, made_up: bool = False) -> dict[str, list[str]]:
    """Kind -> strings for the tokenizer of this GGUF metadata.

    A third of them for a made-up vocabulary; for a real one, every entry of it as well.
    """
    tokens = metadata[KEY + "tokens"]
    types = map(int, metadata[KEY + "token_type"])
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (3, 4)]
    out = {kind: texts[:: 3 if made_up else 1] for kind, texts in base_strings().items()}
    # Gemma has 6,414 of them, of which 6,242 are <unused...>.
    out["special"] = special_strings([t for t in special if "unused" not in t or t.endswith("7>")])
    spm = metadata[KEY + "model"] == "llama"
    if not made_up:
        out["vocabulary"] = [t.replace("▁", " ") if spm else _bytes_to_text(t) for t in tokens]
    if spm:
        # llama.cpp takes "▁" in a text for something other than a space, SentencePiece does not.
        out = {kind: [s for s in texts if "▁" not in s] for kind, texts in out.items()}
    if metadata.get(KEY + "pre") == "tekken":
        # llama.cpp knows upper and lower case in ASCII only, for this rule.
        out = {kind: out[kind] for kind in ("controls", "digits", "programs", "special")}
    return out


def digests(
    strings: dict[str, list[str]], encode: Callable[[list[str]], list[list[int]]]
) -> dict[str, str]:
    """Kind -> a digest of the ids of its strings."""
    out = {}
    for kind, texts in strings.items():
        ids = "".join(f"{list(i)}\n" for i in encode(texts))
        out[kind] = f"{len(texts)}:{hashlib.sha256(ids.encode()).hexdigest()[:24]}"
    return out


# ---- made-up vocabularies -----------------------------------------------------------------------


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE."""
    plain = set(range(0x21, 0x7F)) | set(range(0xA1, 0x100)) - {0xAD}
    others = (b for b in range(256) if b not in plain)
    spelled = {b: chr(256 + n) for n, b in enumerate(others)}
    return [spelled.get(b, chr(b)) for b in range(256)]


def _bytes_to_text(token: str) -> str:
    byte_of = {c: b for b, c in enumerate(_byte_alphabet())}
    return bytes(byte_of.get(c, 0x3F) for c in token).decode(errors="replace")


def bpe_metadata(pre: str) -> dict[str, Any]:
    """Every pair of bytes is a token, so that every cut between words shows in the ids.

    The long tokens come from no merge: only a rule with ignore_merges finds them.
    """
    letters = _byte_alphabet()
    pairs = [(a, b) for a in letters for b in letters]
    long = ["the", "Word", "ĠWord", "Hello", "Ġyou", "tokenizer", "123", "CamelCaseWord", "...."]
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_end|>x", "<think>", "  <tag>"]
    tokens = [*letters, *(a + b for a, b in pairs), *long, *special]
    types = [1] * (len(tokens) - len(special)) + [3] * (len(special) - 2) + [4, 4]
    return {
        "general.architecture": "llama",
        KEY + "model": "gpt2",
        KEY + "pre": pre,
        KEY + "tokens": tokens,
        KEY + "token_type": types,
        KEY + "merges": [f"{a} {b}" for a, b in pairs],
        KEY + "bos_token_id": tokens.index("<s>"),
        KEY + "eos_token_id": tokens.index("</s>"),
    }


def spm_metadata(name: str = "llama", space_prefix: bool = True) -> dict[str, Any]:
    """A SentencePiece vocabulary as Llama's: bytes, and pieces of up to four characters."""
    chars = ["▁", *"etaoinshrdlucmfgypwbvkTHAS.,!?'-<|>/0123456789éя中の"]
    rng = random.Random(11)
    pieces = list(chars)
    seen = set(pieces)
    while len(pieces) < 3000:
        piece = "".join(pieces[int(rng.random() * min(len(pieces), 900))] for _ in range(2))
        if len(piece) <= 4 and piece not in seen:
            seen.add(piece)
            pieces.append(piece)
    special = ["<unk>", "<s>", "</s>"]
    added = ["<|user|>", "<|end|>", "<|assistant|>", "<|endoftext|>", "[INST]", "<tag>"]
    byte = [f"<0x{b:02X}>" for b in range(256)]
    tokens = [*special, *byte, *pieces, *added]
    return {
        "general.architecture": "llama",
        "general.name": name,
        KEY + "model": "llama",
        KEY + "tokens": tokens,
        KEY + "scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1e3] * len(added),
        KEY + "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [3] * 5 + [4],
        KEY + "bos_token_id": 1,
        KEY + "eos_token_id": 2,
        KEY + "unknown_token_id": 0,
        KEY + "add_space_prefix": space_prefix,
    }


def made_up() -> dict[str, dict[str, Any]]:
    """Name -> metadata of every made-up vocabulary."""
    out = {f"bpe {pre}": bpe_metadata(pre) for pre in PRE}
    out["spm"] = spm_metadata()
    out["spm without prefix"] = spm_metadata(space_prefix=False)
    out["spm phi3"] = spm_metadata("phi-3")
    return out


# ---- the reference ------------------------------------------------------------------------------


@contextlib.contextmanager
def llama_cpp(path: str) -> Iterator[Callable[[list[str]], list[list[int]]]]:
    """An encoder: llama.cpp's, over its own HTTP server on the loopback interface."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    server = xllamacpp.Server(params)
    address = urllib.parse.urlparse(server.listening_address)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)

    def encode(texts: list[str]) -> list[list[int]]:
        out = []
        for text in texts:
            body = json.dumps({"content": text, "add_special": False, "parse_special": True})
            connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
            out.append(json.loads(connection.getresponse().read())["tokens"])
        return out

    try:
        yield encode
    finally:
        connection.close()
        del server


def write_gguf(path: str, metadata: dict[str, Any]) -> None:
    """A GGUF file with this tokenizer and a model of one layer that is all zeros."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(metadata[KEY + "tokens"]))
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    shapes = {"token_embd": (len(metadata[KEY + "tokens"]), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.ffn_{n}": (32, 32) for n in ("gate", "down", "up")}
    shapes |= {f"blk.0.{n}": (32,) for n in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(name + ".weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(smollm2: str, gemma3: str) -> None:
    from jaxinfer.checkpoint.gguf import GGUFFile

    golden: dict[str, Any] = {}
    for name, path in ("smollm2", smollm2), ("gemma3", gemma3):
        strings = strings_for(dict(GGUFFile(path).metadata))
        with llama_cpp(path) as encode:
            golden[name] = digests(strings, encode)
            few = [s for kind in ("emoji", "prose", "programs") for s in strings[kind][::180]]
            golden[name + " sample"] = list(zip(few, encode(few), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        for name, metadata in made_up().items():
            path = f"{folder}/{name}.gguf"
            write_gguf(path, metadata)
            with llama_cpp(path) as encode:
                golden[name] = digests(strings_for(metadata, made_up=True), encode)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in golden.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
