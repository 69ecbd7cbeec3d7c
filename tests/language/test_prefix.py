"""The prefix LM against a plain Hugging Face forward, and its weights from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.language.helpers import GRID, VOCAB, WIDTH, item, language_model, llama, one_item, vision
from visexpert.errors import ConfigError, WeightsError
from visexpert.language import PrefixLM, sincos_2d


def huggingface(**changes: Any) -> LlamaForCausalLM:
    fields = {name: value for name, value in {**llama(), **changes}.items() if name != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.eval()
    return model


def test_logits_equal_a_plain_forward_with_embeddings() -> None:
    side, images = language_model("prefix"), vision(1)
    assert isinstance(side, PrefixLM)
    ids, prompt = item(7, 3)
    reference = huggingface()
    reference.load_state_dict(side.model.state_dict())
    prefix_BTD = images.tokens_BTD + 0.7 * sincos_2d(GRID, WIDTH)
    embeds = torch.cat([prefix_BTD, reference.get_input_embeddings()(torch.tensor([ids]))], dim=1)
    logits_NV = reference(inputs_embeds=embeds).logits[0]
    first = GRID[0] * GRID[1] + prompt - 1  # the position that predicts the first answer token
    torch.testing.assert_close(side(images, one_item(ids, prompt)).logits_MV, logits_NV[first:-1], atol=1e-5, rtol=1e-5)


def test_no_position_code_unless_asked_for() -> None:
    """LLaVA has none."""
    side, images = PrefixLM(config=llama()).eval(), vision(1)
    ids, prompt = item(5, 2)
    embeds = torch.cat([images.tokens_BTD, side.model.get_input_embeddings()(torch.tensor([ids]))], dim=1)
    expected = side.model(inputs_embeds=embeds).logits[0, 6 + 1 : -1]
    torch.testing.assert_close(side(images, one_item(ids, prompt)).logits_MV, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_loads_what_save_pretrained_wrote(tmp_path: Path, tied: bool) -> None:
    reference = huggingface(tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path)
    side = PrefixLM(source=str(tmp_path)).eval()
    ids, prompt = item(6, 1)
    start = PrefixLM(config=llama()).eval()
    before = start(images := vision(1), one_item(ids, prompt)).logits_MV
    found = side(images, one_item(ids, prompt)).logits_MV
    assert side.weights_in_place  # read by the first call
    embeds = torch.cat([images.tokens_BTD, reference.get_input_embeddings()(torch.tensor([ids]))], dim=1)
    expected = reference(inputs_embeds=embeds).logits[0, 6:-1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, found)
    assert side.width == WIDTH


def test_start_weights_for_a_config_and_what_does_not_fit(tmp_path: Path) -> None:
    donor = PrefixLM(config=llama())
    save_file({key: value.contiguous() for key, value in donor.model.state_dict().items()}, tmp_path / "a.safetensors")
    side = PrefixLM(config=llama(), weights=str(tmp_path / "a.safetensors"))
    side.load_weights()
    assert all(torch.equal(value, donor.model.state_dict()[key]) for key, value in side.model.state_dict().items())
    wide = PrefixLM(config={**llama(), "intermediate_size": 48}, weights=str(tmp_path / "a.safetensors"))
    with pytest.raises(WeightsError, match=r"of another shape .*mlp.*\(16, 32\) instead of \(16, 48\)"):
        wide.load_weights()


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="either config .* or source"):
        PrefixLM()
    with pytest.raises(ConfigError, match="either config .* or source"):
        PrefixLM(config=llama(), source="somewhere")
    with pytest.raises(ConfigError, match="config needs a model_type, for example 'llama'"):
        PrefixLM(config={"vocab_size": VOCAB})
    with pytest.raises(ConfigError, match="model_type='lama' is unknown; did you mean .*'llama'"):
        PrefixLM(config={**llama(), "model_type": "lama"})
    with pytest.raises(WeightsError, match=r"no config.json in .*; .*save_pretrained"):
        PrefixLM(source=str(tmp_path))
