"""Text and image embeddings against the libraries' own, for whole models of transformers and open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from visexpert.errors import WeightsError
from visexpert.methods.alignment import text_alignment
from visexpert.vision import ClipEncoder, TransformersEncoder
from visexpert.vision.text_towers import text_tower_of

TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES: dict[str, Any] = {**TOWER, "image_size": 32, "patch_size": 8}
TEXTS = ["a red cube", "a blue ball and a red cube"]


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "a", "red", "cube", "blue", "ball", "and"]
    backend = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module", params=["clip", "siglip"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    text = {**TOWER, "vocab_size": 9, "max_position_embeddings": 12, "eos_token_id": 2, "pad_token_id": 0}
    model: Any
    if request.param == "clip":
        model = CLIPModel(CLIPConfig(vision_config=IMAGES, text_config=text, projection_dim=12))
    else:
        model = SiglipModel(SiglipConfig(vision_config=IMAGES, text_config=text))
    model.eval().save_pretrained(folder)
    prepared = {
        "image_processor_type": "SiglipImageProcessor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"height": 32, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return folder, model, tokenizer(folder)


def features(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found.pooler_output


@torch.no_grad()
def test_embeddings_equal_the_librarys_own(whole: tuple[Path, Any, Any]) -> None:
    folder, model, words = whole
    tower = text_tower_of(str(folder))
    assert tower is not None
    clip = isinstance(model, CLIPModel)
    padding = {} if clip else {"padding": "max_length", "max_length": 12}
    for text in TEXTS:
        ids = words([text], return_tensors="pt", **padding)["input_ids"]
        torch.testing.assert_close(tower([text]), features(model.get_text_features(input_ids=ids)))
    torch.testing.assert_close(tower(TEXTS)[:1], tower(TEXTS[:1]))
    encoder = ClipEncoder(source=str(folder)) if clip else TransformersEncoder(source=str(folder), layer=-1)
    images = torch.rand(2, 3, 32, 32)
    encoder.load_weights()
    own = features(model.get_image_features(pixel_values=encoder.preprocess(images)))
    torch.testing.assert_close(encoder.embed(images), own, atol=1e-5, rtol=1e-5)
    scores = text_alignment(encoder, tower, images, [[text] for text in TEXTS])
    assert scores["image_to_text/R@5"] == 1.0


def test_a_vision_tower_alone_has_no_text_tower(whole: tuple[Path, Any, Any], tmp_path: Path) -> None:
    _, model, _ = whole
    model.vision_model.config.save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert text_tower_of(str(tmp_path)) is None and text_tower_of(None) is None


def test_a_text_tower_without_its_weights_is_refused(whole: tuple[Path, Any, Any], tmp_path: Path) -> None:
    _, model, _ = whole
    model.config.save_pretrained(tmp_path)
    tokenizer(tmp_path)
    save_file(
        {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("text_model.encoder")},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(WeightsError, match=r"lacks .*text_model"):
        text_tower_of(str(tmp_path))


def test_a_tokenizer_that_does_not_go_with_the_tower_is_told_in_one_sentence(whole: tuple[Path, Any, Any]) -> None:
    tower: Any = text_tower_of(str(whole[0]))
    tower._tokenizer.pad_token = None
    with pytest.raises(WeightsError, match="cannot read texts"):
        tower(["a", "a b"])
