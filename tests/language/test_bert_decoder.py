"""BERT and RoBERTa as decoders: equal to transformers' own forward, from encoder checkpoints, cached writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from tests.language.helpers import GRID, VOCAB, WIDTH, item, one_item, vision
from visexpert.data import pack
from visexpert.errors import ConfigError, DataError, WeightsError
from visexpert.language import BertDecoder, Decoding, sincos_2d
from visexpert.types import VisionTokens

FAMILIES = ("bert", "roberta")
FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 26,
    "pad_token_id": 1,
}
NEVER = 0


def decoder(family: str, **options: Any) -> BertDecoder:
    side = BertDecoder(config={**FIELDS, "model_type": family}, **options)
    for name, parameter in side.named_parameters():
        if "LayerNorm" not in name:
            nn.init.normal_(parameter, std=0.4)
    with torch.no_grad():
        side.model.get_output_embeddings().weight[NEVER] = 0.0
        side.model.get_output_embeddings().bias[NEVER] = -50.0
    return side.eval()


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str) -> None:
    side, images = decoder(family, position_scale=0.7), vision(1)
    ids, prompt = item(7, 3)
    memory = images.tokens_BTD + 0.7 * sincos_2d(GRID, WIDTH)
    wanted = side.model(input_ids=torch.tensor([ids]), encoder_hidden_states=memory).logits[0, prompt - 1 : -1]
    torch.testing.assert_close(side(images, one_item(ids, prompt)).logits_MV, wanted, atol=1e-5, rtol=1e-5)
    other = VisionTokens(images.tokens_BTD + 1.0, GRID)
    assert not torch.allclose(side(other, one_item(ids, prompt)).logits_MV, wanted, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_items_give_the_logits_of_one_item_per_row(family: str) -> None:
    side, images = decoder(family), vision(2)
    rows = [[item(5, 2), item(9, 4), item(4, 1)], [item(7, 3)]]
    owner = [image for image, items in enumerate(rows) for _ in items]
    apart = VisionTokens(images.tokens_BTD[owner], images.grid_hw)
    single_MV = side(apart, pack([[one] for items in rows for one in items], 0)).logits_MV
    torch.testing.assert_close(side(images, pack(rows, 0)).logits_MV, single_MV, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_writing_is_what_the_forward_says(family: str) -> None:
    side, images = decoder(family), vision(3)
    prompts = [item(length, length)[0] for length in (3, 6, 1)]
    written = side.generate(images, prompts, eos_id=NEVER, max_new_tokens=5)
    for index, (prompt, row) in enumerate(zip(prompts, written, strict=True)):
        alone = VisionTokens(images.tokens_BTD[index : index + 1], GRID)
        logits_MV = side(alone, one_item([*prompt, *row], len(prompt))).logits_MV
        assert len(row) == 5 and logits_MV.argmax(-1).tolist() == row


def test_beams_find_what_transformers_finds() -> None:
    side, images = decoder("bert"), vision(1)
    prompt = item(3, 3)[0]
    decoding = Decoding(strategy="beam", num_beams=3, max_new_tokens=4)
    wanted = side.model.generate(
        torch.tensor([prompt]),
        encoder_hidden_states=images.tokens_BTD,
        num_beams=3,
        max_new_tokens=4,
        do_sample=False,
        early_stopping="never",
        eos_token_id=NEVER,
        pad_token_id=NEVER,
        use_cache=False,
    )[0, 3:]
    assert side.generate(images, [prompt], eos_id=NEVER, decoding=decoding) == [wanted.tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_position(family: str) -> None:
    side, images = decoder(family), vision(1)
    most = 26 if family == "bert" else 24  # RoBERTa counts from behind its padding id, 1
    assert side.max_tokens == most
    assert len(side.generate(images, [item(most - 2, 1)[0]], eos_id=NEVER, max_new_tokens=9)[0]) == 2
    side(images, one_item(*item(most, 1)))
    with pytest.raises(DataError, match=f"item of {most + 1} tokens is longer than the {most} positions"):
        side(images, one_item(*item(most + 1, 1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_an_encoder(tmp_path: Path, family: str) -> None:
    """All weights of the encoder and its output layer are taken over; cross-attention is new."""
    made = BertForMaskedLM(BertConfig(**FIELDS)) if family == "bert" else RobertaForMaskedLM(RobertaConfig(**FIELDS))
    made.save_pretrained(tmp_path)
    side = BertDecoder(source=str(tmp_path))
    side.load_weights()
    state = side.model.state_dict()
    theirs = made.state_dict()
    assert {key for key in state if "crossattention" not in key} == set(theirs)
    assert all(torch.equal(state[key], theirs[key]) for key in theirs)
    assert any("crossattention" in key for key in state)
    side(vision(1), one_item(*item(5, 2)))
    side.model.save_pretrained(tmp_path / "decoder")
    again = BertDecoder(source=str(tmp_path / "decoder"))
    again.load_weights()
    assert all(torch.equal(value, state[key]) for key, value in again.model.state_dict().items())


def test_an_encoder_with_a_hole_is_refused(tmp_path: Path) -> None:
    made = BertForMaskedLM(BertConfig(**FIELDS))
    state = {key: value for key, value in made.state_dict().items() if "layer.1.attention.self.query" not in key}
    made.save_pretrained(tmp_path, state_dict=state)
    side = BertDecoder(source=str(tmp_path))
    with pytest.raises(WeightsError, match=r"missing \['bert.encoder.layer.1.attention.self.query.bias'"):
        side.load_weights()


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="model_type='llama' has no cross-attention; use one of bert, roberta"):
        BertDecoder(config={"model_type": "llama", "vocab_size": 8})


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_and_padded_images(family: str) -> None:
    side = decoder(family)
    tokens_BTD = vision(2).tokens_BTD.requires_grad_()
    see = VisionTokens(tokens_BTD, GRID, lengths=(4, 0))
    text = pack([[item(5, 1)], [item(5, 1)]], 0)
    logits_MV = side(see, text).logits_MV
    logits_MV.square().sum().backward()
    assert tokens_BTD.grad is not None and bool(tokens_BTD.grad.isfinite().all())
    assert (tokens_BTD.grad.abs().amax(-1) > 0).tolist() == [[True] * 4 + [False] * 2, [False] * 6]
    short = VisionTokens(tokens_BTD[:1, :4], (2, 2))
    first = pack([[(text.ids_BN[0].tolist(), 1)]], 0)
    torch.testing.assert_close(side(short, first).logits_MV, logits_MV[:4], atol=1e-5, rtol=1e-5)
