"""A language model packed among images, against the rows that its own library reads one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visexpert.commands.trial.attempt import Comparison
from visexpert.data import pack
from visexpert.experts.huggingface import quiet
from visexpert.io.source import ModelSource
from visexpert.language import BertDecoder, PrefixLM
from visexpert.types import VisionTokens

GRID = (2, 2)
LENGTHS = (7, 5)
PROMPT = 2
NEW_TOKENS = 5

Side = PrefixLM | BertDecoder


class Probe:
    """Two texts in one row, behind an image or without one, and what our side makes of them.

    Args:
        side: The language model, weights loaded.
    """

    def __init__(self, side: Side) -> None:
        settings = side.settings.get_text_config(decoder=True)
        generator = torch.Generator().manual_seed(0)
        special = {
            value
            for config in (side.settings, settings)
            for name, value in config.to_dict().items()
            if name.endswith(("token_id", "token_index")) and isinstance(value, int)
        }
        words = torch.tensor([word for word in range(int(settings.vocab_size)) if word not in special][:20_000])
        drawn = words[torch.randint(len(words), (sum(LENGTHS),), generator=generator)].tolist()
        self.eos = int(words[-1])
        self.items = [drawn[: LENGTHS[0]], drawn[LENGTHS[0] :]]
        self.text = pack([[(ids, PROMPT) for ids in self.items]], 0)
        spread = side.model.get_input_embeddings().weight.float().std()
        self.image_TD = torch.randn(GRID[0] * GRID[1], side.width, generator=generator) * spread
        with torch.no_grad():
            self.ours = {seen: side(self.vision(seen), self.text).logits_MV for seen in (False, True)}
        written = side.generate(self.vision(False), [self.items[0]], eos_id=self.eos, max_new_tokens=NEW_TOKENS)
        self.written = written[0]

    def vision(self, seen: bool) -> VisionTokens:
        """The image, or that there is none."""
        return VisionTokens(self.image_TD[None], GRID, lengths=None if seen else (0,))

    def predicting(self, logits_LV: Tensor, length: int, *, before: int) -> Tensor:
        """Logits of one item's supervised tokens in a row of the library's."""
        return logits_LV[before + PROMPT - 1 : before + length - 1].float()


def compare_language(side: Side, probe: Probe, model: Any) -> tuple[Comparison, ...]:
    """Logits of both texts, each in a row of its own, and a greedy answer.

    Args:
        side: Ours.
        probe: What it made of the texts.
        model: The library's own.
    """
    rows = prefix_rows if isinstance(side, PrefixLM) else decoder_rows
    dtype = next(model.parameters()).dtype
    found = []
    for seen, ours in probe.ours.items():
        theirs = torch.cat(rows(model, probe, seen)).to(dtype)
        what = "logits, two packed texts behind an image" if seen else "logits, two packed texts"
        found.append(Comparison.of(what, f"transformers: {type(model).__name__}, one text a row", ours, theirs))
    if isinstance(side, PrefixLM):
        found.append(compare_writing(probe, model))
    return tuple(found)


@torch.no_grad()
def prefix_rows(model: Any, probe: Probe, seen: bool) -> list[Tensor]:
    """Logits of each text by the library, from token ids, or from embeddings behind the image's."""
    image_TD = probe.image_TD
    found = []
    for ids in probe.items:
        row = torch.tensor([ids])
        if not seen:
            found.append(probe.predicting(model(input_ids=row).logits[0], len(ids), before=0))
            continue
        words_1LD = model.get_input_embeddings()(row)
        embeds = torch.cat([image_TD[None].to(words_1LD.dtype), words_1LD], dim=1)
        found.append(probe.predicting(model(inputs_embeds=embeds).logits[0], len(ids), before=len(image_TD)))
    return found


@torch.no_grad()
def decoder_rows(model: Any, probe: Probe, seen: bool) -> list[Tensor]:
    """Logits of each text by BERT's own forward, which attends to the image, or to zeros where there is none."""
    memory = probe.image_TD[None].to(model.dtype) * seen
    return [
        probe.predicting(
            model(input_ids=torch.tensor([ids]), encoder_hidden_states=memory).logits[0], len(ids), before=0
        )
        for ids in probe.items
    ]


def compare_writing(probe: Probe, model: Any) -> Comparison:
    """A greedy answer, token by token."""
    prompt = torch.tensor([probe.items[0]])
    with torch.no_grad(), quiet():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=1,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=probe.eos,
            pad_token_id=probe.eos,
        )
    ours, theirs = probe.written, _until(out[0, prompt.shape[1] :].tolist(), probe.eos)
    rows = [torch.nn.functional.pad(torch.tensor(ids), (0, NEW_TOKENS - len(ids)), value=-1) for ids in (ours, theirs)]
    what = f"ids of a greedy answer ({len(theirs)} tokens)"
    return Comparison.of(what, f"transformers: {type(model).__name__}.generate", rows[0].float(), rows[1].float())


def _until(ids: Sequence[int], eos: int) -> list[int]:
    return list(ids[: ids.index(eos)] if eos in ids else ids)


def of_transformers(side: Side) -> Any:
    """The library's own model, loaded by itself in place of ours.

    A BertDecoder's own model stays: its cross-attention is fresh, in no file that could be read again.
    """
    import transformers

    if isinstance(side, BertDecoder):
        return side.model
    folder = ModelSource.parse(str(side.source)).folder("config.json", owner="visexpert try")
    dtype = next(side.model.parameters()).dtype
    side.model = None  # one copy in memory at a time
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    auto: Any = transformers.AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        auto = transformers.AutoModelForImageTextToText
    with quiet():
        model = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, dtype=dtype)
    return model.eval()
