"""Write imported weights as a run's folder: configuration, checkpoint, language model, weights to train from."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig

from visexpert.callbacks.phase import write_checkpoint
from visexpert.commands.released import OWNER, MoLEShape, Released, absent_parts, language_tensors, weight_files
from visexpert.errors import WeightsError
from visexpert.io.run_files import write_json, write_text
from visexpert.io.run_folder import stamped
from visexpert.io.source import SMALL_FILES
from visexpert.io.weights import fill_module, write_weights
from visexpert.methods import Method
from visexpert.runs import build
from visexpert.vision.mole import MOLE_KEY
from visexpert.vision.published import describe_clip, vision_config

LANGUAGE = "language"
START = "start.safetensors"

_LEGACY = {"rope_theta", "rope_scaling", "torch_dtype"}
"""Names that transformers 4 wrote and 5 still reads."""


def write_run(
    released: Released, shape: MoLEShape | None, mole: dict[str, Any] | None, options: argparse.Namespace
) -> list[str]:
    """Write the run's folder, and return notes for the user.

    Raises:
        WeightsError: Weights are missing or do not fit the CLIP.
    """
    out: Path = options.out
    sizes = vision_config(describe_clip(options.clip).fields)
    layer = int(released.config.get("mm_vision_select_layer", -2))
    told: list[str] = []
    if shape is not None and mole is not None:
        depth, blocks = int(sizes.num_hidden_layers), list(shape.blocks)
        forms: dict[str | None, list[int]] = {None: list(range(depth + 1 + layer)), "all": list(range(depth))}
        mole["layers"] = next((form for form, named in forms.items() if named == blocks), blocks)
    out.mkdir(parents=True, exist_ok=True)
    try:
        told += _write(released, mole, layer, sizes, options)
    except BaseException:
        shutil.rmtree(out)  # it was new or empty
        raise
    return told


def _write(
    released: Released, mole: dict[str, Any] | None, layer: int, sizes: CLIPVisionConfig, options: argparse.Namespace
) -> list[str]:
    out: Path = options.out
    language = str(options.language)
    if released.has_language:
        copy_language(options.folder, out / LANGUAGE, released.config)
        language = str((out / LANGUAGE).resolve())
    config = run_config(mole, layer, options, language=language, image_size=int(str(sizes.image_size)))
    model = _filled(config, released, out)
    told = [_write_start(released, model, out / START)] if released.adapters else []
    write_text(out / "config.yaml", stamped(yaml.safe_dump(config, sort_keys=False)))
    write_checkpoint(model, out, steps=0)
    return told


def run_config(
    mole: Mapping[str, Any] | None, layer: int, options: argparse.Namespace, *, language: str, image_size: int
) -> dict[str, Any]:
    """Return the run's ``config.yaml`` with the release's settings.

    Args:
        mole: Settings of MoLE.
        layer: Hidden state of CLIP to read.
        options: Options of the command line.
        language: Folder or Hugging Face id of the language model.
        image_size: Side of CLIP's input, pixels.
    """
    text = {"source": language, "frozen": True, "dtype": options.dtype}
    template = {"class_path": "visexpert.language.LlavaTemplate", "init_args": {"style": options.chat}}
    clip = {"source": options.clip, "layer": layer, "mole": None if mole is None else dict(mole)}
    model = {
        "clip": {"class_path": "visexpert.vision.ClipEncoder", "init_args": clip},
        "experts": {},
        "language": {"class_path": "visexpert.language.PrefixLM", "init_args": text},
        "heads": {"alignment": "to_student", "adapter": "released"},
        "weighting": {
            "clip_teacher_weight": 0.8,
            "teachers": "attention",
            "tokens": "attention",
            "convention": "released",
        },
        "kd_weight": 0.5,
        "auxiliary": {"balance_weight": 0.01},
        "projector": {"kind": "mlp2x_gelu", "norm": False},
        "optimizer": {"lr": 2e-5, "clip_lr": 2e-5, "language_lr": 0.0},
    }
    data = {
        "root": options.data,
        "tokenizer": language,
        "template": template,
        "resize": "pad",
        "image_size": image_size,
    }
    return {
        "seed_everything": 0,
        "run": str(options.out),
        "model": {"class_path": "visexpert.methods.MoVEKD", "init_args": model},
        "data": {"class_path": "visexpert.data.LLaVAInstruct", "init_args": data},
    }


def copy_language(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Write the language model of a stage-2 folder to a folder of its own, part by part.

    Raises:
        WeightsError: ``config.json`` does not describe a Llama.
    """
    target.mkdir(parents=True)
    files = weight_files(source)
    places: dict[str, str] = {}
    for number, path in enumerate(files, start=1):
        tensors = {key: value.contiguous() for key, value in language_tensors(path).items()}
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        if tensors:
            write_weights(tensors, target / name)
            places |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": places}
    write_json(target / "model.safetensors.index.json", index)
    known = set(LlamaConfig().to_dict()) | _LEGACY
    fields = {
        key: value for key, value in config.items() if key in known and key not in ("model_type", "architectures")
    }
    if "hidden_size" not in fields:
        raise WeightsError(f"{OWNER}: {source / 'config.json'} does not describe a Llama; fetch the whole folder.")
    AutoConfig.for_model("llama", **fields).save_pretrained(target)
    for pattern in SMALL_FILES:
        for path in sorted(source.glob(pattern)):
            if "token" in path.name or path.name in ("vocab.json", "merges.txt", "added_tokens.json"):
                shutil.copyfile(path, target / path.name)


def _filled(config: Mapping[str, Any], released: Released, out: Path) -> Method:
    """Build a configuration's model with the imported weights; the language model stays in its own folder."""
    model, _ = build(config, out / "config.yaml")
    assert isinstance(model, Method)
    model.clip.load_weights()
    own = {} if released.has_clip else model.clip.model.state_dict()
    state = {key: value for key, value in own.items() if not MOLE_KEY.search(key)}
    student = {key: value for key, value in released.student.items() if not _is_unread(key, model)}
    fill_module(model.clip.model, state | student, owner=OWNER, path=out)
    fill_module(model.projector, released.projector, owner=OWNER, path=out)
    model.mark_loaded()
    return model


def _is_unread(key: str, model: Method) -> bool:
    """Return whether a key belongs to a MoLE layer that the model does not have."""
    return MOLE_KEY.search(key) is not None and key not in model.clip.model.state_dict()


def _write_start(released: Released, model: Method, path: Path) -> str:
    """Write student, projector and adapters to one file, under the names of a training with teachers; return a note."""
    width, tokens = model.clip.width, model.clip.grid_hw[0] * model.clip.grid_hw[1]
    state = {f"clip.model.{key}": value for key, value in model.clip.model.state_dict().items()}
    state |= {f"projector.{key}": value for key, value in model.projector.state_dict().items()}
    for teacher, adapter in released.adapters.items():
        if absent := absent_parts(adapter):
            raise WeightsError(f"{OWNER}: the adapter of {teacher} lacks {absent}; the files are not complete.")
        if (len(adapter["channels.bias"]), len(adapter["tokens.bias"])) != (width, tokens):
            raise WeightsError(
                f"{OWNER}: the adapter of {teacher} gives {len(adapter['tokens.bias'])} tokens of width "
                f"{len(adapter['channels.bias'])}, but this CLIP has {tokens} of {width}; name its own by --clip."
            )
        state |= {f"distillation.heads.{teacher}.adapter.{key}": value.float() for key, value in adapter.items()}
    write_weights(state, path)
    return (
        f"adapters of {', '.join(released.adapters)}: in {path.name}, for init_from of a training with these teachers."
    )
