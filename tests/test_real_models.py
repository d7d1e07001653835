"""SmolLM2 and Gemma 3, from their GGUF files: against transformers, and what needs no reference.

The reference reads the same files with transformers' own dequantization and reordering, into a
config written down here as the models' authors published it. Texts are Python's documentation.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer.checkpoint.load import Checkpoint
from jaxinfer.checkpoint.orbax import save_orbax
from jaxinfer.generate import LLM

WHY = "parity with the reference needs torch and transformers"
WINDOW = 512  # Gemma's
LONG = 2048
LENGTHS = (4, WINDOW - 1, WINDOW, WINDOW + 1, LONG)  # of prompts, in tokens
NEW = 128  # greedy tokens
MAX_KL = 1e-5
MAX_NOISE = 1e-3  # of a logit or a log-probability, in nats
SLICE = 128  # positions whose logits are held at once: Gemma's take 1 MB each
MAX_PEAK = 1.3  # times the weights, while loading

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2": (
        "Llama",
        {
            **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536},
            **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
            **{"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
            **{"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **{"vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048},
            **{"num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1},
            **{"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": WINDOW},
            **{"max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
        },
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(name: str, request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"{name}_path")


@pytest.fixture(scope="module")
def llm(path: str) -> LLM:
    return jaxinfer.load(path, dtype="float32")


@pytest.fixture(scope="module")
def text(llm: LLM) -> list[int]:
    """Token ids of real text, longer than any prompt here."""
    ids = llm.tokenizer.encode("\n\n".join(topics[key] for key in sorted(topics))[:20_000])
    assert len(ids) > LONG
    return ids


class Reference:
    """The model in transformers: float32, no cache, plain attention."""

    def __init__(self, name: str, path: str) -> None:
        self.torch = pytest.importorskip("torch", reason=WHY)
        transformers = pytest.importorskip("transformers", reason=WHY)
        # What from_pretrained(gguf_file=...) calls, once; that one reads the file three times, at
        # up to ten seconds each, and wants the package accelerate.
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        kind, fields = CONFIGS[name]
        config = getattr(transformers, f"{kind}Config")(**fields)
        with self.torch.device("meta"):  # for its parameters' names
            empty = transformers.AutoModelForCausalLM.from_config(config)
        tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=empty)["tensors"]
        self.model = type(empty).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=self.torch.float32,
            attn_implementation="eager",
        )
        self.model.eval()

    def hidden(self, ids: list[int]) -> Any:
        """Final hidden states [T,D]."""
        with self.torch.no_grad():
            tokens = self.torch.tensor([ids])
            return self.model.model(input_ids=tokens, use_cache=False).last_hidden_state[0]

    def logprobs(self, hidden: Any) -> Any:
        """Log-probabilities [T,V] float32; the head of neither model caps its logits."""
        assert getattr(self.model.config, "final_logit_softcapping", None) is None
        with self.torch.no_grad():
            return self.model.lm_head(hidden).log_softmax(-1)


@pytest.fixture(scope="module")
def reference(name: str, path: str) -> Reference:
    return Reference(name, path)


# --- Against transformers ------------------------------------------------------------------------


def test_every_position_and_score(llm: LLM, reference: Reference, text: list[int]) -> None:
    """KL(reference || ours) at every position; and `score`, which feeds the cache in chunks."""
    torch = reference.torch
    hidden = reference.hidden(text[:LONG])  # causal: a shorter prompt is its beginning
    known = np.zeros(LONG, np.float32)  # log-probability of the next token
    for length in LENGTHS:
        ours = llm.forward(text[:length]).logits[0]
        for at in range(0, length, SLICE):
            stop = min(at + SLICE, length)
            p = reference.logprobs(hidden[at:stop])
            q = torch.tensor(np.asarray(ours[at:stop])).log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1)
            assert kl.max() <= MAX_KL, f"KL {kl.max():.1e} near {at} of {length} tokens"
            targets = torch.tensor(text[at + 1 : stop + 1])[:, None]
            known[at:stop] = p.gather(1, targets)[:, 0].numpy()
    np.testing.assert_allclose(llm.score(text[: LONG + 1]), known, rtol=0, atol=MAX_NOISE)


def test_chunked_prefill_and_cached_decode(llm: LLM, reference: Reference, text: list[int]) -> None:
    """Greedy tokens behind two chunks of a prompt, against one forward without a cache."""
    prompt = text[:1000]
    out = llm.generate(prompt, max_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=0)
    new = out.token_ids
    assert len(new) == NEW
    p = reference.logprobs(reference.hidden([*prompt, *new][:-1])[len(prompt) - 1 :]).numpy()
    chosen = p[np.arange(NEW), new]
    # Where the two best lie within the noise of float32, either is right.
    lost = p.max(axis=-1) - chosen
    assert lost.max() <= MAX_NOISE
    assert (lost > 0).sum() <= 1
    np.testing.assert_allclose([x.logprob for x in out.logprobs], chosen, rtol=0, atol=MAX_NOISE)


# --- Without a reference -------------------------------------------------------------------------


def test_france(llm: LLM) -> None:
    assert "Paris" in llm.generate("The capital of France is", max_tokens=8, temperature=0.0).text


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_chat(llm: LLM) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    out = llm.chat([question], max_tokens=32, temperature=0.0)
    assert "Paris" in out.text
    assert out.finish_reason == "stop"


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


def test_orbax_is_bit_for_bit(llm: LLM, text: list[int], tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    save_orbax(
        folder,
        Checkpoint(llm.params, llm.config, llm.tokenizer, llm.default_params, llm.eos_ids),
    )
    again = jaxinfer.load(folder, dtype="float32")
    assert again.config == llm.config
    assert again.eos_ids == llm.eos_ids
    same = jax.tree.map(lambda a, b: np.array_equal(bits(a), bits(b)), llm.params, again.params)
    assert all(jax.tree.leaves(same))
    prompt = llm.tokenizer.decode(text[:100])
    outputs = [m.generate(prompt, max_tokens=8, temperature=0.0) for m in (llm, again)]
    assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[0].text == outputs[1].text


@pytest.mark.parametrize("name", ["gemma3"], indirect=True)
def test_gemma_in_bfloat16(llm: LLM, path: str, text: list[int]) -> None:
    low = jaxinfer.load(path, dtype="bfloat16")
    for where, x in jax.tree.leaves_with_path(low.params):
        vector = where[-1].key == "scale"
        assert x.dtype == (jnp.float32 if vector else jnp.bfloat16)
    rounded = jax.tree.map(
        lambda a, b: np.array_equal(bits(a.astype(b.dtype)), bits(b)), llm.params, low.params
    )
    assert all(jax.tree.leaves(rounded))
    exact, rough = llm.score(text[:300]), low.score(text[:300])
    assert np.abs(rough - exact).mean() < 0.1
    assert "Paris" in low.generate("The capital of France is", max_tokens=8, temperature=0.0).text


LOAD = """
import json, sys
import jax, jaxinfer
from jaxinfer.checkpoint import load

def high():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

def read(*args, **kwargs):
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the high-water mark is what is held now
    before.append(high())
    return read_params(*args, **kwargs)

before, read_params, load.read_params = [], load.read_params, read
jax.devices()
llm = jaxinfer.load(sys.argv[1], dtype=sys.argv[2])
print(json.dumps([high() - before[0], llm.nbytes]))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads Linux's high-water mark"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_while_loading(path: str, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, path, dtype], capture_output=True, text=True, check=True
    )
    grown, nbytes = json.loads(done.stdout)
    assert nbytes <= grown * 1.01  # else the mark was not what we think
    assert grown <= MAX_PEAK * nbytes
