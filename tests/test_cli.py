"""The command: text on stdout, one line and exit code 2 for what cannot be."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxinfer.cli.main import main


def run(capsys, *arguments):
    code = main(["jaxinfer", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def model(smollm2_path):
    return f"--model={smollm2_path}"


def test_text_alone_is_on_stdout(capsys, model):
    code, out, _ = run(capsys, "generate", model, "--prompt=What is the capital of France?")
    assert code == 0
    assert out == "The capital of France is Paris.\n"
    code, streamed, _ = run(
        capsys, "generate", model, "--prompt=What is the capital of France?", "--stream"
    )
    assert (code, streamed) == (0, out)


def test_json_and_stats(capsys, model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is the capital of France?\n\nSay hi.\n", encoding="utf-8")
    code, out, err = run(
        capsys, "generate", model, f"--prompt_file={prompts}", "--prompt=Hello", "--json",
        "--max_tokens=8", "--stats", "--logprobs=2",
    )  # fmt: skip
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["stats"]["prompt_tokens"] > 0 for r in records] == [True] * 3
    assert "Paris" in records[1]["text"]
    for r in records:
        assert set(r) == {"text", "token_ids", "finish_reason", "stats", "logprobs"}
        assert len(r["logprobs"]) == len(r["token_ids"]) == r["stats"]["new_tokens"]
    assert "tokens_per_second" in err


def test_without_chat_the_prompt_is_continued(capsys, model):
    _, out, _ = run(
        capsys, "generate", model, "--nochat", "--prompt=The capital of France is", "--max_tokens=1"
    )
    assert out == " Paris\n"


def test_seeds_and_samples(capsys, model):
    flags = (
        "generate", model, "--prompt=Tell me a story.", "--temperature=1", "--max_tokens=8", "--n=2"
    )  # fmt: skip
    _, first, _ = run(capsys, *flags, "--seed=5")
    assert first == run(capsys, *flags, "--seed=5")[1]
    assert first != run(capsys, *flags, "--seed=6")[1]


def test_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "generate" in out
    assert "convert" in out
    for command in ("generate", "convert", "bench", "audit", "quality"):
        code, out, _ = run(capsys, command, "--helpshort")
        assert code == 0
        assert "--model" in out
        assert all(len(line) <= 100 for line in out.splitlines())


BAD = {
    "no command": (),
    "unknown command": ("gennerate",),
    "unknown flag": ("generate", "--prompt=a", "--promt=b"),
    "no flag": ("generate", "--prompt=a", "b"),
    "no prompt": ("generate",),
    "empty prompt": ("generate", "--prompt="),
    "blank prompt": ("generate", "--prompt=a", "--prompt=  "),
    "no prompt file": ("generate", "--prompt_file=/none/such"),
    "binary prompt file": ("generate", "--prompt_file=/bin/sh"),
    "unknown model": ("generate", "--prompt=a", "--model=smollm2-135m-instrukt"),
    "missing file": ("generate", "--prompt=a", "--model=/none/such.gguf"),
    "pickle": ("generate", "--prompt=a", "--model=pytorch_model.bin"),
    "temperature": ("generate", "--prompt=a", "--temperature=-1"),
    "temperature text": ("generate", "--prompt=a", "--temperature=warm"),
    "max_tokens": ("generate", "--prompt=a", "--max_tokens=0"),
    "max_tokens absurd": ("generate", "--prompt=a", "--max_tokens=99999999999"),
    "top_p": ("generate", "--prompt=a", "--top_p=2"),
    "seed": ("generate", "--prompt=a", "--seed=-1"),
    "n": ("generate", "--prompt=a", "--n=100000"),
    "dtype": ("generate", "--prompt=a", "--dtype=int3"),
    "device": ("generate", "--prompt=a", "--device=abacus"),
    "stream and stats": ("generate", "--prompt=a", "--stream", "--stats"),
    "logprobs in text": ("generate", "--prompt=a", "--logprobs=1"),
    "two streams": ("generate", "--prompt=a", "--prompt=b", "--stream"),
    "stream and json": ("generate", "--prompt=a", "--json", "--stream"),
    "no output": ("convert",),
    "output there": ("convert", "--output=/"),
    "peer": ("bench", "--compare=abacus"),
    "runs": ("bench", "--runs=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(capsys, case):
    code, out, err = run(capsys, *BAD[case])
    assert code == 2
    if case == "no command":
        assert "Commands:" in out
    else:
        assert out == ""
        assert err.startswith("jaxinfer: ")
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_a_device_that_is_not_there(device):
    flags = ["", "generate", "--prompt=a", f"--device={device}"]
    code = f"from jaxinfer.cli.main import main; print(main({flags}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout == "2\n"
    last = out.stderr.splitlines()[-1]  # libtpu, where it is installed, writes lines of its own
    assert last.startswith(f"jaxinfer: --device={device} is not there")


def test_near_matches_are_named(capsys):
    _, _, err = run(capsys, "generate", "--prompt=a", "--model=smollm2-135m-instrukt")
    assert "smollm2-135m-instruct" in err


def test_limits_of_the_model(capsys, model):
    for flags, word in (
        (("--prompt=" + "word " * 9000,), "8192"),
        (("--prompt=a", "--stop_token_ids=99999999"), "99999999"),
        (("--prompt=a", "--max_len=1"), "max_len"),
        (("--prompt=a", "--max_len=100000"), "8192"),
    ):
        code, out, err = run(capsys, "generate", model, *flags)
        assert (code, out) == (2, "")
        assert word in err
        assert len([x for x in err.splitlines() if x.startswith("jaxinfer: ")]) == 1


def test_a_base_model_does_not_chat(capsys, gemma3_path):
    code, _, err = run(capsys, "generate", f"--model={gemma3_path}", "--chat", "--prompt=a")
    assert code == 2
    assert "chat template" in err


def test_wrong_architecture(capsys, tmp_path):
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": np.zeros((8, 8), np.float32)}, tmp_path / "model.safetensors")
    code, _, err = run(capsys, "generate", "--prompt=a", f"--model={tmp_path}")
    assert code == 2
    assert "Mamba" in err


def test_speculation_flags(capsys, model):
    bad = [
        (["--drafter=nothing-like-this"], "nothing-like-this"),
        (["--drafter=ngram", "--num_draft=many"], "--num_draft=many"),
        (["--drafter=ngram", "--num_draft=1000"], "num_draft=1000"),
        (["--drafter=ngram", "--verifier=lenient"], "lenient"),
        (["--drafter=ngram", "--verifier=block", "--exact"], "exact=True"),
    ]
    for flags, words in bad:
        assert main(["jaxinfer", "generate", model, "--prompt=x", *flags]) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert err.startswith("jaxinfer: ")
        assert words in err


def test_a_model_larger_than_the_memory(capsys, tmp_path):
    """Four terabytes of weights in a sparse file: refused by its header, in bytes."""
    wide, hidden = 2**20, 2**18
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": wide,
        "intermediate_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 8192,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }
    shapes = {
        "model.embed_tokens": (64, wide),
        "model.norm": (wide,),
        "model.layers.0.input_layernorm": (wide,),
        "model.layers.0.post_attention_layernorm": (wide,),
        "model.layers.0.self_attn.q_proj": (wide, wide),
        "model.layers.0.self_attn.k_proj": (128, wide),
        "model.layers.0.self_attn.v_proj": (128, wide),
        "model.layers.0.self_attn.o_proj": (wide, wide),
        "model.layers.0.mlp.gate_proj": (hidden, wide),
        "model.layers.0.mlp.up_proj": (hidden, wide),
        "model.layers.0.mlp.down_proj": (wide, hidden),
    }
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        header[f"{name}.weight"] = entry
        at += size
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    backend = Backend(models.BPE({"a": 0}, []))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    code, out, err = run(capsys, "generate", "--prompt=a", f"--model={tmp_path}")
    assert (code, out) == (2, "")
    assert re.search(r"needs 1[\d,]{16,} bytes and [\d,]+ are available", err)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "flags", [["--help"], ["generate", "--help"], ["generate", "--prompt=Hi", "--max_tokens=4"]]
)
def test_the_installed_command_and_a_closed_pipe(flags):
    """`jaxinfer generate | head -0`: the reader goes away, and nobody gets a traceback."""
    command = [sys.executable, "-c", "from jaxinfer.cli.main import run; run()"]
    process = subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    said = process.stderr.read()
    assert "Traceback" not in said
    assert "BrokenPipe" not in said
    assert process.wait() == 0
