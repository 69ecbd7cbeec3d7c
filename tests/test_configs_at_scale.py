"""The papers' configurations, whole and on ``meta``: every file builds, and its numbers fit the models and data.

Nothing is downloaded. Encoders are built from what the files themselves say of them. A file names a language model by
its Hugging Face id alone: the published ``config.json`` is written below and put into a cache of the test's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from torch import nn

from tests.io.hub import put_in_cache
from visexpert.data import CC3M, POPE, VSR, COCOCaptions, LLaVAInstruct, MixedData, NoCaps, VQAv2
from visexpert.data.base import DataModule
from visexpert.language import LlavaTemplate
from visexpert.methods import MoVEKD, ToVE
from visexpert.planning.meta import weightless
from visexpert.training import VisexpertCLI, build_cli
from visexpert.vision import TiledClipEncoder
from visexpert.vision.published import describe_clip

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDERS = ("movekd/llava", "tove/paper")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def llama(width: int, hidden: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers}
    return LLAMA | sizes | {"num_attention_heads": heads, "num_key_value_heads": heads}


PUBLISHED: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": llama(4096, 11008, 32, 32),
    "lmsys/vicuna-13b-v1.5": llama(5120, 13824, 40, 40),
    "FacebookAI/roberta-base": {
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        "vocab_size": 50265,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    },
}
"""``config.json`` of language models, as published, without what does not change the model."""

CLIPS = {
    "openai/clip-vit-base-patch16": ("ViT-B-16-quickgelu", (768, 3072, 12, 12, 224, 16)),
    "openai/clip-vit-large-patch14": ("ViT-L-14-quickgelu", (1024, 4096, 24, 16, 224, 14)),
    "openai/clip-vit-large-patch14-336": ("ViT-L-14-336-quickgelu", (1024, 4096, 24, 16, 336, 14)),
}
"""Published sizes: width, hidden width, blocks, heads, pixels, pixels of a patch."""


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisexpertCLI]:
    """One parser for all files, and a Hugging Face Hub cache that has the language models' configurations."""
    root = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr("sys.argv", ["visexpert"])
        for name, config in PUBLISHED.items():
            folder = root / name.replace("/", "-")
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            put_in_cache(patch, root / "cache", name, folder)
        yield build_cli(["--config", str(CONFIGS / "tove" / "smoke.yaml")], run=False)


def build(cli: VisexpertCLI, *files: str) -> Any:
    """Configuration, model and data of files laid over each other; the model is on ``meta``."""
    config = cli.parser.parse_args([part for file in files for part in ("--config", str(CONFIGS / f"{file}.yaml"))])
    with weightless():
        built = cli.parser.instantiate_classes(config)
    assert all(parameter.is_meta for parameter in built.model.parameters())
    built.settings = config
    return built


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def samples(settings: Any, data: DataModule) -> int:
    """Samples that a fit reads, on the GPUs that the scripts have: without accumulation."""
    trainer = settings.trainer
    division = data.division(processes=int(trainer.devices) * int(trainer.num_nodes), accumulate=1)
    assert division.accumulate == 1
    return division.step_size * int(trainer.max_steps)


ALIGNMENT, INSTRUCTIONS = 558128, 665298
"""Samples of LLaVA's two files."""


def test_movekd_stage_1(cli: VisexpertCLI) -> None:
    built = build(cli, "movekd/llava/stage1")
    model, data = built.model, built.data
    assert isinstance(model, MoVEKD)
    mole = sum(millions(part) for part in model.clip.mole_layers()) - 23 * (2 * 1024 * 4096 + 5120) / 1e6
    assert mole == pytest.approx(23 * 1.001667, abs=1e-3)  # released: 24 blocks, the last of which is not read
    assert millions(model.language) == pytest.approx(6738, abs=1)
    assert {group.name: group.lr for group in model.trained_groups()} == {"fusion": 1e-3, "mole": 1e-3}
    assert isinstance(data, LLaVAInstruct) and data.settings.resize == "crop"
    assert 0 <= ALIGNMENT - samples(built.settings, data) < 256
    assert built.settings.model.init_args.optimizer.warmup_steps == round(0.03 * 2180)


