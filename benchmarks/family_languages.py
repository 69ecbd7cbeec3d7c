"""Tiny random causal language models of every family in transformers, made by one general recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MOST_PARAMETERS = 20_000_000
"""Most parameters of a tiny model; the recipe does not reach families that stay larger."""

WIDTH, HEADS, HEAD, LAYERS, VOCABULARY, POSITIONS = 32, 4, 8, 4, 96, 128

NAMED: tuple[tuple[int, str], ...] = (
    (WIDTH, "hidden_size n_embd d_model dim embed_dim embedding_size word_embed_proj_dim attention_hidden_size"),
    (WIDTH, "lru_width projection_dim mamba_hidden_size moe_intermediate_size intermediate_size_mlp"),
    (WIDTH, "shared_intermediate_size out_hidden_size expert_ffn_hidden_size dim_model"),
    (2 * WIDTH, "intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff d_inner"),
    (2 * WIDTH, "shared_expert_intermediate_size mlp_dim mamba_d_ssm dim_ff"),
    (HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (HEADS, "swa_num_attention_heads mlp_num_heads"),
    (HEAD, "head_dim d_kv kv_channels v_head_dim qk_nope_head_dim swa_head_dim qk_rope_head_dim rotary_dim dim_head"),
    (HEAD, "index_head_dim global_head_dim swa_v_head_dim mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim"),
    (HEAD, "chunk_size mamba_chunk_size linear_key_head_dim linear_value_head_dim attention_window patch_size"),
    (HEAD, "hidden_size_per_layer_input"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers depth"),
    (LAYERS, "num_mem_blocks"),
    (VOCABULARY, "vocab_size text_vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len seq_length"),
    (16, "qk_head_dim q_lora_rank kv_lora_rank index_topk mamba_d_state state_size ssm_state_size"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts time_step_rank mamba_dt_rank"),
    (4, "linear_num_value_heads laurel_rank sliding_window attention_chunk_size sliding_window_size window_size"),
    (2, "num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads num_experts_per_tok moe_topk moe_k"),
    (2, "top_k_experts num_selected_experts mamba_expand expand linear_num_key_heads altup_num_inputs"),
    (2, "spatial_merge_size sliding_window_pattern full_attention_interval no_rope_layer_interval"),
    (1, "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace mamba_n_groups n_groups"),
    (1, "num_codebooks audio_num_codebooks"),
    (0, "num_kv_shared_layers"),
    (32, "image_size"),
)
"""Sizes in configurations, under the names that the families give them.

Windows are narrower than the texts that are tried, and patterns of layers are shorter than the model is deep.
"""

SIZES: Mapping[str, int] = {name: size for size, names in NAMED for name in names.split()}

SPECIAL = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "image_token_id",
    "image_token_index",
)

EXTRA: Mapping[str, Mapping[str, Any]] = {
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16), "is_decoder": True},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": HEADS, "topk_method": "greedy"},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": HEAD}),
}
"""Fields that some families need besides the recipe, or always have in their published models."""


WAYS = 4
"""Number of ways in which :func:`tiny_config` makes a family small; the first that runs is used."""


def families() -> list[str]:
    """Return the ``model_type`` of each family with a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, way: int) -> PreTrainedConfig:
    """Return the configuration of a family with every size that the recipe knows made small.

    Args:
        family: ``model_type``.
        way: One of :data:`WAYS`: with bit 0, as many heads for keys as for queries; with bit 1, lists with one entry
            per layer are shortened.
    """
    kind = CONFIG_MAPPING[family]
    default = kind()
    more: dict[str, Any] = _shortened(default) if way >= 2 else {}
    if way % 2:
        more["num_key_value_heads"] = HEADS
    return kind(**{**small_fields(default), **more, **EXTRA.get(family, {})})


def small_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return arguments that make a configuration small: sizes, special tokens in the vocabulary, and its parts."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        own = name.lstrip("_")
        if isinstance(value, PreTrainedConfig):
            found[name] = {"model_type": value.model_type, **small_fields(value)}
        elif own in SIZES and isinstance(value, int) and not isinstance(value, bool):
            found[own] = SIZES[own]
        elif own in SPECIAL and value is not None:
            found[own] = SPECIAL.index(own)
    for own, name in config.attribute_map.items():  # such as hidden_size for n_embd
        if own in SIZES and name not in found and isinstance(getattr(config, name, None), int):
            found[name] = SIZES[own]
    return found


def _shortened(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the lists with one entry per layer, shortened to the remaining layers."""
    layers = getattr(config, "num_hidden_layers", None)
    return {
        name: value[:LAYERS]
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == layers
    }


def write_language(family: str, folder: Path) -> str:
    """Write a tiny random model with ``save_pretrained``, if possible one that transformers itself can run.

    Returns:
        The reason why transformers itself cannot run it; empty if it can.

    Raises:
        ValueError: The recipe does not make a small model.
    """
    reasons: list[str] = []
    first = None
    for ways in range(WAYS):
        try:
            torch.manual_seed(0)
            config = tiny_config(family, ways)
            with torch.device("meta"):
                count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if count > MOST_PARAMETERS:
                raise ValueError(f"it still has {count / 1e6:.0f} M parameters")
            model = shaken(AutoModelForCausalLM.from_config(config))
            first = first or model
            with torch.no_grad():
                model(input_ids=torch.tensor([[20, 21, 22, 23, 24]]))
        except Exception as error:  # a model of odd sizes can raise anything
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        model.save_pretrained(folder)
        return ""
    if first is None:
        raise ValueError(reasons[0])
    first.save_pretrained(folder)
    return reasons[0]


def shaken(model: Any) -> Any:
    """Return the model in eval mode, with noise added to every weight, including norms and biases."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0
    return model.eval()
