"""A ``LlavaForConditionalGeneration`` folder: tower, projector, language model, tokenizer, processor and its prompt."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, processors
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from visexpert.errors import ConfigError, WeightsError
from visexpert.export.clip_folders import quiet
from visexpert.export.rounding import stored
from visexpert.export.source import ExportSource, LanguageParts
from visexpert.types import IMAGE_TOKEN, TextEncoder
from visexpert.vision.saving import PREFIX, squashing_processor, tower_config

IMAGE_TEXT = "<image>"
TOWER = "vision_tower."

QUESTION = "What is in this picture?"
"""The question for the processor, also shown in the README."""

CONVERSATION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]

LLAVA_USAGE = """\
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor, model = AutoProcessor.from_pretrained(FOLDER), LlavaForConditionalGeneration.from_pretrained(FOLDER)
content = [{{"type": "image"}}, {{"type": "text", "text": "{question}"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(images=image, text=prompt, add_special_tokens=False, return_tensors="pt")
ids = model.generate(**inputs, do_sample=False, max_new_tokens=32)[:, inputs["input_ids"].shape[1] :]
answer = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()"""


def write_llava(source: ExportSource, folder: Path) -> None:
    """Write model, tokenizer and processor.

    Raises:
        ConfigError: There is no language model, or LLaVA cannot hold it.
    """
    if source.language is None:
        raise ConfigError("The format llava needs a prefix LM as language model; this run has none.")
    tokenizer, image_id = tokenizer_with_image(source.language.tokenizer)
    model = _assemble(source, source.language, image_id)
    _pad_vocabulary(
        model, known=source.language.model.get_input_embeddings().get_parameter("weight").shape[0], image_id=image_id
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    model.generation_config.eos_token_id = source.language.encoder.eos_id
    processor = processor_of(source, tokenizer)
    _store_in(model, source.dtype, language=source.language.model.dtype)
    with quiet():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    _restore_prefix(folder)


def _store_in(model: LlavaForConditionalGeneration, dtype: torch.dtype | None, *, language: torch.dtype) -> None:
    """Round all weights; for None, keep the language model's in the run's own dtype.

    The configuration names one dtype for all: the wider one, so that loading loses nothing.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = stored(parameter.data, dtype)
    if dtype is None:
        model.model.language_model.to(language)
        model.lm_head.to(language)
    whole: Any = model.config
    for config in (whole, whole.text_config, whole.vision_config):
        config.dtype = dtype or torch.float32


def processor_of(source: ExportSource, tokenizer: Any) -> LlavaProcessor:
    """Return the processor; the prompt of training is its chat template and its tokenizer's.

    Args:
        source: What is exported, with a language model.
        tokenizer: A copy of its tokenizer with ``<image>``; changed in place.
    """
    assert source.language is not None
    tokenizer.chat_template = source.language.encoder.chat_template
    return LlavaProcessor(
        image_processor=squashing_processor(source.clip.preprocessing),
        tokenizer=writes_no_frame(tokenizer),
        chat_template=tokenizer.chat_template,
        patch_size=source.clip.patch_size,
        vision_feature_select_strategy=_selected(source),
        image_token=IMAGE_TEXT,
        num_additional_image_tokens=source.clip.prefix,
    )


def _selected(source: ExportSource) -> Literal["default", "full"]:
    """Return which of the tower's tokens LLaVA reads: all but [CLS], or all where there is none (SigLIP)."""
    return "default" if source.clip.has_cls else "full"


def _restore_prefix(folder: Path) -> None:
    """Rename the keys of the vision tower to those that ``transformers`` 4 and 5 read (see ``PREFIX``)."""

    def renamed(key: str) -> str:
        bare = key.removeprefix(TOWER)
        return key if bare == key or bare.startswith(PREFIX) else TOWER + PREFIX + bare

    for path in folder.glob("*.safetensors"):
        state = {renamed(key): value for key, value in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {renamed(key): file for key, file in index["weight_map"].items()}
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def tokenizer_with_image(tokenizer: Any) -> tuple[Any, int]:
    """Return a copy of a tokenizer with the token ``<image>``, and the id of that token."""
    tokenizer = copy.deepcopy(tokenizer)
    if IMAGE_TEXT not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TEXT, special=True, normalized=False)], special_tokens=True)
    return tokenizer, int(tokenizer.convert_tokens_to_ids(IMAGE_TEXT))


@dataclass(frozen=True)
class CheckText:
    """A text of random words after an image.

    Args:
        prompt: Input of a processor: ``<image>``, the token that opens a text, words.
        image_id: Id of ``<image>``.
        ids: Token ids of all but ``<image>``, by the run's tokenizer.
    """

    prompt: str
    image_id: int
    ids: tuple[int, ...]


def check_text(tokenizer: Any) -> CheckText:
    """Return the text to run an export on; always the same one for a tokenizer."""
    tokenizer, image_id = tokenizer_with_image(tokenizer)
    special = {*tokenizer.all_special_ids, image_id}
    words = [index for index in sorted(tokenizer.get_vocab().values()) if index not in special]
    picks = torch.randint(len(words), (8,), generator=torch.Generator().manual_seed(0)).tolist()
    text = opening_token(tokenizer) + tokenizer.decode([words[pick] for pick in picks])
    return CheckText(IMAGE_TEXT + text, image_id, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))


def opening_token(tokenizer: Any) -> str:
    """Return the token that opens a text in training: ``<bos>``, or ``<eos>`` if there is none."""
    return str(tokenizer.bos_token or tokenizer.eos_token)


