"""How lmms-eval (0.6 or later) finds the model ``visexpert``: its entry points ``lmms_eval.models`` name this."""

from __future__ import annotations

from typing import Any

MODEL = "visexpert"
"""What ``--model`` takes."""

CLASS = "visexpert.integrations.lmms_eval.VisexpertModel"


def manifest() -> Any:
    """A ``ModelManifest`` of a model of the simple kind: it is asked with a text and the images of a question."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

    return ModelManifest(model_id=MODEL, simple_class_path=CLASS)
