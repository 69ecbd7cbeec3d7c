"""Commands in the headers of the files under configs/ are whole and fit each other; test_configs_train.py runs them."""

from __future__ import annotations

import re

from tests.exports_read import READERS
from tests.header_commands import COMMANDS, FILES, HEADERS, MAKERS, header, made_by, needed_by, option
from tests.test_configs import is_overlay

AMID = re.compile(r"(?<!`)visexpert (fit|test|merge|detach|export)")


def test_what_is_no_overlay_says_how_it_is_run() -> None:
    folders = ("distill/", "movekd/", "tove/", "hybrid/", "hubs/", "zoo/")
    whole = {name for name in FILES if name.startswith(folders) and not is_overlay(name)}
    assert len(whole) > 20 and whole <= set(HEADERS)
    for name in FILES:
        if name.startswith(("hybrid/", "hubs/")):
            assert name in HEADERS
        own = f"configs/{name}"
        assert name not in HEADERS or any(own in command for command in HEADERS[name]), name


def test_no_command_stands_amid_a_sentence() -> None:
    """So that those that are run are all that there are; names of commands in backquotes are none."""
    for name in FILES:
        for line in header(name):
            assert line.startswith("visexpert ") or not AMID.search(line)


def test_commands_fit_each_other() -> None:
    """In one folder, none writes where another has, and what one starts from, another makes."""
    made = [made_by(command) for command in COMMANDS]
    assert len(MAKERS) == len([folder for folder in made if folder is not None])
    for command in COMMANDS:
        needed = needed_by(command)
        assert needed is None or needed in MAKERS, command


def test_each_kind_of_command_is_among_them() -> None:
    assert {command[0] for command in COMMANDS} == {"fit", "test", "merge", "detach", "export"}
    formats = [option(command, "--format") for command in COMMANDS if command[0] == "export"]
    assert formats.count("llava") >= 2 and set(formats) == set(READERS)
