"""Every family against transformers, on tiny random checkpoints that transformers itself has saved.

Widths, windows and scalings are chosen so that a forgotten term shows: a head width that is not
D / N, norm scales away from one, biases away from zero, an epsilon that counts, prompts that reach
past the window and past the context that a scaled rotary embedding was first trained on.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxinfer
from jaxinfer.errors import CorruptFile
from jaxinfer.generate import LLM

WHY = "parity with the reference needs torch and transformers"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

VOCAB = 96  # V, the width of the logits
KNOWN = 90  # ids that the tokenizer knows; the others pad the logits and are never chosen
WINDOW = 12
NEW = 128  # greedy tokens
MAX_KL = 1e-5
# Of a logit, in standard deviations of the logits. Measured: below 4e-5 at 250 tokens; 2e-4 at
# 2,048, where an angle of 2,000 radians in float32 has lost four of its seven digits.
MAX_ERROR = 5e-4

BASE: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 36, "intermediate_size": 56, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"rms_norm_eps": 1e-2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"tie_word_embeddings": False},
}
ODD = {"head_dim": 10}  # D / N is 9
ONE_KV = {"num_key_value_heads": 1}
TIED = {"tie_word_embeddings": True}
SLIDING = {"sliding_window": WINDOW}
SWITCHED = {**SLIDING, "use_sliding_window": True}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0},
    **{"original_max_position_embeddings": 32},
}
GEMMA = {**SLIDING, "head_dim": 24, "query_pre_attn_scalar": 20}
GEMMA3 = {
    **GEMMA,
    "num_hidden_layers": 7,  # five local layers, a global one, a local one
    "final_logit_softcapping": 4.0,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
    },
}
GEMMA3_LINEAR = {
    **{**GEMMA, "num_hidden_layers": 3},
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
    },
}

# Name -> the class of the config and its fields. The first word is the family.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", ODD),
    "llama tied, one kv head, every bias": (
        "Llama",
        {**TIED, **ONE_KV, "head_dim": 24, "attention_bias": True, "mlp_bias": True},
    ),
    "llama llama3": ("Llama", {**ODD, "rope_parameters": LLAMA3, "max_position_embeddings": 2048}),
    "llama linear": ("Llama", {"hidden_size": 40, "rope_parameters": LINEAR}),
    "llama yarn": ("Llama", {"head_dim": 24, "rope_parameters": YARN}),
    "llama yarn, every field": (
        "Llama",
        {
            "head_dim": 24,
            "rope_parameters": {
                **YARN,
                **{"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.5},
            },
        },
    ),
    "mistral": ("Mistral", {**ODD, **SLIDING}),
    "mistral no window, tied, one kv head": (
        "Mistral",
        {**TIED, **ONE_KV, "head_dim": 24, "sliding_window": None},
    ),
    "qwen2": ("Qwen2", {"hidden_size": 40}),
    "qwen2 upper layers slide, tied": (
        "Qwen2",
        {**TIED, **SWITCHED, "hidden_size": 40, "max_window_layers": 1},
    ),
    "qwen2 yarn": ("Qwen2", {"hidden_size": 40, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", ODD),
    "qwen3 all slide, tied, one kv head, biases": (
        "Qwen3",
        {**TIED, **ONE_KV, **SWITCHED, "max_window_layers": 0, "head_dim": 24}
        | {"attention_bias": True},
    ),
    "gemma2": (
        "Gemma2",
        {**TIED, **GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2 no softcaps, untied, one kv head": (
        "Gemma2",
        {**GEMMA, **ONE_KV, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("Gemma3Text", {**TIED, **GEMMA3}),
    "gemma3 linear, chosen layers, untied, one kv head": (
        "Gemma3Text",
        {**GEMMA3_LINEAR, **ONE_KV, "max_position_embeddings": 2048},
    ),
    "phi3": ("Phi3", {"hidden_size": 40, **SLIDING}),
    "phi3 half of a head rotates, tied, one kv head": (
        "Phi3",
        {**TIED, **ONE_KV, "hidden_size": 48, "sliding_window": None}
        | {"partial_rotary_factor": 0.5},
    ),
    "olmo2": ("Olmo2", {"hidden_size": 40}),
    "olmo2 tied, one kv head, biases": (
        "Olmo2",
        {**TIED, **ONE_KV, "hidden_size": 48, "attention_bias": True},
    ),
    "smollm3": ("SmolLM3", {**TIED, "hidden_size": 40, "num_hidden_layers": 4}),
    "smollm3 windows, chosen layers, biases": (
        "SmolLM3",
        {**SWITCHED, "hidden_size": 40, "no_rope_layers": [1, 0], "attention_bias": True}
        | {"mlp_bias": True, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}


def test_no_family_is_forgotten() -> None:
    from jaxinfer.checkpoint.hf_families import FAMILIES

    families = {name.removesuffix("_text") for name in FAMILIES}
    assert {name.split()[0] for name in SETTINGS} == families


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of transformers and ours, from the same files."""

    reference: Any
    llm: LLM

    def logits(self, ids: list[int]) -> np.ndarray:
        """The reference's logits [T,V] of one text, computed at once and without a cache."""
        with torch.no_grad():
            out = self.reference(input_ids=torch.tensor([ids]), use_cache=False)
        return out.logits[0].double().numpy()


