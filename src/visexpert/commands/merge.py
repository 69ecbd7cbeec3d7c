"""``visexpert merge RUN``: merge CLIP and experts of a finished run into one plain CLIP, RUN/merged."""

from __future__ import annotations


def run(arguments: list[str]) -> None:
    """Carry out :class:`~visexpert.callbacks.KnowledgeMerging` on a finished run."""
    from visexpert.callbacks import KnowledgeMerging
    from visexpert.commands.phases import run_phase

    run_phase("merge", KnowledgeMerging, arguments)
