"""Training under plain DDP, two processes: every parameter that asks for a gradient gets one, every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.helpers import VOCAB, WIDTH, bare_trainer, merging_of, noise_batch, shake, tiny_tove
from tests.methods.movekd.helpers import PAPER, STAGE_1, tiny_movekd
from tests.two_processes import in_two_processes
from visexpert.language import BertDecoder, LanguageModel, LoRASettings, NoLanguage, PrefixLM
from visexpert.methods import MergeStudent, Method
from visexpert.transfer import GateSettings
from visexpert.types import Batch
from visexpert.vision import MoLESettings

STEPS = 4
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
BERT = {
    "model_type": "bert",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def merging(**options: Any) -> Method:
    space = options.pop("space", "language")
    return merging_of(teacher=shake(tiny_tove(fusion_space=space)), warmup_steps=2, **options)


def reading(language: LanguageModel, **options: Any) -> Method:
    model = tiny_tove(use=["edges"], **options)
    model.language = language
    return model


def llama(folder: Path, **options: Any) -> LanguageModel:
    """One whose weights are in files, as those of a frozen model must be."""
    return PrefixLM(source=str(folder / "llama"), **options)


KINDS: dict[str, Callable[[Path], Method]] = {
    "tove": lambda _: tiny_tove(),
    "tove, frozen language": lambda _: tiny_tove(language_lr=0.0),
    "tove, language joins": lambda _: shake(tiny_tove(language_frozen_steps=2)),
    "tove, one detached": lambda _: tiny_tove(detached=["depth"]),
    "tove, all detached": lambda _: tiny_tove(detached=["semantic", "depth", "edges"]),
    "tove, some used": lambda _: tiny_tove(use=["edges", "semantic"]),
    "tove, one used": lambda _: tiny_tove(use=["edges"]),
    "tove, none used": lambda _: tiny_tove(use=[]),
    "tove, uniform": lambda _: tiny_tove(gate=GateSettings(kind="uniform")),
    "tove, top 1": lambda _: tiny_tove(top_k=1, noise="learned"),
    "tove, no balance": lambda _: tiny_tove(balance_weight=0.0, noise="learned"),
    "tove, clip trains": lambda _: tiny_tove(clip_lr=1e-3),
    "tove, before the projector": lambda _: tiny_tove(fusion_space="clip", hidden=4),
    "tove, experts alone": lambda _: tiny_tove(transfer="replacement", gate=GateSettings(kind="uniform")),
    "tove, experts alone before the projector": lambda _: tiny_tove(
        transfer="replacement", gate=GateSettings(kind="uniform"), fusion_space="clip", clip_lr=1e-3
    ),
    "tove, one expert alone": lambda _: tiny_tove(transfer="replacement", use=["edges"]),
    "tove, blind": lambda _: tiny_tove(blind=True),
    "tove, llama": lambda _: reading(PrefixLM(config=LLAMA)),
    "tove, llama with LoRA": lambda folder: reading(llama(folder, lora=LoRASettings(rank=2))),
    "tove, frozen llama": lambda folder: reading(llama(folder, frozen=True)),
    "tove, bert": lambda _: reading(BertDecoder(config=BERT)),
    "tove, frozen bert": lambda _: reading(BertDecoder(config=BERT), language_lr=0.0),
    "movekd": lambda _: tiny_movekd(),
    "movekd, frozen language": lambda _: tiny_movekd(language_lr=0.0),
    "movekd, language joins": lambda _: tiny_movekd(language_frozen_steps=2, alignment="to_student"),
    "movekd, first stage": lambda _: tiny_movekd(**PAPER, **STAGE_1),
    "movekd, no balance": lambda _: tiny_movekd(balance_weight=0.0),
    "movekd, scaled router": lambda _: tiny_movekd(balance_weight=0.0, mole={"router": "scaled"}),
    "movekd, no distillation": lambda _: tiny_movekd(kd_weight=0.0),
    "movekd, no text": lambda _: tiny_movekd(lm_weight=0.0),
    "movekd, no language": lambda _: tiny_movekd(lm_weight=0.0, language=NoLanguage()),
    "movekd, fixed": lambda _: tiny_movekd(alignment="fixed", plain=True),
    "merging": lambda _: merging(),
    "merging, LoRA": lambda _: merging(adaptation="lora", space="clip"),
    "merging, MoLE": lambda _: merging(adaptation="none", student=MergeStudent(MoLESettings(num_experts=2, rank=2))),
    "merging, MoLE without balance": lambda _: merging(student=MergeStudent(MoLESettings(), balance_weight=0.0)),
    "merging, by text": lambda _: merging(token_weight=0.0, lm_weight=1.0, language_lr=1e-3),
    "merging, language without text": lambda _: merging(language_lr=1e-3),
}
"""What unlike settings leave without a gradient."""


@dataclass(frozen=True)
class Batches:
    """As many as a run wants; on both ranks the same, so that their mean is what one process has.

    Args:
        images: Whether samples have images.
    """

    images: bool = True

    def __iter__(self) -> Iterator[Batch]:
        for seed in range(STEPS):
            batch = noise_batch(seed=seed)
            yield batch if self.images else replace(batch, has_image_B=torch.zeros(2, dtype=torch.bool))


def trained(kind: str, folder: Path, *, images: bool = True, **options: Any) -> dict[str, Tensor]:
    """What a kind's training ends in, but for what is frozen."""
    torch.manual_seed(0)
    model = KINDS[kind](folder)
    bare_trainer(folder, steps=STEPS, use_distributed_sampler=False, **options).fit(model, Batches(images))
    frozen = tuple(f"{name}." for name in model.frozen_modules())
    return {key: value.clone() for key, value in model.state_dict().items() if not key.startswith(frozen)}


def train_all(rank: int, folder: Path) -> tuple[dict[str, str], dict[str, dict[str, Tensor]]]:
    """What went wrong, by kind; what came out of those that a test compares."""
    faults: dict[str, str] = {}
    ended: dict[str, dict[str, Tensor]] = {}
    for kind in KINDS:
        for images in (True, False) if kind in WITHOUT_IMAGES else (True,):
            try:
                state = trained(kind, folder, images=images, devices=2, strategy="ddp")
            except RuntimeError as error:
                faults[f"{kind}, images: {images}"] = str(error).splitlines()[0]
            else:
                ended |= {kind: state} if kind in COMPARED and images else {}
    return faults, ended


WITHOUT_IMAGES = ("tove", "tove, llama", "tove, top 1", "movekd", "merging")
COMPARED = ("tove, language joins", "movekd, language joins")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ddp")
    PrefixLM(config=LLAMA).plain_model().save_pretrained(folder / "llama")
    return in_two_processes(train_all, folder)[1]


def test_no_setting_leaves_a_parameter_unused(outcome: tuple[dict[str, str], Any]) -> None:
    assert outcome[0] == {}


@pytest.mark.parametrize("kind", COMPARED)
def test_a_language_model_that_joins_later_trains_as_in_one_process(
    tmp_path: Path, outcome: tuple[Any, dict[str, dict[str, Tensor]]], kind: str
) -> None:
    alone = trained(kind, tmp_path)
    assert outcome[1][kind].keys() == alone.keys()
    for key, value in alone.items():
        assert torch.allclose(outcome[1][kind][key], value, atol=1e-7), key
