"""SmolLM2 and Gemma 3, from their GGUF files: against transformers, and what needs no reference.

The reference reads the same files with transformers' own dequantization and reordering, into a
config written down here as the models' authors published it. Texts are Python's documentation.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

import jaxinfer
from jaxinfer import steps
from jaxinfer.checkpoint.orbax import save_orbax
from jaxinfer.checkpoint.placement import Checkpoint
from jaxinfer.config import ModelConfig
from jaxinfer.generate import LLM
from jaxinfer.model import forward, head

WHY = "parity with the reference needs torch and transformers"
WINDOW = 512  # Gemma's
LONG = 2048
LENGTHS = (4, WINDOW - 1, WINDOW, WINDOW + 1, LONG)  # of prompts, in tokens
NEW = 128  # greedy tokens
MAX_KL = 1e-5
MAX_NOISE = 1e-3  # of a logit or a log-probability, in nats
SLICE = 128  # positions whose logits are held at once: Gemma's take 1 MB each
STRIDE = {"llama": 1, "gemma3": 4}  # positions that are looked at; Gemma's logits cost too much
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
    """The model in transformers: float32, no cache."""

    def __init__(self, name: str, path: str) -> None:
        self.torch = pytest.importorskip("torch", reason=WHY)
        self.torch.set_num_threads(1)  # more would spin while they wait, and starve jax's
        transformers = pytest.importorskip("transformers", reason=WHY)
        # What from_pretrained(gguf_file=...) calls, once; that one reads the file three times, at
        # up to ten seconds each, and wants the package accelerate.
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        kind, fields = CONFIGS[name]
        config = getattr(transformers, f"{kind}Config")(**fields)
        with self.torch.device("meta"):  # for its parameters' names
            empty = transformers.AutoModelForCausalLM.from_config(config)
        # gguf slices the file a million times, which a plain array bears better than a mapped one.
        with mock.patch("numpy.memmap", lambda path, mode: np.fromfile(path, np.uint8)):
            loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=empty)
        self.model = type(empty).from_pretrained(
            None,
            config=config,
            state_dict=loaded["tensors"],
            dtype=self.torch.float32,
            attn_implementation="sdpa",  # it would drop softcaps, but these models have none
        )
        self.model.eval()

    def hidden(self, ids: list[int]) -> Any:
        """Final hidden states [T,D]."""
        with self.torch.no_grad():
            tokens = self.torch.tensor([ids])
            return self.model.model(input_ids=tokens, use_cache=False).last_hidden_state[0]

    def logits(self, hidden: Any) -> Any:
        """Logits [T,V] float32; the head of neither model caps them."""
        assert getattr(self.model.config, "final_logit_softcapping", None) is None
        with self.torch.no_grad():
            return self.model.lm_head(hidden)


@pytest.fixture(scope="module")
def reference(name: str, path: str) -> Reference:
    return Reference(name, path)


# --- Against transformers ------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def feed(params: Any, tokens: Any, count: Any, cache: Any, config: ModelConfig) -> Any:
    return forward(params, tokens, count, cache, config=config)


def hidden_states(llm: LLM, ids: list[int]) -> jax.Array:
    """Our final hidden states [T,D] of a prompt, fed to the cache in chunks as prefill does."""
    # Where the weights are: jit would tell a cache that may move from one that may not.
    cache = jax.device_put(llm.model.new_cache(1, LONG), llm.model.devices[0])
    parts = []
    for at in range(0, len(ids), steps.PREFILL_WIDTHS[-1]):
        chunk = ids[at : at + steps.PREFILL_WIDTHS[-1]]
        width = steps.bucket(len(chunk), steps.PREFILL_WIDTHS)
        tokens = jnp.array([chunk + [0] * (width - len(chunk))], jnp.int32)
        hidden, cache = feed(llm.params, tokens, jnp.array([len(chunk)]), cache, llm.config)
        parts.append(hidden[0, : len(chunk)])
    return jnp.concatenate(parts)


@functools.partial(jax.jit, static_argnames="config")
def divergence(params: Any, hidden: Any, logits: Any, config: ModelConfig) -> jax.Array:
    """KL(reference || ours) [T] of the reference's logits [T,V] and our hidden states [T,D]."""
    ours = head(params, hidden[None], config=config)[0]
    p = jax.nn.softmax(logits)
    return (p * (logits - ours)).sum(-1) - (logsumexp(logits, -1) - logsumexp(ours, -1))


