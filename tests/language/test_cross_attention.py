"""The cross-attention decoder's own matters: weights, position code, settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.language.helpers import VOCAB, item, one_item, vision
from visexpert.errors import ConfigError, WeightsError
from visexpert.language import CrossAttentionDecoder
from visexpert.types import VisionTokens


def decoder(**options: object) -> CrossAttentionDecoder:
    settings = {"vocab_size": VOCAB, "width": 16, "depth": 1, "heads": 2, **options}
    return CrossAttentionDecoder(**settings).eval()  # type: ignore[arg-type]


def test_without_a_position_code_the_image_is_a_set() -> None:
    images, text = vision(1), one_item(*item(5, 1))
    shuffled = VisionTokens(images.tokens_BTD[:, torch.tensor([3, 1, 5, 0, 2, 4])], images.grid_hw)
    blind = decoder(position_scale=0.0)
    torch.testing.assert_close(blind(images, text).logits_MV, blind(shuffled, text).logits_MV, atol=1e-6, rtol=1e-5)
    seeing = decoder(position_scale=0.7)
    assert (seeing(images, text).logits_MV - seeing(shuffled, text).logits_MV).abs().max() > 1e-6


def test_embedding_and_head_are_one_matrix_loaded_from_either_form_of_file(tmp_path: Path) -> None:
    donor = decoder()
    assert donor.head.weight is donor.embed_tokens.weight
    state = {key: value.clone() for key, value in donor.state_dict().items()}
    save_file(state, tmp_path / "full.safetensors")
    save_file({key: value for key, value in state.items() if key != "head.weight"}, tmp_path / "tied.safetensors")
    images, text = vision(1), one_item(*item(5, 1))
    for name in ("full", "tied"):
        loaded = decoder(source=str(tmp_path / f"{name}.safetensors"))
        assert not loaded.weights_in_place  # a call would read them
        loaded.load_weights()
        assert torch.equal(loaded(images, text).logits_MV, donor(images, text).logits_MV)
        assert loaded.head.weight is loaded.embed_tokens.weight


def test_weights_that_are_missing_or_no_safetensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights at .*absent.safetensors; check the path"):
        decoder(source=str(tmp_path / "absent.safetensors")).load_weights()
    torch.save({}, tmp_path / "pickle.safetensors")
    with pytest.raises(WeightsError, match="is not a readable safetensors file"):
        decoder(source=str(tmp_path / "pickle.safetensors")).load_weights()
    save_file({"embed_tokens.weight": torch.zeros(3, 16)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"missing \['blocks.*embed_tokens.weight \(3, 16\) instead of \(40, 16\)"):
        decoder(source=str(tmp_path / "other.safetensors")).load_weights()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="width 16 must be a multiple of heads 3"):
        decoder(heads=3)


def test_dropout_is_for_training_only() -> None:
    side = decoder(dropout=0.5)
    images, text = vision(1), one_item(*item(5, 1))
    assert torch.equal(side(images, text).logits_MV, side(images, text).logits_MV)
    side.train()
    assert not torch.equal(side(images, text).logits_MV, side(images, text).logits_MV)
