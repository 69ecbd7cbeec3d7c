"""Language models inside larger ones: their text part is built, filled and read as transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Config,
    Llama4Config,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    OPTConfig,
    OPTForCausalLM,
    Qwen2VLConfig,
)

from tests.language.helpers import VOCAB, item
from visexpert.data import pack
from visexpert.errors import ConfigError
from visexpert.language import PrefixLM
from visexpert.types import VisionTokens

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EYES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
SCOUT = {"num_local_experts": 2, "intermediate_size_mlp": 32, "moe_layers": [], "no_rope_layers": [1, 0]}
SEES = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
WHOLE: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: Gemma3Config(text_config={**TEXT, **WINDOWS}, vision_config=EYES, mm_tokens_per_image=4),
    "llama4": lambda: Llama4Config(text_config={**TEXT, **SCOUT}, vision_config={**EYES, **SEES}),
    "mistral3": lambda: Mistral3Config(
        text_config={**TEXT, "model_type": "mistral"}, vision_config={**EYES, "model_type": "pixtral"}
    ),
    "llava": lambda: LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config={**EYES, "model_type": "clip_vision_model"}
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_the_text_part_of_a_whole_model(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    whole: Any = AutoModelForImageTextToText.from_config(WHOLE[kind]()).eval()
    for parameter in whole.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    whole.save_pretrained(tmp_path)
    side = PrefixLM(source=str(tmp_path)).eval()
    side.load_weights()
    if kind == "llama4":
        check(side, whole.language_model.model, whole.language_model.lm_head)
    else:
        check(side, whole.model.language_model, whole.lm_head)


def check(side: PrefixLM, body: Any, head: Any) -> None:
    """Packed logits are those of transformers' own parts, one item at a time."""
    items = [item(7, 2), item(6, 3)]
    tokens_BTD = torch.randn(1, 6, side.width)
    with torch.no_grad():
        found_MV = side(VisionTokens(tokens_BTD, (2, 3)), pack([items], 0)).logits_MV
        wanted = []
        for ids, prompt in items:
            embeds = torch.cat([tokens_BTD, body.get_input_embeddings()(torch.tensor([ids]))], dim=1)
            states = body(inputs_embeds=embeds, use_cache=False).last_hidden_state
            wanted.append(head(states)[0, prompt - len(ids) - 1 : -1])
    torch.testing.assert_close(found_MV, torch.cat(wanted), atol=2e-5, rtol=1e-4)


def test_a_text_part_that_cannot_stand_alone_is_refused(tmp_path: Path) -> None:
    Qwen2VLConfig().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "qwen2_vl"
    with pytest.raises(ConfigError, match=r"'qwen2_vl_text', the text part of 'qwen2_vl', is no causal language"):
        PrefixLM(source=str(tmp_path))
    with pytest.raises(ConfigError, match="'t5'.* is no causal language"):
        PrefixLM(config={"model_type": "t5"})


def test_embeddings_that_are_projected(tmp_path: Path) -> None:
    """OPT-350m embeds in 512 and computes in 1024."""
    torch.manual_seed(0)
    fields = {name: TEXT[name] for name in ("vocab_size", "num_hidden_layers", "num_attention_heads")}
    config = OPTConfig(
        **fields,
        hidden_size=16,
        ffn_dim=32,
        word_embed_proj_dim=8,
        do_layer_norm_before=False,
        max_position_embeddings=64,
    )
    model: Any = OPTForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    side = PrefixLM(source=str(tmp_path), image_newline=True).eval()
    side.load_weights()
    assert side.width == 8
    check(side, model.model, model.lm_head)
    written = side.generate(VisionTokens(torch.randn(1, 6, 8), (2, 3)), [[5, 6, 7]], eos_id=1, max_new_tokens=3)
    assert len(written) == 1
