"""The prompt that an exported LLaVA's processor writes, held against the one of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)

from tests.export.helpers import tiny_clip, tiny_llava, tiny_siglip
from tests.language import tokenizer_kinds
from tests.language.test_prompts import encoders
from tests.vision.test_encoder_families import TRANSFORMERS
from visexpert.errors import ConfigError, WeightsError
from visexpert.export import check_encoder, export
from visexpert.export.llava import (
    CONVERSATION,
    PromptCheck,
    check_prompt,
    processor_of,
    prompt_lines,
    tokenizer_with_image,
)
from visexpert.vision import TransformersEncoder


def with_bos() -> PreTrainedTokenizerBase:
    """As Llama's: <s> is put before each text."""
    tokenizer = tokenizer_kinds.llama_converted()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    assert tokenizer("a")["input_ids"][0] == 1
    return tokenizer


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {**tokenizer_kinds.GENERATIVE, "with <s>": with_bos}


def prompts(make: Callable[[], PreTrainedTokenizerBase], folder: Path) -> dict[str, PromptCheck]:
    """By encoder, what the processor makes of a question after it was saved and loaded again."""
    source = tiny_llava()
    assert source.language is not None
    make().save_pretrained(folder / "run")
    tokenizer = AutoTokenizer.from_pretrained(folder / "run")  # as a run has it
    found = {}
    for name, encoder in encoders(tokenizer).items():
        given, image_id = tokenizer_with_image(tokenizer)
        changed = replace(source, language=replace(source.language, tokenizer=tokenizer, encoder=encoder))
        processor_of(changed, given).save_pretrained(folder / name)
        processor = AutoProcessor.from_pretrained(folder / name)
        text = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True)
        assert text == processor.tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
        image = Image.new("RGB", (32, 32))
        (ids,) = processor(images=image, text=text)["input_ids"]
        assert ids.count(image_id) == 16
        parts = [{"type": "image", "image": image}, CONVERSATION[0]["content"][1]]
        at_once = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        assert torch.as_tensor(at_once["input_ids"]).flatten().tolist() == ids
        found[name] = check_prompt(encoder, text, ids, image_id=image_id)
        with pytest.raises(WeightsError, match="trained on"):
            check_prompt(encoder, text + " ", ids, image_id=image_id)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_training_or_the_readme_says_so(kind: str, tmp_path: Path) -> None:
    found = prompts(KINDS[kind], tmp_path)
    tokenizer = KINDS[kind]()
    differing = {name for name, prompt in found.items() if prompt.trained_ids != prompt.folder_ids}
    # Behind <s> or <image> a whole text has no word mark, a text of its own has one; only these kinds tell them apart.
    marks = "llama, legacy", "llama, not legacy"
    assert differing == ({"none", "jinja", "vicuna_v1", "llama_2", "mistral"} if kind in marks else set())
    for name, prompt in found.items():
        facts = prompt.facts()
        said = "\n".join(prompt_lines(facts, tokenizer))
        assert facts["ids_equal"] is (name not in differing) and prompt.text in said
        assert ("tokenizes this text in one piece" in said) is (name in differing)


def test_a_siglip_is_llavas_tower_and_all_of_its_tokens_are_read(tmp_path: Path) -> None:
    source = tiny_llava(clip=tiny_siglip())
    found = export({"llava": source}, tmp_path / "out")["llava"]
    assert found.outputs.keys() == {"layer_minus_2", "layer_minus_1", "pooled", "logits"}
    assert all(entry["min_cosine"] >= 0.9999 for entry in found.outputs.values())
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert isinstance(model.model.vision_tower, SiglipVisionModel)
    assert model.config.vision_feature_select_strategy == "full"
    image = Image.new("RGB", (50, 40), "red")
    given = AutoProcessor.from_pretrained(tmp_path / "out")(images=image, text="<image>red cube", return_tensors="pt")
    assert int((given["input_ids"] == model.config.image_token_id).sum()) == 16 == source.clip.grid_hw[0] ** 2
    with torch.no_grad():
        seen = model.model.get_image_features(given["pixel_values"]).pooler_output[0]
        assert source.language is not None
        tokens_TD = source.clip.model(given["pixel_values"], output_hidden_states=True).hidden_states[-2][0]
        expected = source.language.linear_2(torch.nn.functional.gelu(source.language.linear_1(tokens_TD)))
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-5)


def test_what_llava_has_no_place_for_is_one_sentence() -> None:
    for encoder in (tiny_siglip(), TransformersEncoder(config=TRANSFORMERS["clip"].to_dict()), tiny_clip()):
        check_encoder(encoder, "llava")
    with pytest.raises(ConfigError, match=r"llava .*32 px.*image_size=48.*native, hf, "):
        check_encoder(tiny_siglip(image_size=48), "llava")
    with pytest.raises(ConfigError, match=r"llava .*SiglipVisionModel.*Dinov2Model"):
        check_encoder(TransformersEncoder(config=TRANSFORMERS["dinov2"].to_dict(), image_size=32), "llava")
