"""Language models with windows, chunks, or logits capped or scaled: equal to transformers' own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.language.helpers import GRID, VOCAB, item, vision
from visexpert.data import pack
from visexpert.errors import ConfigError
from visexpert.language import PrefixLM
from visexpert.types import IMAGE_TOKEN, VisionTokens

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
WINDOW = {"sliding_window": 4}
BOTH = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
CHUNKS: dict[str, Any] = {
    "attention_chunk_size": 4,
    "num_local_experts": 2,
    "intermediate_size_mlp": 32,
    "no_rope_layers": [1, 0],
    "moe_layers": [],
    "layer_types": ["chunked_attention", "full_attention"],
}
QWEN = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
LATENT: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SUPPORTED: dict[str, dict[str, Any]] = {
    "mistral": SIZES | WINDOW,
    "phi3": SIZES | WINDOW,
    "starcoder2": SIZES | WINDOW,
    "qwen2": SIZES | QWEN,
    "qwen3": SIZES | QWEN,
    "gemma2": SIZES | WINDOW,  # a window in every other layer, capped logits, no attention of PyTorch's own
    "gemma3_text": SIZES | BOTH,
    "gpt_oss": SIZES | BOTH | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt_neox": SIZES,  # is_decoder is false, and nothing asks it
    "cohere": SIZES,  # scaled logits
    "granite": SIZES | {"logits_scaling": 4.0},
    "olmo3": SIZES | BOTH,
    "llama4_text": SIZES | CHUNKS,
    "gpt2": GPT2_SIZES | {"bos_token_id": 0, "eos_token_id": 1},
    "opt": SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "bert": SIZES | {"is_decoder": True},
    # Latent attention: values narrower than keys, positions on a part of each key.
    "deepseek_v3": SIZES | LATENT | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "minicpm3": SIZES | LATENT,
    "dory": SIZES | BOTH | {"n_input_layers": 0, "n_output_layers": 0},  # layers in loops, a cache per loop
}


def side_of(kind: str) -> PrefixLM:
    torch.manual_seed(0)
    side = PrefixLM(config={"model_type": kind, **SUPPORTED[kind]}).eval()
    for parameter in side.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return side


def own_logits(side: PrefixLM, image_TD: Tensor, ids: list[int]) -> Tensor:
    """transformers' logits (L, V) of one item by itself, no mask and no positions given."""
    rows = [image_TD] if IMAGE_TOKEN not in ids else []
    rows += [image_TD if i == IMAGE_TOKEN else side.model.get_input_embeddings()(torch.tensor([i])) for i in ids]
    logits: Tensor = side.model(inputs_embeds=torch.cat(rows)[None], use_cache=False).logits[0].float()
    return logits


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_packed_logits_are_those_of_each_row_alone(kind: str, inside: bool) -> None:
    side, images = side_of(kind), vision(2)
    rows = [[item(7, 2), item(9, 3)], [item(5, 2)]]
    if inside:
        rows = [[([ids[0], IMAGE_TOKEN, *ids[1:]], prompt + 1) for ids, prompt in items] for items in rows]
    with torch.no_grad():
        found_MV = side(images, pack(rows, 0)).logits_MV
        wanted = []
        for image_TD, items in zip(images.tokens_BTD, rows, strict=True):
            for ids, prompt in items:
                logits_LV = own_logits(side, image_TD, ids)
                wanted.append(logits_LV[-(len(ids) - prompt) - 1 : -1])
    torch.testing.assert_close(found_MV, torch.cat(wanted), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_cached_generation_writes_what_the_whole_row_says(kind: str) -> None:
    """Rows of unlike lengths, each token against transformers' forward of the whole row without a cache."""
    side, images = side_of(kind), vision(2)
    prompts = [item(6, 1)[0], item(3, 1)[0]]
    written = side.generate(images, prompts, eos_id=1, max_new_tokens=8)
    assert any(written)
    for image_TD, prompt, answer in zip(images.tokens_BTD, prompts, written, strict=True):
        for end in range(len(answer)):
            with torch.no_grad():
                logits_V = own_logits(side, image_TD, [*prompt, *answer[:end]])[-1]
            assert answer[end] == int(logits_V.argmax())


def test_a_window_is_felt() -> None:
    side = side_of("mistral")
    assert side.model.config.sliding_window == 4
    text = pack([[item(12, 8)]], 0)
    tokens = torch.randn(1, GRID[0] * GRID[1], side.width)
    first = side(VisionTokens(tokens, GRID), text).logits_MV
    changed = tokens.clone()
    changed[0, 0] += 1.0
    # Two layers with a window of 4 reach 6 tokens back, and the image's first token is farther from every prediction.
    torch.testing.assert_close(side(VisionTokens(changed, GRID), text).logits_MV, first)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "mamba", "vocab_size": VOCAB, "hidden_size": 16}, "'mamba' carries a state along the row"),
        ({"model_type": "lfm2", **SIZES, "layer_types": ["conv", "full_attention"]}, "layers of the kind conv"),
        ({"model_type": "xglm", "vocab_size": VOCAB, "d_model": 16}, "'xglm' builds its own attention masks"),
        ({"model_type": "ctrl", "vocab_size": VOCAB, "n_embd": 16}, "'ctrl' cannot generate from embeddings"),
        ({"model_type": "bert", **SIZES}, "'bert' reads text in both directions (is_decoder is false)"),
        ({"model_type": "bloom", "vocab_size": VOCAB, "hidden_size": 16}, "'bloom' builds its own attention masks"),
        ({"model_type": "falcon", "vocab_size": VOCAB, "hidden_size": 16, "alibi": True}, "ALiBi"),
        ({"model_type": "bart", "vocab_size": VOCAB, "d_model": 16}, "'bart' takes no position_ids"),
        ({"model_type": "plbart", "vocab_size": VOCAB, "d_model": 16}, "'plbart' takes no position_ids"),
        ({"model_type": "moshi", **SIZES, **WINDOW}, "'moshi' applies its sliding_window in generation only"),
        ({"model_type": "gemma3n_text", **SIZES, "hidden_size_per_layer_input": 8}, "token ids in every layer"),
    ],
)
def test_a_model_that_would_read_packed_items_wrongly_is_refused(config: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PrefixLM(config=config)
    assert why in str(refused.value) and "llama" in str(refused.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama", "hidden_size": 33}, "'llama' (Class validation error for validator"),
        ({"model_type": "llama", "num_attention_heads": "x"}, "'num_attention_heads' expected int, got str"),
        ({"model_type": "llama", **SIZES, "pad_token_id": VOCAB}, "cannot build a 'llama' from these fields"),
        ({"model_type": "ministral", **SIZES, "head_dim": None}, "cannot build a 'ministral' from these fields"),
        ({"model_type": "blt"}, "'blt' has no hidden_size"),
    ],
)
def test_fields_that_no_model_can_have_are_one_sentence(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PrefixLM(config=config)
    assert said in str(refused.value) and "\n" not in str(refused.value)
