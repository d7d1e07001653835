"""A model over many processes says what it says in one, in every process; and once on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_distributed import Party, free_port

import jaxinfer
from jaxinfer.testing import tiny_config, tiny_llm

FIELDS = {"num_heads": 4, "num_kv_heads": 2, "width": 32, "seed": 3}
PROMPTS = ["abcabcabcabc", "hello", "z"]
GENERATE = """
import json
import jaxinfer
from jaxinfer.testing import tiny_config, tiny_llm

with distributed.start(WHERE, COUNT, ME, heartbeat_seconds=HEARTBEAT):
    mesh = jaxinfer.make_mesh(data=DATA, model=COUNT * DEVICES // DATA)
    llm = tiny_llm(**FIELDS, layers=tiny_config().layers[:1], mesh=mesh)

    def tokens(**options):
        options = {"max_tokens": 12, "ignore_eos": True, "drafter": DRAFTER} | options
        return [o.token_ids for o in llm.generate(PROMPTS, **options)]

    say(json.dumps({
        "greedy": tokens(),  # "ngram" drafts as many as pay, by the times of process 0
        "seeded": tokens(temperature=0.9, seed=7),
        "unseeded": tokens(temperature=0.9),
        "score": [float(x) for x in llm.score(PROMPTS[0])],
    }))
"""


@pytest.fixture
def party(tmp_path: Path) -> Iterator[Party]:
    party = Party(tmp_path)
    try:
        yield party
    finally:
        party.end()


@pytest.mark.parametrize(
    ("count", "devices", "data", "drafter"), [(2, 2, 2, "ngram"), (4, 1, 1, "none")]
)
def test_every_process_says_what_one_says(party, count, devices, data, drafter):
    words = {"FIELDS": FIELDS, "PROMPTS": PROMPTS, "DATA": data, "DEVICES": devices}
    party.start(GENERATE, count, DRAFTER=drafter, **words)
    assert party.codes(300) == [0] * count, party.err(0)
    said = [json.loads(party.out(rank)[0]) for rank in range(count)]
    assert all(each == said[0] for each in said)
    one = tiny_llm(**FIELDS, layers=tiny_config().layers[:1])
    options = {"max_tokens": 12, "ignore_eos": True}
    assert said[0]["greedy"] == [o.token_ids for o in one.generate(PROMPTS, **options)]
    seeded = [o.token_ids for o in one.generate(PROMPTS, temperature=0.9, seed=7, **options)]
    assert said[0]["seeded"] == seeded
    assert said[0]["score"] == pytest.approx(one.score(PROMPTS[0]).tolist(), abs=1e-4)


def command(*flags: str, **options) -> subprocess.Popen:
    code = "import sys; from jaxinfer.cli.main import main; sys.exit(main(sys.argv))"
    clean = {name: text for name, text in os.environ.items() if "proxy" not in name.lower()}
    return subprocess.Popen(
        [sys.executable, "-c", code, "generate", *flags],
        env={**clean, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_the_command_prints_once_and_the_real_model_says_the_same():
    text, where = "The capital of France is", f"--coordinator=127.0.0.1:{free_port()}"
    ask = [f"--prompt={text}", "--nochat", "--max_tokens=8", "--dtype=float32", "--drafter=ngram"]
    both = [
        command(*ask, "--distributed", where, "--num_processes=2", f"--process_id={rank}")
        for rank in range(2)
    ]
    try:
        out = [process.communicate(timeout=240) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], out[0][1][-2000:]
    one = jaxinfer.load(dtype="float32").generate(text, max_tokens=8)
    assert out[0][0] == one.text + "\n"
    assert out[1][0] == ""


def test_one_bad_process_ends_all_with_its_line():
    where = f"--coordinator=127.0.0.1:{free_port()}"
    ask = ["--prompt=x", "--distributed", where, "--num_processes=2"]
    both = [
        command(*ask, "--process_id=0", "--model=smollm2-135m-instruct"),
        command(*ask, "--process_id=1", "--model=smollm3-nothing"),
    ]
    try:
        out = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [2, 2]
    assert "jaxinfer: 'smollm3-nothing': no alias" in out[1][1]
    assert "process 1 of 2 has failed: 'smollm3-nothing'" in out[0][1]
    assert "Traceback" not in out[0][1] + out[1][1]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--distributed"], "JAX knows of no cluster here"),
        (["--distributed", "--coordinator=x", "--num_processes=2", "--process_id=0"], "host:port"),
        (["--mesh=4"], "DATAxMODEL"),
        (["--mesh=1x64"], "needs 64 devices"),
    ],
)
def test_flags_that_make_no_sense(flags, why):
    process = command("--prompt=x", *flags)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, len(err.strip().splitlines())) == (2, 1)
    assert why in err
