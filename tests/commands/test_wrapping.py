"""Help wrapped to a terminal."""

from __future__ import annotations

import shlex

from visexpert.commands.wrapping import wrapped


def test_what_fits_stays_as_it_is() -> None:
    text = "One line.\nAnother.\n\n  a  b\n"
    assert wrapped(text, 40) == text


def test_paragraphs_flow_and_columns_hang() -> None:
    text = "A sentence that does not fit\nand goes on here.\n\n  --name X  what it does, at\n            length"
    assert wrapped(text, 24).split("\n") == [
        "A sentence that does not",
        "fit and goes on here.",
        "",
        "  --name X  what it",
        "            does, at",
        "            length",
    ]


def test_a_name_that_is_too_wide_stands_above_its_text() -> None:
    assert wrapped("  a_very_long_name  and its text", 20) == "  a_very_long_name\n      and its text"


def test_a_wrapped_command_can_still_be_pasted() -> None:
    command = "visexpert fit --config 'tove/tabletop' --run runs/a"
    lines = wrapped(f"examples:\n  {command}    # ten minutes on a laptop", 30).split("\n")
    assert max(map(len, lines)) <= 30 and lines[0] == "examples:"
    assert [line.strip() for line in lines[1:] if line.lstrip().startswith("#")] == ["# ten minutes on a laptop"]
    pasted = "\n".join(line for line in lines[1:] if not line.lstrip().startswith("#"))
    assert shlex.split(pasted.replace("\\\n", "")) == shlex.split(command)
