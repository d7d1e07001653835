"""What config_from_hf knows by heart: the families, and the fields that do not change the maths.

The numbers are the defaults of transformers' config classes; a test compares every one of them.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

# Fields that no forward of a trained model reads: training, generation, bookkeeping, serving.
HARMLESS = frozenset(
    """
    model_type architectures auto_map name_or_path _name_or_path _commit_hash transformers_version
    transformers.js_config torch_dtype dtype use_bfloat16 torchscript is_llama_config
    unsloth_fixed unsloth_version initializer_range pretraining_tp
    attention_dropout hidden_dropout resid_pdrop embd_pdrop
    use_cache cache_implementation attn_implementation _attn_implementation
    _attn_implementation_autoset chunk_size_feed_forward tf_legacy_loss
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id tokenizer_class prefix
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    cross_attention_hidden_size tie_encoder_decoder is_decoder
    max_sequence_length model_max_length gradient_checkpointing neftune_noise_alpha
    """.split()  # noqa: SIM905
)
# Parts of a multimodal Gemma 3 that a text never reaches.
VISION = frozenset(
    """
    vision_config mm_tokens_per_image image_token_index boi_token_index eoi_token_index
    image_token_id boi_token_id eoi_token_id
    """.split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A model_type: what its class assumes of absent fields, and how it differs from Llama."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None  # None: as many as query heads
    max_position_embeddings: int
    head_dim: int | None = None  # None: D / N
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    sliding_window: int | None = None
    tied: bool = False
    # none; all layers; those of `layer_types`; the same behind the switch `use_sliding_window`
    windows: Literal["none", "all", "typed", "switched"] = "none"
    attention_bias: Literal["never", "optional", "qkv"] = "optional"  # qkv: always, on q, k, v only
    mlp_bias: bool = False  # whether the field may say true
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    gemma: bool = False  # scaled embeddings, query_pre_attn_scalar, hidden_activation, softcaps


_QWEN = (151936, 4096, 22016, 32, 32, 32, 32768)
FAMILIES = {
    "llama": Family(32000, 4096, 11008, 32, 32, None, 2048, mlp_bias=True),
    "mistral": Family(
        *(32000, 4096, 14336, 32, 32, 8, 131072),
        sliding_window=4096,
        windows="all",
        attention_bias="never",
    ),
    "qwen2": Family(*_QWEN, sliding_window=4096, windows="switched", attention_bias="qkv"),
    "qwen3": Family(*_QWEN, head_dim=128, sliding_window=4096, windows="switched", qk_norm="head"),
    "gemma2": Family(
        *(256000, 2304, 9216, 26, 8, 4, 8192),
        head_dim=256,
        sliding_window=4096,
        windows="typed",
        tied=True,
        post_norm=True,
        gemma=True,
    ),
    "gemma3_text": Family(
        *(262208, 2304, 9216, 26, 8, 4, 131072),
        head_dim=256,
        sliding_window=4096,
        windows="typed",
        tied=True,
        post_norm=True,
        qk_norm="head",
        gemma=True,
    ),
    "phi3": Family(
        *(32064, 3072, 8192, 32, 32, None, 4096),
        rms_norm_eps=1e-5,
        windows="all",
        attention_bias="never",
    ),
    "olmo2": Family(
        *(50304, 4096, 11008, 32, 32, None, 2048),
        rms_norm_eps=1e-5,
        pre_norm=False,
        post_norm=True,
        qk_norm="full",
    ),
    "smollm3": Family(
        *(128256, 2048, 11008, 36, 16, 4, 32768),
        rope_theta=2e6,
        windows="switched",
        tied=True,
        mlp_bias=True,
    ),
}
CLASSES = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "Olmo2ForCausalLM": "olmo2",
    "SmolLM3ForCausalLM": "smollm3",
}
