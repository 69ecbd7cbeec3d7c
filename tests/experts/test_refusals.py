"""What experts of transformers refuse, with the offending value, the allowed ones and a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, ViTImageProcessor

from tests.experts.tiny_models import DINOV2, saved
from visexpert.errors import ConfigError, WeightsError
from visexpert.experts import OpenClipExpert, TransformersExpert


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fields = {key: value for key, value in DINOV2.items() if key != "model_type"}
    return saved(AutoModel.from_config(AutoConfig.for_model("dinov2", **fields)), ViTImageProcessor(), tmp_path / "m")


def edit(path: Path, **changed: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    fields = json.loads(path.read_text(encoding="utf-8")) | changed
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}), encoding="utf-8")


def test_weights_of_another_shape_are_named_with_both_shapes(folder: Path) -> None:
    edit(folder / "config.json", patch_size=7)
    with pytest.raises(WeightsError, match=r"projection.weight \(16, 3, 14, 14\) instead of \(16, 3, 7, 7\)"):
        TransformersExpert(source=str(folder)).load_weights()


class Runs:
    def __reduce__(self) -> Any:
        return (print, ("ran",))


def test_a_pickle_is_named_as_what_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = folder / "model.safetensors"
    torch.save({**load_file(weights), "more": Runs()}, folder / "pytorch_model.bin")
    weights.unlink()
    expert = TransformersExpert(source=str(folder))
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin .*print.*safetensors") as caught:
        expert.load_weights()
    assert "weights_only" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_garbage_is_no_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"hello world")
    with pytest.raises(WeightsError, match="pytorch_model.bin .*fetch it again"):
        TransformersExpert(source=str(folder)).load_weights()


def test_a_folder_of_save_pretrained_without_a_processor_is_told_the_ways_out(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError) as caught:
        TransformersExpert(source=str(folder))
    for told in ("preprocessor_config.json", f"--local-dir {folder}", "processor: {image_processor_type: ViTImage"):
        assert told in str(caught.value)
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3]}
    expert = TransformersExpert(source=str(folder), processor=processor)
    expert.load_weights()
    torch.testing.assert_close(expert.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))


def test_a_missing_type_is_said_to_be_missing(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", image_processor_type=None)
    with pytest.raises(ConfigError, match=r"image_processor_type.*'image_mean'.*ViTImageProcessor"):
        TransformersExpert(source=str(folder))
    edit(folder / "config.json", model_type=None)
    with pytest.raises(ConfigError, match=r"model_type.*\['.*model_type: vit"):
        TransformersExpert(source=str(folder))


@pytest.mark.parametrize("layer", [5, -6])
def test_a_layer_that_is_none_is_told_with_the_range(layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"layer .*from -5 to 4, got {layer}"):  # four blocks and their input
        TransformersExpert(config=DINOV2, layer=layer)


def test_inputs_beside_pixels_are_named() -> None:
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 8}
    with pytest.raises(ConfigError, match="pixels .*grid_thw"):
        TransformersExpert(config={"model_type": "qwen2_vl", "vision_config": vision}, image_size=32)


def test_a_word_that_is_no_tag_is_told_the_tags() -> None:
    with pytest.raises(ConfigError, match="no weights 'nonsense' of ViT-B-32; its tags are .*'laion2b_s34b_b79k'"):
        OpenClipExpert(model="ViT-B-32", weights="nonsense")
