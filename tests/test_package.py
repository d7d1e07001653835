"""The package itself: light to import, floors that hold, nothing on them that should not be."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

# A file imports only from floors below its own, or from its own room. See the README's map.
FLOORS = [
    ("pallas_kernels", "jaxinfer.errors", "jaxinfer.config", "jaxinfer.xla"),
    ("jaxinfer.sharding", "jaxinfer.memory", "jaxinfer.distributed", "jaxinfer.hardware"),
    ("jaxinfer.attend",),
    ("jaxinfer.cache", "jaxinfer.rotary", "jaxinfer.sampling", "jaxinfer.quantize"),
    ("jaxinfer.model", "jaxinfer.text", "jaxinfer.template_budget", "jaxinfer.outputs"),
    ("jaxinfer.recipes",),
    ("jaxinfer.requests", "jaxinfer.steps", "jaxinfer.checkpoint.source"),
    ("jaxinfer.checkpoint.json_file", "jaxinfer.checkpoint.fields", "jaxinfer.template"),
    ("jaxinfer.tokenizer",),
    ("jaxinfer.chat", "jaxinfer.prompts", "jaxinfer.checkpoint", "jaxinfer.speculative"),
    ("jaxinfer.layerwise",),
    ("jaxinfer.batch", "jaxinfer.gptq", "jaxinfer.prune", "jaxinfer.smooth"),
    ("jaxinfer.scoring", "jaxinfer.calibrate", "jaxinfer.drafters"),
    ("jaxinfer.generate",),
    ("jaxinfer.loading", "jaxinfer.testing", "jaxinfer.bench", "jaxinfer.planner"),
    ("jaxinfer.cli",),
]


def sources():
    for package in ("jaxinfer", "pallas_kernels"):
        spec = importlib.util.find_spec(package)
        root = Path(spec.origin).parent
        for file in sorted(root.rglob("*.py")):
            parts = [package, *file.relative_to(root).with_suffix("").parts]
            yield ".".join(p for p in parts if p != "__init__"), ast.parse(file.read_text("utf-8"))


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(module):
    """Number of the floor with the longest name that fits, and that name."""
    rooms = [(len(room), i, room) for i, f in enumerate(FLOORS) for room in f]
    fits = [x for x in rooms if module == x[2] or module.startswith(f"{x[2]}.")]
    return max(fits)[1:] if fits else None


def test_no_file_imports_from_a_floor_above_its_own():
    wrong = []
    for module, tree in sources():
        if module == "jaxinfer":  # the door: it names every room and enters none
            continue
        own = floor(module)
        assert own, f"{module} has no floor"
        for name in imports(tree):
            other = floor(name)
            if other and other[1] != own[1] and other[0] >= own[0]:
                wrong.append(f"{module} (floor {own[0]}) imports {name} (floor {other[0]})")
    assert wrong == []


def test_kernels_know_nothing_of_jaxinfer():
    for module, tree in sources():
        if module.startswith("pallas_kernels"):
            assert not [n for n in imports(tree) if n.split(".")[0] == "jaxinfer"], module


def test_no_pickle_and_flags_and_environment_in_their_rooms_only():
    for module, tree in sources():
        names = {name.split(".")[0] for name in imports(tree)}
        assert not names & {"pickle", "dill", "cloudpickle", "torch"} or module in (
            "jaxinfer.bench.peers",  # the peer, imported when it is asked for
        ), module
        if "absl" in names:
            assert module.startswith("jaxinfer.cli"), module
        reads = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
        ]
        assert not reads or module in (
            "jaxinfer.checkpoint.hub",
            "jaxinfer.checkpoint.wheels",
            "jaxinfer.planner.target",  # tells libtpu where it is
            "pallas_kernels.check",  # a command, which tells libtpu where it is
        ), module


def test_import_is_light():
    """Under 1.5 s beyond `import jax`, and no other framework with it."""
    code = """
import sys, time
import jax
begin = time.perf_counter()
import jaxinfer
jaxinfer.load, jaxinfer.LLM, jaxinfer.SamplingParams, jaxinfer.make_mesh
print(time.perf_counter() - begin)
print([m for m in ("torch", "transformers", "tensorflow", "orbax") if m in sys.modules])
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert float(out[0]) < 1.5
    assert out[1] == "[]"


def test_public_names_are_there():
    import jaxinfer

    for name in jaxinfer.__all__:
        assert getattr(jaxinfer, name) is not None
        assert name in dir(jaxinfer)
    with pytest.raises(AttributeError, match="nothing"):
        _ = jaxinfer.nothing
