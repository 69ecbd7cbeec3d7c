"""A language model beside its LoRA under the trainer: what moves, what a checkpoint holds, what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from tests.language.test_pretrained import LORA, saved
from tests.methods.helpers import CLIP_FIELDS, bare_trainer, noise_batch
from visexpert.language import PrefixLM
from visexpert.methods import ToVE, ToVEOptimizer
from visexpert.types import Batch
from visexpert.vision import ClipEncoder


class Noise(L.LightningDataModule):
    """The same two images and three texts, for ever."""

    def train_dataloader(self) -> Any:
        return DataLoader([noise_batch()] * 3, batch_size=None)  # type: ignore[arg-type]


def tove(folder: Path, **options: Any) -> ToVE:
    torch.manual_seed(0)
    clip = ClipEncoder(config=CLIP_FIELDS)
    language = PrefixLM(source=str(folder), **options)
    return ToVE(clip=clip, experts={}, language=language, optimizer=ToVEOptimizer(lr=0.1, language_lr=0.1))


@pytest.mark.parametrize("options", [{"lora": LORA, "image_newline": True}, {"frozen": True}])
def test_only_what_was_added_moves_and_is_saved(tmp_path: Path, options: dict[str, Any]) -> None:
    base = saved(tmp_path / "llama", vocab_size=96).state_dict()
    model = tove(tmp_path / "llama", **options)
    trainer = bare_trainer(tmp_path, steps=3)
    trainer.fit(model, datamodule=Noise())
    for name, value in model.language.get_submodule("model").state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")]), name
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    kept = {key for key in checkpoint["state_dict"] if key.startswith("language.")}
    assert all(".lora_" in key or "image_newline" in key for key in kept) and bool(kept) == ("lora" in options)
    if "lora" in options:
        moved = [p for name, p in model.language.named_parameters() if "lora_B" in name]
        assert moved and all(float(p.detach().abs().max()) > 0 for p in moved)
    again = tove(tmp_path / "llama", **options)
    again.load_weights()
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"], strict=True)
    batch: Batch = noise_batch(seed=3)
    assert batch.text is not None
    with torch.no_grad():
        found = again.eval().language(again.encode(batch), batch.text).logits_MV
        torch.testing.assert_close(found, model.eval().language(model.encode(batch), batch.text).logits_MV)
