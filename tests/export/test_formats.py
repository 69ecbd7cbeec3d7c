"""Each format, written, reloaded without visexpert in a process of its own, and compared with the model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from tests.export.helpers import WORDS, tiny_clip, tiny_llava, tiny_source
from visexpert.errors import ConfigError
from visexpert.export import FORMATS, ExportSource, differences, export, graphs
from visexpert.export.clip_folders import write_open_clip

FILES = {
    "hf": {"config.json", "model.safetensors", "preprocessor_config.json"},
    "open_clip": {"open_clip_config.json", "open_clip_model.safetensors"},
    "onnx": {"model.onnx"},
    "torch_export": {"model.pt2"},
    "llava": {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"},
    "visexpert": {"config.json", "mole.json", "model.safetensors", "preprocessor_config.json"},
}
REPORTS = {"README.md", "fidelity.md", "fidelity.json"}


def exported(source: ExportSource, name: str, out: Path) -> dict[str, Any]:
    export({name: source}, out)
    return checked(name, out)


def checked(name: str, out: Path) -> dict[str, Any]:
    names = {path.name for path in out.iterdir()}
    assert FILES[name] | REPORTS <= names
    facts = json.loads((out / "fidelity.json").read_text(encoding="utf-8"))
    assert isinstance(facts, dict)
    for entry in [*facts["layers"].values(), facts["pooled"]]:
        assert entry["relative"] < 1e-5 and entry["mean_abs"] <= entry["max_abs"]
        assert entry["min_cosine"] > 1 - 1e-9 and entry["mean_cosine"] <= 1 + 1e-9
    assert set(facts["layers"]) == {"-2", "-1"}
    assert facts["format"] == name and "visexpert" in facts["reload"]["not_importable"]
    assert not set(facts["reload"]["not_importable"]) & set(facts["reload"]["versions"])
    the_readme_runs(out)
    return facts


def the_readme_runs(out: Path) -> None:
    """Execute the code of a folder's README in that folder, beside a photo."""
    Image.new("RGB", (40, 30), "red").save(out / "photo.jpg")
    code = (out / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.chdir(out)
        exec(code, names)
    tokens = torch.as_tensor(names["ids"] if "ids" in names else names["tokens"])
    assert len(tokens) == 1 and bool(tokens.isfinite().all())


def told_of_projection(out: Path) -> bool:
    return all(
        "(`visual_projection`, to 10 dimensions) is not in this folder" in (text := (out / name).read_text("utf-8"))
        and "the run started from has it: org/clip" in text
        for name in ("README.md", "fidelity.md")
    )


@pytest.mark.usefixtures("read_afresh")
@pytest.mark.parametrize("name", ["hf", "open_clip"])
def test_a_library_loads_the_folder(name: str, tmp_path: Path) -> None:
    source = tiny_source(hidden_act="gelu" if name == "open_clip" else "quick_gelu")
    facts = exported(source, name, tmp_path / "out")
    assert facts["activation"]["quick_gelu"] is (name == "hf")
    assert set(facts["preprocessing"]["difference_in_levels_of_255"]) == {
        "photo_larger",
        "photo_smaller",
        "photo_noise",
    }
    assert facts["licenses"] == {"clip": "MIT", "expert depth": "CC-BY-NC-4.0"} and facts["pooled_trained"] is False
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| license of expert depth | CC-BY-NC-4.0 |" in card and "did not train the pooled output" in card
    assert told_of_projection(tmp_path / "out") and facts["projection"] == {"dim": 10, "source": "org/clip"}
    assert "| hidden state -2 |" in (tmp_path / "out" / "fidelity.md").read_text(encoding="utf-8")


def test_keys_are_those_that_transformers_4_reads_too(tmp_path: Path) -> None:
    source = tiny_source()
    FORMATS["hf"].write(source, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == {f"vision_model.{key}" for key in source.clip.model.state_dict()}
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["CLIPVisionModel"] and config["dtype"] == "float32"


@pytest.mark.usefixtures("read_afresh")
def test_graphs_run_any_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, source = ("onnx", "torch_export"), tiny_source()
    traced = graphs.trace(source)
    monkeypatch.setattr(graphs, "trace", lambda _: traced)
    export(dict.fromkeys(names, source), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    for name in names:
        facts = checked(name, tmp_path / "out" / name)
        assert told_of_projection(tmp_path / "out" / name)
        assert facts["patch_tokens"]["relative"] < 1e-5
        assert facts["reload"]["batch_sizes"] == [1, 2, 5] and "transformers" in facts["reload"]["not_importable"]
        assert ("torch" in facts["reload"]["versions"]) is (name == "torch_export")


@pytest.mark.usefixtures("read_afresh")
def test_llava_answers_as_the_prefix_lm_does(tmp_path: Path) -> None:
    facts = exported(tiny_llava(), "llava", tmp_path / "out")
    assert facts["logits"]["relative"] < 1e-5 and facts["pooled_trained"] is None
    assert facts["projection"] is None and "visual_projection" not in (tmp_path / "out" / "README.md").read_text(
        "utf-8"
    )
    # The tokenizer had no <image>: it got one, whose logit is the mean of the others and so never the highest.
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["image_token_index"] == len(WORDS) and config["vision_feature_layer"] == -2
    state = load_file(tmp_path / "out" / "model.safetensors")
    vision = {key for key in state if key.startswith("vision_tower.")}
    assert vision and all(key.startswith("vision_tower.vision_model.") for key in vision)
    head = state["language_model.lm_head.weight"]
    torch.testing.assert_close(head[-1], head[:-1].mean(0))


def test_what_a_format_has_no_place_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llava needs a prefix LM"):
        export({"llava": tiny_source()}, tmp_path / "out")
    with pytest.raises(ConfigError, match="no vision tower with hidden_act='relu'"):
        export({"open_clip": tiny_source(hidden_act="relu")}, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no tokens before the first block \(layer -4\)"):
        write_open_clip(ExportSource(tiny_clip(layer=-4), (-1,), None, {}), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("hf", torch.bfloat16), ("hf", torch.float16), ("open_clip", torch.bfloat16), ("llava", torch.bfloat16)],
)
def test_weights_are_rounded_and_what_that_changes_is_told(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = replace(tiny_llava() if name == "llava" else tiny_source(), dtype=dtype)
    own = {key: value.clone() for key, value in source.clip.model.state_dict().items()}
    facts = exported(source, name, tmp_path / "out")
    assert all(torch.equal(value, own[key]) for key, value in source.clip.model.state_dict().items())
    state = load_file(tmp_path / "out" / FILES_OF_WEIGHTS[name])
    assert {value.dtype for value in state.values()} == {dtype}
    ends = ("encoder.layers.0.mlp.fc1.weight", "visual.transformer.resblocks.0.mlp.c_fc.weight")
    (kept,) = [value for key, value in state.items() if key.endswith(ends)]
    assert torch.equal(kept, own["encoder.layers.0.mlp.fc1.weight"].to(dtype))
    told = str(dtype).removeprefix("torch.")
    if name != "open_clip":  # whose configuration has no place for it
        config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
        assert config["dtype"] == told
    assert facts["weights"] == told and f"| weights | {told} |" in (tmp_path / "out" / "README.md").read_text("utf-8")
    changed = [*facts["rounding"]["layers"].values(), *([facts["rounding"]["logits"]] if name == "llava" else [])]
    for entry in changed:
        assert 1e-4 < entry["relative"] < 1 and 0.5 < entry["min_cosine"] < 1 - 1e-8
    if name == "hf":
        by_hand = copy.deepcopy(source.clip)
        torch.nn.Module.to(by_hand, dtype).float()
        found = differences(source.clip, by_hand, (-2,))["layer_minus_2"]
        assert facts["rounding"]["layers"]["-2"]["relative"] == pytest.approx(found["relative"], rel=1e-3)
    text = (tmp_path / "out" / "fidelity.md").read_text("utf-8")
    assert "| rounded against float32 weights |" in text and text.count("| hidden state -2 |") == 2


FILES_OF_WEIGHTS = {"hf": "model.safetensors", "open_clip": "open_clip_model.safetensors", "llava": "model.safetensors"}


def test_a_language_model_in_bfloat16_stays_so_and_loses_nothing(tmp_path: Path) -> None:
    source = tiny_llava("bfloat16")
    facts = exported(source, "llava", tmp_path / "out")
    assert facts["logits"]["relative"] < 1e-5 and "rounding" not in facts
    state = load_file(tmp_path / "out" / "model.safetensors")
    kinds: dict[torch.dtype, set[str]] = {}
    for key, value in state.items():
        kinds.setdefault(value.dtype, set()).add(key.split(".")[0])
    assert kinds == {torch.bfloat16: {"language_model"}, torch.float32: {"vision_tower", "multi_modal_projector"}}
    assert facts["weights"].startswith("bfloat16 for the language model, as in the run, else float32")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert source.language is not None and source.language.side.model.dtype == torch.bfloat16


def test_what_cannot_be_rounded_is_refused(tmp_path: Path) -> None:
    for name in ("onnx", "torch_export", "visexpert"):
        with pytest.raises(ConfigError, match=rf"{name} stores float32 .* float16, .* hf, open_clip, llava"):
            export({name: replace(tiny_source(), dtype=torch.float16)}, tmp_path / "out")
    source = replace(tiny_source(), dtype=torch.float16)
    source.clip.model.get_parameter("post_layernorm.weight").data.fill_(7e4)
    with pytest.raises(ConfigError, match=r"7e\+04 is outside the range of float16"):
        export({"hf": source}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_format_has_a_test() -> None:
    assert {*FILES, "native"} == FORMATS.keys()  # native: test_native.py
