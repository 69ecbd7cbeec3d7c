"""Exports of a run, read and run by the library that each format is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPVisionModel, LlavaForConditionalGeneration


def read_hf(folder: Path) -> None:
    clip = CLIPVisionModel.from_pretrained(folder).eval()
    side = clip.config.image_size
    with torch.no_grad():
        tokens_BTD = clip(torch.rand(1, 3, side, side)).last_hidden_state
    assert tokens_BTD.shape[1] == (side // clip.config.patch_size) ** 2 + 1 and tokens_BTD.isfinite().all()


def read_onnx(folder: Path) -> None:
    from onnxruntime import InferenceSession

    (path,) = folder.glob("*.onnx")
    session = InferenceSession(path)
    (given,) = session.get_inputs()
    side = int(given.shape[-1])
    outputs = session.run(None, {given.name: np.zeros((1, 3, side, side), dtype=np.float32)})
    assert all(np.isfinite(np.asarray(output)).all() for output in outputs)


def read_llava(folder: Path) -> None:
    """It is a LLaVA that transformers reads, and it writes."""
    processor: Any = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    opening = processor.tokenizer.bos_token
    image = Image.new("RGB", (40, 30), "green")
    given = processor(images=image, text=f"<image>{opening}what is it?", add_special_tokens=False, return_tensors="pt")
    num_image = int((given["input_ids"] == model.config.image_token_index).sum())
    assert num_image == (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    with torch.no_grad():
        ids_BN = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        first_V = model(**given).logits[0, -1]
    written = ids_BN[0, given["input_ids"].shape[1] :]
    assert len(written) == 4 and model.config.image_token_index not in written
    banned = model.generation_config.eos_token_id
    assert written[0] == first_V.index_fill(0, torch.tensor([banned]), -torch.inf).argmax()


READERS = {"hf": read_hf, "onnx": read_onnx, "llava": read_llava}