def test_every_position(llm: LLM, reference: Reference, text: list[int]) -> None:
    """A long prompt, and where shorter ones end."""
    theirs = reference.hidden(text[:LONG])  # causal: a shorter prompt is its beginning
    for length in LENGTHS:
        ours = hidden_states(llm, text[:length])
        ends = range(max(0, length - 16), length)
        places = [*range(0, LONG, STRIDE[llm.config.family]), *ends] if length == LONG else ends
        for at in range(0, len(places), SLICE):
            rows = np.array(places[at : at + SLICE])
            logits = reference.logits(theirs[rows])
            kl = divergence(llm.params, ours[rows], logits.numpy(), llm.config)
            assert kl.max() <= MAX_KL, f"KL {kl.max():.1e} near {rows[0]} of {length} tokens"


def test_prefill_decode_and_score(llm: LLM, reference: Reference, text: list[int]) -> None:
    """Greedy tokens behind two chunks of a prompt, against one forward without a cache."""
    prompt = text[: WINDOW + 8]
    out = llm.generate(prompt, max_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=0)
    new = out.token_ids
    assert len(new) == NEW
    ids = [*prompt, *new]
    hidden = reference.hidden(ids[:-1])[len(prompt) - 1 :]
    p = reference.logits(hidden).log_softmax(-1).numpy()
    chosen = p[np.arange(NEW), new]
    # Where the two best lie within the noise of float32, either is right.
    lost = p.max(axis=-1) - chosen
    assert lost.max() <= MAX_NOISE
    assert (lost > 0).sum() <= 1
    np.testing.assert_allclose([x.logprob for x in out.logprobs], chosen, rtol=0, atol=MAX_NOISE)
    np.testing.assert_allclose(llm.score(ids)[-NEW:], chosen, rtol=0, atol=MAX_NOISE)


# --- Without a reference -------------------------------------------------------------------------


def test_real_text_is_likely(llm: LLM, text: list[int]) -> None:
    assert llm.score(text[:65]).mean() > -5.0  # nats a token; guessing would cost 10 or more


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_chat(llm: LLM) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    out = llm.chat([question], max_tokens=32, temperature=0.0)
    assert "Paris" in out.text
    assert out.finish_reason == "stop"


# --- What is loaded ------------------------------------------------------------------------------


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


def same_bits(a: Any, b: Any) -> bool:
    same = jax.tree.map(lambda x, y: np.array_equal(bits(x), bits(y)), a, b)
    return all(jax.tree.leaves(same))


def check_orbax(llm: LLM, text: list[int], folder: Path) -> None:
    """Convert, load, compare."""
    weights = Checkpoint(llm.params, llm.config, llm.tokenizer, llm.default_params, llm.eos_ids)
    save_orbax(folder, weights)
    again = jaxinfer.load(folder, dtype=llm.model.dtype)
    assert (again.config, again.eos_ids) == (llm.config, llm.eos_ids)
    assert same_bits(llm.params, again.params)
    outputs = [m.generate(text, max_tokens=8, temperature=0.0) for m in (llm, again)]
    assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[0].text == outputs[1].text != ""


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_orbax_is_bit_for_bit(llm: LLM, text: list[int], tmp_path: Path) -> None:
    check_orbax(llm, text[:32], tmp_path / "converted")


@pytest.mark.parametrize("name", ["gemma3"], indirect=True)
def test_bfloat16_and_through_orbax(llm: LLM, path: str, text: list[int], tmp_path: Path) -> None:
    low = jaxinfer.load(path, dtype="bfloat16")
    for where, x in jax.tree.leaves_with_path(low.params):
        assert x.dtype == (jnp.float32 if where[-1].key == "scale" else jnp.bfloat16)
    cast = jax.tree.map(lambda x, y: x.astype(y.dtype), llm.params, low.params)
    assert same_bits(cast, low.params)
    assert 0 < np.abs(low.score(text[:65]) - llm.score(text[:65])).mean() < 0.1
    check_orbax(low, text[:32], tmp_path / "converted")


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
