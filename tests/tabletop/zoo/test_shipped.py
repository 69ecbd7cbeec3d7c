"""What ships: files, sizes, cards, and scores measured again on held-out scenes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionModel

from tests.tabletop.zoo.conftest import HELD_OUT
from visexpert.io.source import ZOO
from visexpert.io.weights import load_safetensors
from visexpert.tabletop.tiny import TinyExpert
from visexpert.tabletop.zoo.contrastive import NgramTextTower, recall_at_1
from visexpert.tabletop.zoo.dense import score_expert
from visexpert.tabletop.zoo.heads import AttributeTask, DenseTask, DepthTask, EdgeTask, NormalsTask, SegmentationTask
from visexpert.tabletop.zoo.ship import CARDS, PROBE_COLUMNS, card_text, encoder_facts
from visexpert.types import Batch
from visexpert.vision.clip import ClipEncoder

NAMES = list(encoder_facts())
TASKS: dict[str, DenseTask] = {
    "semantic": AttributeTask(),
    "semantic64": AttributeTask(),
    "depth": DepthTask(),
    "normals": NormalsTask(),
    "segmentation": SegmentationTask(),
    "edges": EdgeTask(),
}


def facts_of(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((CARDS / f"{name}.json").read_text(encoding="utf-8"))
    return facts


def test_all__encoders_present_and_at_most_8_megabytes() -> None:
    assert set(NAMES) == {*TASKS, "clip", "selfsup"}
    assert sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file()) <= 8e6


@pytest.mark.parametrize("name", NAMES)
def test_card__is_complete_and_written_from_its_facts(name: str) -> None:
    facts = facts_of(name)
    assert (CARDS / f"{name}.md").read_text(encoding="utf-8") == card_text(facts)
    for key in ("data", "steps", "license", "score_definition", "training_seconds", "recipe", "probes"):
        assert facts[key], key
    assert {"world", "train_split", "train_scenes", "seed", "held_out_split"} <= facts["data"].keys()
    assert facts["data"]["train_split"] != facts["data"]["held_out_split"]
    assert all(set(row) == set(PROBE_COLUMNS) for row in facts["probes"].values())
    assert {file: (ZOO / file).stat().st_size for file in facts["files"]} == facts["files"]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_expert__scores_what_its_card_says(name: str, held_out: list[Batch]) -> None:
    """Measured on the first 128 of the card's held-out scenes, so only sampling error may separate the two."""
    facts, task = facts_of(name), TASKS[name]
    expert = TinyExpert(source=f"zoo:{name}")
    expert.load_weights()
    chunks = torch.tensor([score_expert(expert, task, [batch])[task.headline] for batch in held_out])
    error = float(chunks.std()) / math.sqrt(len(chunks))
    assert score_expert(expert, task, held_out)[task.headline] == pytest.approx(facts["score"], abs=4 * error)


def test_clip__equals_transformers_on_hidden_states() -> None:
    reference = CLIPVisionModel.from_pretrained(ZOO / "clip").eval()
    assert reference.dtype == torch.float32
    images = torch.rand(3, 3, 64, 64)
    for layer in (-1, -2):
        clip = ClipEncoder(source="zoo:clip", layer=layer).eval()
        clip.load_weights()
        hidden_BND = reference(clip.preprocess(images), output_hidden_states=True).hidden_states[layer]
        tokens = clip(images)
        torch.testing.assert_close(tokens.tokens_BTD, hidden_BND[:, 1:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tokens.cls_BD, hidden_BND[:, 0], rtol=1e-4, atol=1e-4)


def test_clip__retrieves_captions_from_the_shipped_files(zoo_data: Any) -> None:
    """Both towers are built from the files alone; recall@1 among 100 must agree with the card (binomial error)."""
    zoo_data.setup("validate")
    state = load_safetensors(ZOO / "clip_text.safetensors", owner="test")
    vocabulary, width = state["text.embedding.weight"].shape
    embed_dim, hidden = state["text.projection.weight"].shape
    text = NgramTextTower(vocabulary=vocabulary, width=width, hidden=hidden, embed_dim=embed_dim)
    text.load_state_dict({key[5:]: value.float() for key, value in state.items() if key.startswith("text.")})
    clip = ClipEncoder(source="zoo:clip", layer=-1).eval()
    clip.load_weights()
    images, texts = [], []
    for batch in zoo_data.val_dataloader():
        pooled_BD = clip.model.post_layernorm(clip(batch.images_BCHW.float() / 255).cls_BD)
        images.append(F.normalize(pooled_BD @ state["projection.weight"].float().T, dim=-1))
        assert batch.text is not None
        texts.append(F.normalize(text(batch.text.ids_BN, batch.text.segments_BN), dim=-1))
    recall = recall_at_1(torch.cat(images), torch.cat(texts), gallery=100)
    card = facts_of("clip")["score"]
    assert HELD_OUT >= 100
    assert recall == pytest.approx(card, abs=4 * math.sqrt(card * (100 - card) / 100))


def test_recall__by_hand() -> None:
    images_ND = torch.eye(4)
    assert recall_at_1(images_ND, images_ND, gallery=4) == 100
    assert recall_at_1(images_ND, images_ND.roll(1, 0), gallery=4) == 0
    assert recall_at_1(images_ND, images_ND[[0, 1, 3, 2]], gallery=2) == 50


def test_clip_knows_colours_and_not_depth() -> None:
    """The premise of the whole comparison: CLIP is semantic, the experts see what it does not."""
    probes = {name: facts_of(name)["probes"] for name in NAMES}
    clip = probes["clip"]["clip, layer -2"]
    assert clip["colour"] > 75
    assert probes["depth"]["depth"]["object_depth"] > clip["object_depth"] + 30
    assert probes["normals"]["normals"]["normals"] > clip["normals"] + 10
    assert probes["semantic"]["semantic"]["shape"] > clip["shape"] + 10