def test_movekd_stage_2_with_the_teachers_of_v1_1(cli: VisexpertCLI) -> None:
    built = build(cli, "movekd/llava/stage2", "hubs/movekd-v1.1")
    model, data = built.model, built.data
    assert isinstance(model, MoVEKD) and model.teacher_names == ("clip", "eva", "convnext", "sam")
    adapters = {name: millions(model.distillation.heads[name]) for name in model.teacher_names[1:]}
    assert adapters == pytest.approx({"eva": 3.41, "convnext": 3.74, "sam": 2.62}, abs=0.005)  # as released
    rates = {group.name: group.lr for group in model.trained_groups()}
    assert rates == dict.fromkeys(("fusion", "clip", "mole", "language"), 2e-5)
    assert isinstance(data, MixedData) and [type(data.sources[name]) for name in data.names["test"]] == [POPE, VQAv2]
    source = data.sources["llava"]
    assert source.settings.resize == "pad" and source.settings.template is not None
    assert 0 <= samples(built.settings, data) - INSTRUCTIONS < 128


def test_movekd_with_13b_as_released(cli: VisexpertCLI) -> None:
    built = build(cli, "movekd/llava/stage1", "movekd/llava/13b", "movekd/released")
    model = built.model
    assert isinstance(model, MoVEKD) and millions(model.language) == pytest.approx(13016, abs=1)
    assert model.distillation.weighting.convention == "released"
    assert built.data.settings.tokenizer == "lmsys/vicuna-13b-v1.5"
    given = built.settings.model.init_args
    assert given.clip.init_args.mole.alpha == 1 and given.weighting.clip_teacher_weight == 0.8


def test_movekd_with_llava_nexts_tiles(cli: VisexpertCLI) -> None:
    built = build(cli, "movekd/llava/stage2", "movekd/llava/next")
    model, data = built.model, built.data
    assert isinstance(model, MoVEKD) and isinstance(model.clip, TiledClipEncoder)
    assert model.clip.pinpoints == [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]] and model.clip.mole_layers()
    rates = {group.name: group.lr for group in model.trained_groups()}
    assert rates == {"fusion": 2e-5, "clip": 2e-6, "mole": 2e-6, "language": 2e-5}
    assert {source.settings.resize for source in data.sources.values()} == {"stretch"}
    side = model.clip.grid_hw[0]
    most = side**2 + max(rows * side * (columns * side + 1) for rows, columns in model.clip.pinpoints)
    text = built.settings.data.init_args.template.init_args.max_tokens
    assert most == 2928 and most + text - 1 <= PUBLISHED["lmsys/vicuna-7b-v1.5"]["max_position_embeddings"]


def test_tove_on_captions(cli: VisexpertCLI) -> None:
    built = build(cli, "tove/paper/vit-b16", "hubs/tove")
    model, data = built.model, built.data
    assert isinstance(model, ToVE) and model.hub.names == ("eva", "dino", "depth", "normals", "edges")
    assert millions(model.clip) == pytest.approx(85.8, abs=0.1) and model.clip.grid_hw == (14, 14)
    assert {group.name for group in model.trained_groups()} >= {"language"} and model.clip_lr == 0
    sources = [COCOCaptions, CC3M, NoCaps]
    assert isinstance(data, MixedData) and [type(source) for source in data.sources.values()] == sources
    largest = max(model.hub[name].image_size for name in model.hub.names)
    assert {source.settings.image_size for source in data.sources.values()} == {largest}


def test_tove_on_questions_with_the_larger_clip(cli: VisexpertCLI) -> None:
    built = build(cli, "tove/paper/vit-b16", "tove/paper/vit-l14", "tove/paper/questions")
    model, data = built.model, built.data
    assert isinstance(model, ToVE) and millions(model.clip) == pytest.approx(303.2, abs=0.1)
    assert isinstance(data, MixedData) and [type(source) for source in data.sources.values()] == [VQAv2, VSR, POPE]
    assert data.names == {"train": ["vqav2", "vsr"], "val": ["vsr"], "test": ["vqav2", "vsr", "pope"]}
    assert {source.settings.tokenizer for source in data.sources.values()} == {"FacebookAI/roberta-base"}


