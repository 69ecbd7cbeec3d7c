"""Classes that other programs load.

Each module needs the program that it is for, so nothing else here imports it.
"""

from __future__ import annotations

from typing import Any

LMMS_MODEL, LMMS_CLASS = "visexpert", "visexpert.integrations.lmms_eval.VisexpertModel"
"""What lmms-eval's ``--model`` takes, and the class behind it."""


def lmms_manifest() -> Any:
    """Return the ``ModelManifest`` by which lmms-eval (0.6 or later) finds the model.

    The entry point ``lmms_eval.models`` names this function. The model is of the simple kind: it is asked with a text
    and the images of a question.
    """
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

    return ModelManifest(model_id=LMMS_MODEL, simple_class_path=LMMS_CLASS)
