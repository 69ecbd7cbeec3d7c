"""Help that is read from docstrings."""

from __future__ import annotations

import pytest

from visexpert.cli import main
from visexpert.commands.source_settings import plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see :class:`~visexpert.methods.pooled.KeptPooled`.", "see KeptPooled."),
        ("see :mod:`visexpert.losses`", "see visexpert.losses"),
        ("``auto`` or :data:`.FORMATS`", "auto or FORMATS"),
        ("`visexpert export` at 1:2", "`visexpert export` at 1:2"),
    ],
)
def test_markup_of_docstrings_is_left_out(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize("command", ["detach", "merge"])
def test_help_shows_no_markup(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = capsys.readouterr().out
    assert f"visexpert {command} RUN" in told and ":`" not in told and "``" not in told
