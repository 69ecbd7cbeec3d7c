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
    """Return hidden states and pooled output of a CLIPVisionModel."""
    return {**{name: output.hidden_states[layer] for name, layer in layers.items()}, "pooled": output.pooler_output}


def run_hf(folder: Path, inputs: Arrays, facts: Any) -> Arrays:
    """Run ``CLIPVisionModel`` and ``AutoImageProcessor``, loaded by path."""
    import torch
    from transformers import AutoImageProcessor, CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(folder, local_files_only=True).float()
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        runs = [
            vision_outputs(model(torch.from_numpy(pixels), output_hidden_states=True), facts["layers"])
            for pixels in batches(inputs, "pixel_values")
        ]
    processed = {name: processor(images=image, return_tensors="np")["pixel_values"] for name, image in photos(inputs)}
    return joined(runs) | processed


def run_open_clip(folder: Path, inputs: Arrays, facts: Any) -> Arrays:
    """Run a model of ``open_clip.create_model``."""
    import open_clip
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    depth = len(model.visual.transformer.resblocks)
    blocks = {name: depth + layer for name, layer in facts["layers"].items()}

    def run(pixels: Any) -> Arrays:
        result = model.visual.forward_intermediates(
            torch.from_numpy(pixels), indices=list(range(depth)), output_fmt="NLC", output_extra_tokens=True
        )
        pairs = zip(result["image_intermediates_prefix"], result["image_intermediates"], strict=True)
        states = [torch.cat(pair, 1) for pair in pairs]
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

    model = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True).float()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
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
    "hf": run_hf,
    "open_clip": run_open_clip,
    "onnx": run_onnx,
    "torch_export": run_torch_export,
    "llava": run_llava,
    "visexpert": run_visexpert,
}


def versions() -> dict[str, str]:
    """Return the versions of the imported libraries."""
    names = ("torch", "transformers", "open_clip", "onnxruntime", "numpy")
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
