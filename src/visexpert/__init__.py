"""Turn several frozen vision experts into one better vision encoder.

``import visexpert as vx`` is quick: the names below are imported on first use, and with them torch and Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from visexpert.version import __version__

if TYPE_CHECKING:
    from visexpert.captioning import Answer, Captioner
    from visexpert.data import (
        CC3M,
        POPE,
        VSR,
        COCOCaptions,
        HuggingFaceData,
        ImageShards,
        ImageTable,
        LLaVAInstruct,
        MixedData,
        NoCaps,
        VQAv2,
        read_image,
    )
    from visexpert.errors import ConfigError, DataError, UserError, WeightsError
    from visexpert.experts import (
        DepthExpert,
        ExpertHub,
        KorniaEdges,
        NormalsFromDepth,
        OpenClipExpert,
        SegmentationExpert,
        TimmExpert,
        TransformersExpert,
        VisionExpert,
    )
    from visexpert.export import export_encoder
    from visexpert.language import (
        BertDecoder,
        CrossAttentionDecoder,
        LanguageModel,
        LoRASettings,
        NoLanguage,
        PrefixLM,
        Projector,
        ProjectorSettings,
    )
    from visexpert.losses import (
        cls_token_weights,
        feature_kd,
        gate_balance,
        gated_kd,
        router_balance,
        teacher_weights,
        token_distance,
    )
    from visexpert.methods import (
        AgglomerationSettings,
        AuxiliarySettings,
        EvaluationSettings,
        FusingMethod,
        HeadSettings,
        MergeSettings,
        Merging,
        MergingOptimizer,
        Method,
        MoVEKD,
        MoVEKDOptimizer,
        OptimizerSettings,
        StoreSettings,
        ToVE,
        ToVEOptimizer,
        WeightingSettings,
    )
    from visexpert.metrics import CaptionScores, POPEScores, RidgeProbe, TokenNLL, VQAAccuracy, VSRAccuracy
    from visexpert.runs import SavedRun, load_run
    from visexpert.tabletop import TabletopData, TinyExpert, tabletop_tokenizer
    from visexpert.transfer import GateSettings
    from visexpert.types import Batch, VisionTokens
    from visexpert.vision import (
        ClipEncoder,
        MoLEFeedForward,
        MoLESettings,
        OpenClipEncoder,
        TiledClipEncoder,
        TimmEncoder,
        TransformersEncoder,
        VisionEncoder,
        add_mole,
        collect_routing,
        vision_encoder,
    )

__all__ = [
    "VisionTokens",
    "OptimizerSettings",
    "ProjectorSettings",
    "Projector",
    "LoRASettings",
    "CC3M",
    "POPE",
    "VSR",
    "AgglomerationSettings",
    "Answer",
    "AuxiliarySettings",
    "Batch",
    "BertDecoder",
    "COCOCaptions",
    "CaptionScores",
    "Captioner",
    "ClipEncoder",
    "ConfigError",
    "CrossAttentionDecoder",
    "DataError",
    "DepthExpert",
    "EvaluationSettings",
    "ExpertHub",
    "FusingMethod",
    "GateSettings",
    "HeadSettings",
    "HuggingFaceData",
    "ImageShards",
    "ImageTable",
    "KorniaEdges",
    "LLaVAInstruct",
    "LanguageModel",
    "MergeSettings",
    "Merging",
    "MergingOptimizer",
    "Method",
    "MixedData",
    "MoLEFeedForward",
    "MoLESettings",
    "MoVEKD",
    "MoVEKDOptimizer",
    "NoCaps",
    "NoLanguage",
    "NormalsFromDepth",
    "OpenClipEncoder",
    "OpenClipExpert",
    "POPEScores",
    "PrefixLM",
    "RidgeProbe",
    "SavedRun",
    "SegmentationExpert",
    "StoreSettings",
    "TabletopData",
    "TiledClipEncoder",
    "TimmEncoder",
    "TimmExpert",
    "TinyExpert",
    "ToVE",
    "ToVEOptimizer",
    "TokenNLL",
    "TransformersEncoder",
    "TransformersExpert",
    "UserError",
    "VQAAccuracy",
    "VQAv2",
    "VSRAccuracy",
    "VisionEncoder",
    "VisionExpert",
    "WeightingSettings",
    "WeightsError",
    "__version__",
    "add_mole",
    "cls_token_weights",
    "collect_routing",
    "export_encoder",
    "feature_kd",
    "gate_balance",
    "gated_kd",
    "load_run",
    "read_image",
    "router_balance",
    "tabletop_tokenizer",
    "teacher_weights",
    "token_distance",
    "vision_encoder",
]

_NAMES = {
    "captioning": "Answer Captioner",
    "data": "CC3M POPE VSR COCOCaptions HuggingFaceData ImageShards ImageTable LLaVAInstruct MixedData NoCaps VQAv2 "
    "read_image",
    "errors": "ConfigError DataError UserError WeightsError",
    "experts": "DepthExpert ExpertHub KorniaEdges NormalsFromDepth OpenClipExpert SegmentationExpert TimmExpert "
    "TransformersExpert VisionExpert",
    "export": "export_encoder",
    "language": "BertDecoder CrossAttentionDecoder LanguageModel LoRASettings NoLanguage PrefixLM Projector "
    "ProjectorSettings",
    "losses": "cls_token_weights feature_kd gate_balance gated_kd router_balance teacher_weights token_distance",
    "methods": "AgglomerationSettings AuxiliarySettings EvaluationSettings FusingMethod HeadSettings MergeSettings "
    "Merging MergingOptimizer Method MoVEKD MoVEKDOptimizer OptimizerSettings StoreSettings ToVE ToVEOptimizer "
    "WeightingSettings",
    "metrics": "CaptionScores POPEScores RidgeProbe TokenNLL VQAAccuracy VSRAccuracy",
    "runs": "SavedRun load_run",
    "tabletop": "TabletopData TinyExpert tabletop_tokenizer",
    "transfer": "GateSettings",
    "types": "Batch VisionTokens",
    "vision": "ClipEncoder MoLEFeedForward MoLESettings OpenClipEncoder TiledClipEncoder TimmEncoder "
    "TransformersEncoder VisionEncoder add_mole collect_routing vision_encoder",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_NAMES})
