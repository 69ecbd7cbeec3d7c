"""``visexpert detach RUN``: detach the experts of a finished run that are not worth their cost, RUN/detached."""

from __future__ import annotations


def run(arguments: list[str]) -> None:
    """Carry out :class:`~visexpert.callbacks.ExpertDetachment` on a finished run."""
    from visexpert.callbacks.detach import ExpertDetachment
    from visexpert.commands.phases import run_phase

    run_phase("detach", ExpertDetachment, arguments)
