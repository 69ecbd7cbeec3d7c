"""Load an export the way its users will, and run it: a separate program in a process that cannot import visexpert.

``python -I reload.py FORMAT FOLDER INPUTS OUTPUTS``: reads INPUTS (safetensors, with the layers in its
metadata), runs them in batches of several sizes and writes OUTPUTS. It refuses to import visexpert, except for the
format that only visexpert reads.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

BATCHES = (1, 2, 5)
"""Batch sizes of the inputs; a graph with a fixed batch size fails."""

FORBIDDEN = {
    "native": ("visexpert",),
    "hf": ("visexpert",),
    "open_clip": ("visexpert",),
    "onnx": ("visexpert", "transformers", "torch"),
    "torch_export": ("visexpert", "transformers"),
    "llava": ("visexpert",),
    "visexpert": (),
}
"""Packages that the process may not import, by format."""

Arrays = dict[str, Any]


class Forbid(MetaPathFinder):
    """Refuses packages before any other finder, wherever they are installed."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = frozenset(packages)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        """Raise for a refused package; leave others to the next finder."""
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"{name} is kept out of this process", name=name)


def forbid(packages: Sequence[str]) -> None:
    """Refuse packages from now on, and check that this works."""
    sys.meta_path.insert(0, Forbid(packages))
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            continue
        raise SystemExit(f"{package} was imported before it could be refused")


def batches(inputs: Arrays, name: str) -> Iterator[Any]:
    """Yield the rows of an input in batches of :data:`BATCHES`."""
    start = 0
    for size in BATCHES:
        yield inputs[name][start : start + size]
        start += size


def joined(runs: Sequence[Arrays]) -> Arrays:
    """Concatenate the outputs of all batches."""
    import numpy as np

    return {name: np.concatenate([np.asarray(run[name]) for run in runs]) for name in runs[0]}


def photos(inputs: Arrays) -> Iterator[tuple[str, Any]]:
    """Yield the images to preprocess: name of the result, PIL image."""
    from PIL import Image

    for name in sorted(inputs):
        if name.startswith("photo"):
            yield name, Image.fromarray(inputs[name])


def vision_outputs(output: Any, layers: dict[str, int]) -> Arrays:
    """Return hidden states and pooled output of a vision model."""
    hidden = {name: output.hidden_states[layer] for name, layer in layers.items()}
    pooled = getattr(output, "pooler_output", None)
    return hidden if pooled is None else hidden | {"pooled": pooled}


def run_native(folder: Path, inputs: Arrays, facts: Any) -> Arrays:
    """Run the library that the folder is for."""
    if (folder / "open_clip_config.json").is_file():
        return run_open_clip(folder, inputs, facts | {"before_projection": True})
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    run = run_timm if "architecture" in settings else run_transformers
    return run(folder, inputs, facts)


def run_timm(folder: Path, inputs: Arrays, facts: Any) -> Arrays:
    """Run a model of ``timm.create_model`` and its transform."""
    import timm
    import torch
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    network: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval()
    data = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    transform = create_transform(**data, is_training=False)
    given = {"norm": False, "output_fmt": "NLC", "intermediates_only": True, "return_prefix_tokens": True}

    def state(pixels: Any, layer: int) -> Any:
        (found,) = network.forward_intermediates(pixels, indices=[len(network.blocks) + layer], **given)
        return found if isinstance(found, torch.Tensor) else torch.cat([found[1], found[0]], dim=1)

    def run(pixels: Any) -> Arrays:
        pooled = network.forward_head(network.forward_features(pixels), pre_logits=True)
        hidden = {name: state(pixels, layer) for name, layer in facts["layers"].items()}
        return hidden | ({"pooled": pooled} if pooled.ndim == 2 else {})

    with torch.no_grad():
        outputs = joined([run(torch.from_numpy(pixels)) for pixels in batches(inputs, "pixel_values")])
    return outputs | {name: transform(image)[None].numpy() for name, image in photos(inputs)}


def run_transformers(folder: Path, inputs: Arrays, facts: Any) -> Arrays:
    """Run ``AutoModel`` or its vision part, and ``AutoImageProcessor``, loaded by path."""
    import inspect

    import torch
    from transformers import AutoImageProcessor, AutoModel

    whole: Any = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).float().eval()
    found = (getattr(whole, name, None) for name in ("vision_model", "vision_tower"))
    model = next((part for part in found if part is not None), whole)
    asked = inspect.signature(model.forward).parameters

    def given(pixels: Any) -> Arrays:
        if "spatial_shapes" in asked:  # SigLIP 2 takes patches
            return as_patches(pixels, int(model.config.patch_size))
        other = "interpolate_pos_encoding" in asked and pixels.shape[-1] != model.config.image_size
        return {"pixel_values": pixels} | ({"interpolate_pos_encoding": True} if other else {})

    with torch.no_grad():
        runs = [
            vision_outputs(model(**given(torch.from_numpy(pixels)), output_hidden_states=True), facts["layers"])
            for pixels in batches(inputs, "pixel_values")
        ]
    images = list(photos(inputs))
    processor: Any = (
        AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False) if images else None
    )
    return joined(runs) | {name: processor(images=image, return_tensors="np")["pixel_values"] for name, image in images}


def as_patches(pixels: Any, patch: int) -> Arrays:
    """Cut square images into the patches that SigLIP 2 takes."""
    import torch

    batch, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    cells = pixels.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": cells.reshape(batch, rows * columns, -1),
        "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[rows, columns]] * batch),
    }


def run_open_clip(folder: Path, inputs: Arrays, facts: Any) -> Arrays:
    """Run a model of ``open_clip.create_model``."""
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    visual = model.visual
    depth = len(visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks)
    blocks = {name: depth + layer for name, layer in facts["layers"].items()}
    if min(blocks.values()) < 0:
        raise SystemExit(f"open_clip returns no tokens before the first block, leave out layer {-depth - 1}")
    if "before_projection" in facts and hasattr(visual, "proj"):
        visual.proj = None

    def run(pixels: Any) -> Arrays:
        result = model.visual.forward_intermediates(
            torch.from_numpy(pixels), indices=list(range(depth)), output_fmt="NLC", output_extra_tokens=True
        )
        states = result["image_intermediates"]
        if "image_intermediates_prefix" in result:
            states = [torch.cat(pair, 1) for pair in zip(result["image_intermediates_prefix"], states, strict=True)]
        hidden = {name: states[block] for name, block in blocks.items()}
        return hidden | {"pooled": model.encode_image(torch.from_numpy(pixels))}

    with torch.no_grad():
        outputs = joined([run(pixels) for pixels in batches(inputs, "pixel_values")])
    return outputs | {name: transform(image)[None].numpy() for name, image in photos(inputs)}


def run_onnx(folder: Path, inputs: Arrays, facts: Any) -> Arrays:
    """Run onnxruntime on the CPU, without torch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    runs = [session.run(names, {"pixel_values": pixels}) for pixels in batches(inputs, "pixel_values")]
    return joined([dict(zip(names, run, strict=True)) for run in runs])