def random_model(kind: str, fields: dict[str, Any], seed: int = 0) -> Any:
    """A model of transformers whose every parameter matters."""
    config = getattr(transformers, f"{kind}Config")(**{**BASE, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    return model


def randomize(model: Any, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            if p.ndim > 1:  # scores and logits with a standard deviation of about 2
                p.copy_(1.5 * p.shape[-1] ** -0.5 * noise)
            elif "norm" in name:
                p.add_(0.3 * noise)
            else:
                p.copy_(0.5 * noise)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of `KNOWN` ids: three control tokens, and bytes."""
    import tokenizers

    tokens = ["<pad>", "<s>", "</s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: i for i, token in enumerate(tokens[:KNOWN])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
    tokenizer.save(str(folder / "tokenizer.json"))


def save(model: Any, folder: Path, **how: Any) -> None:
    model.save_pretrained(folder, **how)
    save_tokenizer(folder)


def open_pair(folder: Path) -> Pair:
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return Pair(reference.eval(), jaxinfer.load(folder, dtype="float32"))


@pytest.fixture(scope="module", params=SETTINGS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("family")
    save(random_model(*SETTINGS[request.param]), folder)
    return open_pair(folder)


def random_ids(count: int) -> list[int]:
    return np.random.default_rng(count).integers(0, VOCAB, count).tolist()


def compare(ours: Any, reference: np.ndarray) -> None:
    """Two sets of logits [T,V], at every position."""
    ours = np.asarray(ours, np.float64)
    assert ours.shape == reference.shape
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (reference, ours))
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    assert kl.max() <= MAX_KL, f"KL {kl.max():.1e} at position {kl.argmax()} of {len(kl)}"
    error = np.abs(ours - reference).max(axis=-1) / reference.std()
    assert error.max() <= MAX_ERROR, f"{error.max():.1e} deviations at position {error.argmax()}"


# --- Logits and greedy text ----------------------------------------------------------------------


def test_logits_around_the_window(pair: Pair) -> None:
    prompts = [random_ids(n) for n in (4, WINDOW - 1, WINDOW, WINDOW + 1)]
    out = pair.llm.forward(prompts)
    for row, prompt in enumerate(prompts):
        compare(out.logits[row, : len(prompt)], pair.logits(prompt))


def test_logits_far_beyond_the_window_and_the_first_context(pair: Pair) -> None:
    """250 tokens; 2,048 where the model reads as many. Scaled ropes were first trained on 32."""
    ids = random_ids(2048 if pair.llm.max_len == 2048 else 250)
    compare(pair.llm.forward(ids).logits[0], pair.logits(ids))


def test_cache_equals_no_cache(pair: Pair) -> None:
    """Greedy tokens, against what one forward without a cache would have chosen at each place."""
    prompt = random_ids(100)
    new = pair.llm.generate(prompt, max_tokens=NEW, temperature=0.0, ignore_eos=True).token_ids
    assert len(new) == NEW
    ids = [*prompt, *new][:-1]
    whole = pair.llm.forward(ids).logits[0]
    compare(whole, pair.logits(ids))
    for logits in (np.asarray(whole, np.float64), pair.logits(ids)):
        scores = logits[len(prompt) - 1 :, :KNOWN]
        lost = scores.max(axis=-1) - scores[np.arange(NEW), new]
        # Where the two best lie within the noise of float32, either is right.
        assert lost.max() <= MAX_ERROR * logits.std()
        assert (lost > 0).sum() <= 1


# --- What a checkpoint may look like -------------------------------------------------------------


def test_gemma3_with_vision_is_its_text_part(tmp_path: Path) -> None:
    vision = {
        **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
    }
    config = transformers.Gemma3Config(
        text_config={**BASE, **GEMMA3_LINEAR, **TIED},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    )
    randomize(model)
    save(model, tmp_path)
    pair = Pair(model.eval(), jaxinfer.load(tmp_path, dtype="float32"))
    ids = [i % (VOCAB - 1) for i in random_ids(250)]  # without the image's own token
    compare(pair.llm.forward(ids).logits[0], pair.logits(ids))


def test_sharded_checkpoint(tmp_path: Path) -> None:
    save(random_model(*SETTINGS["qwen3"]), tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    pair = open_pair(tmp_path)
    ids = random_ids(250)
    compare(pair.llm.forward(ids).logits[0], pair.logits(ids))


def test_bfloat16_checkpoint(tmp_path: Path) -> None:
    save(random_model(*SETTINGS["gemma2"]).to(torch.bfloat16), tmp_path)
    pair = open_pair(tmp_path)
    ids = random_ids(250)
    compare(pair.llm.forward(ids).logits[0], pair.logits(ids))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_config_says_untied_but_there_is_no_head(tmp_path: Path) -> None:
    """transformers would go on with a random head."""
    save(random_model(*SETTINGS["llama tied, one kv head, every bias"]), tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(CorruptFile, match=r"lm_head\.weight is missing"):
        jaxinfer.load(tmp_path)


def test_config_says_tied_but_there_is_another_head(tmp_path: Path) -> None:
    """transformers would go on without the head that was trained."""
    save(random_model(*SETTINGS["llama"]), tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(CorruptFile, match="tie_word_embeddings"):
        jaxinfer.load(tmp_path)