@pytest.mark.parametrize(("stage", "size", "rates"), [(1, ALIGNMENT, (1e-3, 0.0)), (2, INSTRUCTIONS, (2e-5, 2e-5))])
def test_tove_with_vicuna(cli: VisexpertCLI, stage: int, size: int, rates: tuple[float, float]) -> None:
    built = build(cli, f"tove/paper/vicuna-stage{stage}")
    model, data = built.model, built.data
    assert isinstance(model, ToVE) and (model.lr, model.language_lr) == rates
    assert abs(size - samples(built.settings, data)) < 256
    template = built.settings.data.init_args.template
    assert template.class_path.endswith(LlavaTemplate.__name__)
    assert template.init_args.style == {1: "plain", 2: "vicuna_v1"}[stage]


def test_distillation_of_dinov3_siglip_2_and_sam_into_a_vit_b(cli: VisexpertCLI) -> None:
    built = build(cli, "distill/dinov3-siglip2-sam")
    clip, hub = built.model.clip, built.model.hub
    assert (clip.width, clip.depth, clip.grid_hw) == (768, 12, (16, 16)) and millions(clip) == pytest.approx(
        86, rel=0.02
    )
    sizes = {name: (expert.token_dim, expert.grid_hw) for name, expert in hub.experts.items()}
    assert sizes == {"dinov3": (1024, (14, 14)), "siglip2": (1152, (27, 27)), "sam": (256, (64, 64))}
    assert built.model.reads_text is False


@pytest.mark.parametrize("stage", [1, 2])
def test_movekd_into_siglip_2(cli: VisexpertCLI, stage: int) -> None:
    built = build(cli, f"movekd/llava/stage{stage}", "hubs/movekd-v1.0", "movekd/llava/siglip2")
    clip = built.model.clip
    assert (clip.width, clip.grid_hw, clip.prefix, clip.saliency) == (1152, (27, 27), 0, "pool")
    added = sum(millions(part) for mole in clip.mole_layers() for part in mole.added_modules())
    assert added > 1 and millions(clip) - added == pytest.approx(428, rel=0.02)


def test_tove_on_siglip_2(cli: VisexpertCLI) -> None:
    built = build(cli, "tove/paper/vit-b16", "hubs/tove", "tove/siglip2-b16")
    assert (built.model.clip.width, built.model.clip.grid_hw) == (768, (14, 14))
    assert millions(built.model.clip) == pytest.approx(93, rel=0.02)  # with its pooling head


@pytest.mark.parametrize("name", CLIPS)
def test_what_is_said_of_a_clip_agrees_with_its_own_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published sizes, put into a cache: a configuration that differs from them would be refused."""
    architecture, sizes = CLIPS[name]
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    own = dict(zip((*fields, "patch_size"), sizes, strict=True)) | {"hidden_act": "quick_gelu"}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    alone = describe_clip(name, architecture=architecture).fields
    assert {field: alone[field] for field in own} == own
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": own}))
    put_in_cache(monkeypatch, tmp_path / "cache", name, tmp_path / "clip")
    assert describe_clip(name, architecture=architecture).fields["hidden_size"] == sizes[0]


def test_every_file_is_built_and_says_where_its_numbers_come_from() -> None:
    built = Path(__file__).read_text(encoding="utf-8")
    for folder in FOLDERS:
        for path in (CONFIGS / folder).glob("*.yaml"):
            name = f"{folder}/{path.stem}"
            assert f'"{name}"' in built or f'"{name[:-1]}{{stage}}"' in built, name
            text = path.read_text(encoding="utf-8").lower()
            assert text.startswith("# ") and len(text.splitlines()[0]) > 20
            assert "paper" in text and ("unconfirmed" in text or "stage1.yaml" in text), name
