"""Warnings of libraries that a user can do nothing about, hidden on the command line and wherever a method trains."""

from __future__ import annotations

import warnings

NOISE = (
    (r".*does not have many workers", r"lightning\.pytorch\."),
    (r".*Checkpoint directory .* exists and is not empty", r"lightning\.pytorch\.callbacks\.model_checkpoint"),
    (r".*isinstance.treespec, LeafSpec", r"lightning\.pytorch\.utilities\._pytree"),
    (r"LightningCLI's args parameter", r"lightning\.pytorch\.cli"),  # we complete them, see training.py
    (r".*module.s. in eval mode at the start of training", r"lightning\.pytorch\.loops\.fit_loop"),  # frozen parts
    (r"The number of training batches .* is smaller than the logging interval", r"lightning\.pytorch\."),  # by steps
    (r"Total length of `list` across ranks is zero", r"lightning\.pytorch\.utilities\.data"),  # data without a part
    (
        r"It is recommended to use `self.log\(.*sync_dist=True",
        r"lightning\.pytorch\.",
    ),  # scores are the same everywhere
)
"""How such a warning begins, and the module that gives it."""


def hide_noise() -> None:
    """Hide the warnings of :data:`NOISE`; errors and other warnings of the same libraries are shown."""
    for message, module in NOISE:
        warnings.filterwarnings("ignore", message=message, module=module)