def _assemble(source: ExportSource, parts: LanguageParts, image_id: int) -> LlavaForConditionalGeneration:
    check_language(parts.model)
    head = parts.model.get_output_embeddings()
    config = LlavaConfig(
        vision_config=tower_config(source.clip.model, None if source.projection is None else source.projection.dim),
        text_config=copy.deepcopy(parts.model.config),
        image_token_index=image_id,
        image_seq_length=source.clip.grid_hw[0] * source.clip.grid_hw[1],
        projector_hidden_act="gelu",
        vision_feature_layer=source.clip.layer,
        vision_feature_select_strategy=_selected(source),
        multimodal_projector_bias=True,
        tie_word_embeddings=bool(parts.model.config.tie_word_embeddings),
    )
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(source.clip.model.state_dict(), strict=True)
    model.model.language_model.load_state_dict(parts.model.base_model.state_dict(), strict=True)
    model.model.multi_modal_projector.linear_1.load_state_dict(parts.linear_1.state_dict(), strict=True)
    model.model.multi_modal_projector.linear_2.load_state_dict(parts.linear_2.state_dict(), strict=True)
    model.lm_head.load_state_dict(head.state_dict(), strict=True)
    return model


def check_language(model: PreTrainedModel) -> None:
    """Check that LLaVA's format can hold a language model.

    Args:
        model: A causal language model of transformers, with or without weights.

    Raises:
        ConfigError: Its output layer has a bias, its logits are capped or scaled, or its parts have other names.
    """
    text = model.config.get_text_config(decoder=True)
    scales = {name: getattr(text, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")}
    scaled = [f"{name}: {value}" for name, value in scales.items() if value is not None and value != 1]
    problems = {
        "the bias of the output layer": getattr(model.get_output_embeddings(), "bias", None) is not None,
        ", ".join(scaled): bool(scaled),
        "embeddings that are not called embed_tokens": getattr(model.base_model, "embed_tokens", None) is None,
    }
    for problem, found in problems.items():
        if found:
            raise ConfigError(
                f"LLaVA cannot hold {problem} of {type(model).__name__}; use another language model, such as "
                "llama, mistral or qwen2, or the format hf."
            )


@torch.no_grad()
def _pad_vocabulary(model: LlavaForConditionalGeneration, *, known: int, image_id: int) -> None:
    """Add a row for the image token: the mean of all rows, which never has the highest logit."""
    if image_id < known:
        return
    model.resize_token_embeddings(image_id + 1, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = layer.get_parameter("weight")
        weight[known:] = weight[:known].mean(0)


@dataclass(frozen=True)
class PromptCheck:
    """A question as the exported processor and training frame it.

    Args:
        text: The prompt, equal in both.
        trained_ids: Token ids that the run's model reads, without the image.
        folder_ids: Token ids that the exported processor gives, without the image.
    """

    text: str
    trained_ids: tuple[int, ...]
    folder_ids: tuple[int, ...]

    def facts(self) -> dict[str, Any]:
        """Return the entries for ``fidelity.json``."""
        return {
            "question": QUESTION,
            "text": self.text,
            "ids_equal": self.trained_ids == self.folder_ids,
            "trained_ids": list(self.trained_ids),
            "folder_ids": list(self.folder_ids),
        }


def check_prompt(encoder: TextEncoder, text: str, ids: Sequence[int], *, image_id: int) -> PromptCheck:
    """Compare the prompt of a reloaded processor with the run's.

    Args:
        encoder: Frames the run's texts.
        text: What the processor wrote for :data:`CONVERSATION`.
        ids: Its token ids, including those of the image.
        image_id: Id of ``<image>`` in the export.

    Raises:
        WeightsError: The texts differ.
    """
    expected = encoder.prompt_text(QUESTION)
    if text != expected:
        raise WeightsError(
            f"The llava export's processor writes the prompt {text!r}, but the run was trained on {expected!r}; "
            "nothing was written."
        )
    trained = tuple(token for token in encoder.prompt(QUESTION) if token != IMAGE_TOKEN)
    return PromptCheck(text, trained, tuple(int(token) for token in ids if token != image_id))


def writes_no_frame(tokenizer: Any) -> Any:
    """Stop a tokenizer (in place) from adding special tokens: the chat template writes all of them."""
    if tokenizer.num_special_tokens_to_add():
        for name in ("add_bos_token", "add_eos_token"):
            if getattr(tokenizer, name, None):
                setattr(tokenizer, name, False)
            if name in tokenizer.init_kwargs:
                tokenizer.init_kwargs[name] = False
        nothing = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        tokenizer.backend_tokenizer.post_processor = nothing
    return tokenizer


def prompt_lines(facts: dict[str, Any], tokenizer: Any) -> list[str]:
    """Return the section on the prompt in ``README.md``."""
    lines = ["The prompt of training:", "", "```text", facts["text"], "```", ""]
    if facts["ids_equal"]:
        return lines
    trained, folder = (tokenizer.convert_ids_to_tokens(facts[key]) for key in ("trained_ids", "folder_ids"))
    pairs = zip(trained, folder, strict=False)
    place = next(
        (index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(trained), len(folder))
    )
    ours, theirs = (" ".join(tokens[max(place - 1, 0) : place + 2]) for tokens in (trained, folder))
    lines += [
        f"`transformers` tokenizes this text in one piece and gives {len(folder)} token ids beside the image's; "
        f"training had {len(trained)}, since this tokenizer treats text after a special token differently: "
        f"`{theirs}` instead of `{ours}`.",
        "",
    ]
    return lines
