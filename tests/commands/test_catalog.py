"""The top of the command line: help, groups, suggestions, spelling, and what none of this imports."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import visexpert
from visexpert import __version__, callbacks
from visexpert.cli import main
from visexpert.commands import completion
from visexpert.commands.catalog import COMMANDS, Command
from visexpert.commands.ending import Ending
from visexpert.commands.phases import PHASES, _parser

PACKAGE = Path(visexpert.__file__).parent

every_command = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)


def told(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What a command prints before it ends with an exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code
    captured = capsys.readouterr()
    return captured.err.strip() if code else captured.out


def test_help_lists_every_command_once_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(["--help"], capsys)
    groups = {part.splitlines()[0]: part for part in text.split("\n\n") if part.splitlines()[0].endswith(":")}
    assert list(groups) == ["Before training:", "Train and score:", "After training:", "Use and inspect:"]
    for command in COMMANDS.values():
        found = [name for name, part in groups.items() if f"\n  {command.name} " in part]
        assert found == [f"{command.group}:"], command.name
        assert command.summary in groups[found[0]]
    assert max(map(len, text.splitlines())) <= 96 and told(["-h"], capsys) == text
    assert told([], capsys, code=2) == text.strip()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from visexpert.cli import main\n"
        "from visexpert.commands.catalog import COMMANDS\n"
        "for arguments in (['--help'], *([name, '--help'] for name in COMMANDS)):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as ended: assert not ended.code, arguments\n"
        "    heavy = {'torch', 'lightning', 'transformers', 'numpy', 'timm', 'rich'} & set(sys.modules)\n"
        "    assert not heavy, (arguments, heavy)\n"
        "    if arguments == ['--help']: assert not {'jsonargparse', 'yaml'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("typed", "meant"), [("fitt", "'fit'"), ("expot", "'export'"), ("detatch", "'detach'"), ("servre", "'serve'")]
)
def test_a_misspelled_command_is_told_which_was_meant(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = told([typed, "x"], capsys, code=2)
    assert typed in message and f"did you mean {meant}" in message and "\n" not in message


def test_a_word_like_no_command_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    message = told(["zzzzz"], capsys, code=2)
    assert all(name in message for name in COMMANDS)
    assert "give the command first" in told(["--config", "x.yaml", "fit"], capsys, code=2)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"visexpert {__version__}\n"


@every_command
def test_options_are_in_snake_case_and_a_run_that_is_read_has_no_option(command: Command) -> None:
    parser = command.make_parser()
    options = [name for name in parser._option_string_actions if name.startswith("--")]
    assert [
        name for name in options if not re.fullmatch(r"--[a-z0-9_]+([.][a-z0-9_]+|[.]KEY|[.]init_args[.]KEY)?", name)
    ] == []
    assert ("--run" in options) <= (command.name in ("fit", "demo"))  # which write it
    assert parser.prog == f"visexpert {command.name}" and not parser.allow_abbrev


@every_command
def test_the_help_of_each_command_names_its_options(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    text = told([command.name, "--help"], capsys)
    assert text.startswith(f"usage: visexpert {command.name} ") and "--trust MODULE" in text
    assert all(name in text for name in command.make_parser()._option_string_actions)


def test_help_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed = [["--help"], *([name, "--help"] for name in COMMANDS)]
    typed += [["configs", action, "--help"] for action in ("list", "show", "copy")]
    for arguments in typed:
        texts = {}
        for width in (40, 60, 80, 300):
            monkeypatch.setenv("COLUMNS", str(width))
            texts[width] = told(arguments, capsys)
            lines = texts[width].splitlines()
            too_long = [line for line in lines if len(line) > width and len(line.rstrip(" \\").split()) > 1]
            assert not too_long, (arguments, width, too_long)
        words = [{word for word in text.split() if word not in "\\#"} for text in texts.values()]
        assert words[0] == words[1] == words[2] == words[3], arguments  # nothing is cut


@pytest.mark.parametrize(
    ("typed", "now"),
    [
        (["caption", "a.png", "--run", "r"], "visexpert caption [-h]"),
        (["serve", "--run=r"], "visexpert serve"),
        (["score", "import", "x.json", "--run", "r"], "visexpert score"),
        (["test", "--run", "r"], "test r"),
        (["validate", "--run=r"], "validate r"),
        (["predict", "--config", "x.yaml", "--run", "r"], "predict r"),
        (["plan", "--text-tokens", "3"], "--text_tokens"),
        (["plan", "--answer-tokens=3"], "--answer_tokens"),
        (["compare", "r", "--out", "o", "--allow-mixed"], "--allow_mixed"),
        (["data", "check", "x.yaml", "--no-weights"], "--no_weights"),
        (["score", "import", "r", "x.json", "--harness-version", "1"], "--harness_version"),
    ],
)
def test_spellings_of_earlier_versions_are_refused_with_those_of_today(
    typed: list[str], now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = told(typed, capsys, code=2)
    assert now in message and "\n" not in message
    assert re.search(r"--[a-z]+-[a-z]+|--run", message)


def test_a_misspelled_option_is_told_which_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'--batch_size'" in told(["caption", "r", "a.png", "--batchsize", "3"], capsys, code=2)


@pytest.mark.parametrize(
    ("typed", "short", "full"),
    [
        (["caption", "r", "a.png", "--beam", "3"], "--beam", ["'--beams'"]),
        (["configs", "copy", "tove/smoke", "d", "--over"], "--over", ["'--overwrite'"]),
        (["data", "check", "tove/smoke", "--part", "test"], "--part", ["'--parts'"]),
        (["merge", "r", "--step", "3"], "'step'", ["'steps'"]),
        (["detach", "r", "--ret", "3"], "'ret'", ["'retune_steps'", "'retune_lr'"]),
        (["fit", "--config", "tove/smoke", "--trainer.max_step", "3"], "trainer.max_step'", ["'trainer.max_steps'"]),
        (["fit", "--config", "tove/smoke", "--ckpt", "last"], "'ckpt'", ["'ckpt_path'"]),
        (["fit", "--config", "tove/smoke", "--ru", "x"], "'ru'", ["'run'"]),
        (["fit", "--conf", "tove/smoke"], "'conf'", ["'config'"]),
        (
            ["fit", "--config", "tove/smoke", "--model.init_args.optimizer.warm", "3"],
            "'optimizer.warm'",
            ["'optimizer.warmup_steps'"],
        ),
        (["plan", "--config", "tove/smoke", "--trainer.max_step", "3"], "trainer.max_step'", ["'trainer.max_steps'"]),
        (["plan", "--config", "tove/smoke", "--gpus", "1", "--sample", "3"], "--sample", ["'--samples'"]),
    ],
)
def test_no_command_takes_an_abbreviation(
    typed: list[str], short: str, full: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["visexpert"])
    message = told(typed, capsys, code=2)
    assert short in message and all(each in message for each in full) and "\n" not in message


@pytest.mark.parametrize("command", PHASES)
def test_what_is_offered_are_options_alone(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = told([command, "r", "--zzzzz"], capsys, code=2)
    offered = message.partition("known are ")[2].rstrip(".").split(", ")
    shown = COMMANDS[command].make_parser()._option_string_actions
    assert "seed" in offered and {f"--{name}" for name in offered} <= set(shown)


@pytest.mark.parametrize("command", PHASES)
def test_the_help_of_a_phase_has_the_options_that_its_parser_takes(command: str) -> None:
    real = _parser(command, getattr(callbacks, PHASES[command].name))
    known = {name for name in real._option_string_actions if name.startswith("--") and not name.endswith(".help")}
    shown = COMMANDS[command].make_parser()._option_string_actions
    groups = {name.partition(".")[0] for name in known if "." in name}
    assert {name for name in shown if name.startswith("--")} - {"--help"} == known - groups - {
        "--print_config",
        "--print_shtab",
        "--help",
    }
    defaults = real.get_defaults()
    for name, action in shown.items():
        value = defaults.get(name.removeprefix("--"))
        if name not in ("-h", "--help", "--config", "--seed") and value is not None:
            assert f"(default: {value!r})" in (action.help or ""), name


@every_command
def test_every_command_ends_with_what_it_made_and_what_to_type_next(command: Command) -> None:
    """Its function returns an Ending, which the type checker holds and which refuses to be empty."""
    run = getattr(importlib.import_module(command.module), command.run)
    returned = get_type_hints(getattr(run, "func", run), vars(importlib.import_module(command.module)))["return"]
    assert returned in (Ending, Ending | None)
    assert (returned != Ending) == (
        command.name in ("extract", "fit", "validate", "test", "predict", "detach", "merge")
    )


def test_an_ending_says_what_was_made_and_then_what_is_next(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Ending("runs/a b", (("merge", "runs/a b"), ("serve", "x"))).tell()
    assert capsys.readouterr().out == "Done: runs/a b\nNext: visexpert merge 'runs/a b', or visexpert serve x\n"
    Ending("the plan", (("fit",),), aside=True).tell()
    assert capsys.readouterr() == ("", "Done: the plan\nNext: visexpert fit\n")
    Ending("a script", (("fit",),), terminal_only=True).tell()
    assert capsys.readouterr() == ("", "")  # which a shell may evaluate
    with pytest.raises(SystemExit) as ended:
        Ending("one of two", (("fit",),), code=1).tell()
    assert ended.value.code == 1 and "Next: " in capsys.readouterr().out
    for made, then in (("", [("fit",)]), ("a", [])):
        with pytest.raises(ValueError, match="at least one command"):
            Ending(made, then)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_completion_script_knows_every_command_and_its_options(
    shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("shtab", reason="the scripts need the extra completion")
    main(["completion", shell])
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert all(option in script for option in ("ckpt_path", "max_new_tokens", "min_contribution", "merging.distance"))
    if shell == "bash":
        (tmp_path / "script").write_text(script, encoding="utf-8")
        typed = "COMP_WORDS=(visexpert exp); COMP_CWORD=1; _shtab_visexpert; echo ${COMPREPLY[*]}"
        done = subprocess.run(
            ["bash", "-c", f"source {tmp_path / 'script'}; {typed}"], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["export"]


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("visexpert.errors.find_spec", lambda name: None if name == "shtab" else find(name))
    assert "pip install 'visexpert[completion]'" in told(["completion", "bash"], capsys, code=2)


def test_commands_that_the_source_proposes_exist_with_their_options() -> None:
    """Those that need no model to be typed, such as those of serve, import and score, too."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            words = [each.value for each in getattr(node, "elts", []) if isinstance(each, ast.Constant)]
            options = [word for word in words if isinstance(word, str) and re.fullmatch(r"--\w+", word)]
            if isinstance(node, ast.Tuple) and options and words[0] in COMMANDS:
                known = {name for action in COMMANDS[words[0]].make_parser()._actions for name in action.option_strings}
                found[f"{path.name}:{node.lineno}"] = (words[0], [option for option in options if option not in known])
    assert {"import_weights.py", "score.py", "merge.py"} <= {place.partition(":")[0] for place in found}
    assert not [place for place, (_, unknown) in found.items() if unknown]