def run_torch_export(folder: Path, inputs: Arrays, facts: Any) -> Arrays:
    """Run the program of ``torch.export.load``, without transformers."""
    import torch

    module = torch.export.load(folder / "model.pt2").module()
    with torch.no_grad():
        return joined([module(torch.from_numpy(pixels)) for pixels in batches(inputs, "pixel_values")])


def run_llava(folder: Path, inputs: Arrays, facts: Any) -> Arrays:
    """Run ``LlavaForConditionalGeneration`` and ``AutoProcessor``, loaded by path; logits are of the text only."""
    import numpy as np
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    ).float()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    runs = []
    for pixels, ids in zip(batches(inputs, "pixel_values"), batches(inputs, "input_ids"), strict=True):
        pixels, ids = torch.from_numpy(pixels), torch.from_numpy(ids)
        with torch.no_grad():
            vision = model.model.vision_tower(pixels, output_hidden_states=True)
            logits = model(input_ids=ids, pixel_values=pixels).logits[:, facts["num_image_tokens"] : -1]
        runs.append(vision_outputs(vision, facts["layers"]) | {"logits": logits})
    processed: Arrays = {}
    for name, image in photos(inputs):
        made = processor(images=image, text=facts["text"], add_special_tokens=False, return_tensors="np")
        processed |= {name: made["pixel_values"], "input_ids": made["input_ids"]}
    prompt = processor.apply_chat_template(facts["conversation"], add_generation_prompt=True)
    made = processor(images=next(photos(inputs))[1], text=prompt, return_tensors="np")
    processed |= {"prompt": np.frombuffer(prompt.encode(), np.uint8), "prompt_ids": made["input_ids"][0]}
    return joined(runs) | processed


def run_visexpert(folder: Path, inputs: Arrays, facts: Any) -> Arrays:
    """Run ``ClipEncoder`` with MoLE."""
    import torch

    from visexpert.vision import ClipEncoder, MoLESettings

    settings = MoLESettings(**json.loads((folder / "mole.json").read_text(encoding="utf-8")))
    clip = ClipEncoder(source=str(folder), mole=settings).eval()
    clip.load_weights()
    with torch.no_grad():
        runs = [
            vision_outputs(clip.model(torch.from_numpy(pixels), output_hidden_states=True), facts["layers"])
            for pixels in batches(inputs, "pixel_values")
        ]
        unit = {name: torch.from_numpy(inputs[name]).permute(2, 0, 1)[None] / 255 for name, _ in photos(inputs)}
        return joined(runs) | {name: clip.preprocess(image).numpy() for name, image in unit.items()}


RUNS: dict[str, Callable[[Path, Arrays, Any], Arrays]] = {
    "native": run_native,
    "hf": run_transformers,
    "open_clip": run_open_clip,
    "onnx": run_onnx,
    "torch_export": run_torch_export,
    "llava": run_llava,
    "visexpert": run_visexpert,
}


def versions() -> dict[str, str]:
    """Return the versions of the imported libraries."""
    names = ("torch", "transformers", "timm", "open_clip", "onnxruntime", "numpy")
    found = {name: str(sys.modules[name].__version__) for name in names if name in sys.modules}
    return {"python": sys.version.split()[0], **found}


def main(format_name: str, folder: str, inputs: str, outputs: str) -> None:
    """Run an export and write its outputs."""
    forbid(FORBIDDEN[format_name])
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(inputs, "np") as file:
        facts = json.loads(file.metadata()["facts"])
    results = RUNS[format_name](Path(folder), load_file(inputs), facts)
    loaded = [name for name in FORBIDDEN[format_name] if name in sys.modules]
    if loaded:
        raise SystemExit(f"{loaded} were imported despite the ban")
    arrays = {name: np.ascontiguousarray(array) for name, array in results.items()}
    save_file(arrays, outputs, metadata={"versions": json.dumps(versions())})


if __name__ == "__main__":
    main(*sys.argv[1:])
