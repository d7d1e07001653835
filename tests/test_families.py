"""Every family against transformers, on tiny random checkpoints that transformers itself has saved.

What makes a forgotten term show: a head width that is not D / N, norm scales away from one, biases
away from zero, an epsilon that counts, prompts that reach past the window and past the context that
a scaled rotary embedding was first trained on.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_families import BASE, GEMMA3_LINEAR, KNOWN, SETTINGS, TIED, VOCAB, WINDOW

import jaxinfer
from jaxinfer.errors import CorruptFile
from jaxinfer.generate import LLM

WHY = "parity with the reference needs torch and transformers"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

NEW = 128  # greedy tokens
MAX_KL = 1e-5
# Of a logit, in standard deviations of the logits. Measured: below 4e-5 at 250 tokens; 2e-4 at
# 2,048, where an angle of 2,000 radians in float32 has lost four of its seven digits.
MAX_ERROR = 5e-4


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
