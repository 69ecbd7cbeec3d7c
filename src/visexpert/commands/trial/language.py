"""Compare a language model on packed texts with its own library, which reads one text per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visexpert.commands.trial.attempt import Comparison
from visexpert.data import pack
from visexpert.io.source import ModelSource
from visexpert.language import BertDecoder, PrefixLM
from visexpert.networks.huggingface import quiet
from visexpert.types import VisionTokens

GRID = (2, 2)
LENGTHS = (7, 5)
PROMPT = 2
NEW_TOKENS = 5

LanguageModel = PrefixLM | BertDecoder


class Probe:
    """Two texts packed into one row, with and without an image, and our model's output for them.

    Args:
        model: Language model with its weights loaded.
    """

    def __init__(self, model: LanguageModel) -> None:
        settings = model.settings.get_text_config(decoder=True)
        generator = torch.Generator().manual_seed(0)
        special = {
            value
            for config in (model.settings, settings)
            for name, value in config.to_dict().items()
            if name.endswith(("token_id", "token_index")) and isinstance(value, int)
        }
        words = torch.tensor([word for word in range(int(settings.vocab_size)) if word not in special][:20_000])
        drawn = words[torch.randint(len(words), (sum(LENGTHS),), generator=generator)].tolist()
        self.eos = int(words[-1])
        self.items = [drawn[: LENGTHS[0]], drawn[LENGTHS[0] :]]
        self.text = pack([[(ids, PROMPT) for ids in self.items]], 0)
        spread = model.model.get_input_embeddings().weight.float().std()
        self.image_TD = torch.randn(GRID[0] * GRID[1], model.width, generator=generator) * spread
        with torch.no_grad():
            self.ours = {seen: model(self.vision(seen), self.text).logits_MV for seen in (False, True)}
        answers = model.generate(self.vision(False), [self.items[0]], eos_id=self.eos, max_new_tokens=NEW_TOKENS)
        self.answer = answers[0]

    def vision(self, seen: bool) -> VisionTokens:
        """Return the image's tokens, or tokens of length 0."""
        return VisionTokens(self.image_TD[None], GRID, lengths=None if seen else (0,))

    def predicting(self, logits_LV: Tensor, length: int, *, before: int) -> Tensor:
        """Return the logits that predict one text's supervised tokens, from a row of the library's.

        Args:
            logits_LV: Logits of the row.
            length: Tokens of the text.
            before: Tokens of the image in front of it.
        """
        return logits_LV[before + PROMPT - 1 : before + length - 1].float()


def compare_language(ours: LanguageModel, probe: Probe, theirs: Any) -> tuple[Comparison, ...]:
    """Compare the logits of both texts, each in a row of its own, and a greedy answer.

    Args:
        ours: Our model.
        probe: The texts, and our model's output for them.
        theirs: The library's model.
    """
    rows = prefix_rows if isinstance(ours, PrefixLM) else decoder_rows
    dtype = next(theirs.parameters()).dtype
    found = []
    for seen, our_logits in probe.ours.items():
        their_logits = torch.cat(rows(theirs, probe, seen)).to(dtype)
        what = "logits, two packed texts behind an image" if seen else "logits, two packed texts"
        found.append(
            Comparison.of(what, f"transformers: {type(theirs).__name__}, one text per row", our_logits, their_logits)
        )
    if isinstance(ours, PrefixLM):
        found.append(compare_answer(probe, theirs))
    return tuple(found)


@torch.no_grad()
def prefix_rows(model: Any, probe: Probe, seen: bool) -> list[Tensor]:
    """Return the library's logits of each text: from token ids, or from embeddings that follow the image's."""
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
    """Return the logits of each text from BERT's own forward, which attends to the image, or to zeros without one."""
    memory = probe.image_TD[None].to(model.dtype) * seen
    return [
        probe.predicting(
            model(input_ids=torch.tensor([ids]), encoder_hidden_states=memory).logits[0], len(ids), before=0
        )
        for ids in probe.items
    ]


def compare_answer(probe: Probe, model: Any) -> Comparison:
    """Compare a greedy answer token by token."""
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
    ours, theirs = probe.answer, _until(out[0, prompt.shape[1] :].tolist(), probe.eos)
    rows = [torch.nn.functional.pad(torch.tensor(ids), (0, NEW_TOKENS - len(ids)), value=-1) for ids in (ours, theirs)]
    what = f"ids of a greedy answer ({len(theirs)} tokens)"
    return Comparison.of(what, f"transformers: {type(model).__name__}.generate", rows[0].float(), rows[1].float())


def _until(ids: Sequence[int], eos: int) -> list[int]:
    return list(ids[: ids.index(eos)] if eos in ids else ids)


def of_transformers(ours: LanguageModel) -> Any:
    """Load the library's model, and free ours.

    A BertDecoder's model is returned as it is: its cross-attention is new, so no file holds it.
    """
    import transformers

    if isinstance(ours, BertDecoder):
        return ours.model
    folder = ModelSource.parse(str(ours.source)).folder("config.json", owner="visexpert try")
    dtype = next(ours.model.parameters()).dtype
    ours.model = None  # one copy in memory at a time
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    auto: Any = transformers.AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        auto = transformers.AutoModelForImageTextToText
    with quiet():
        model = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, dtype=dtype)
    return model.eval()
