"""Every command of every page is one that its parser takes; check_pages.py runs them all, to their ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import Block, blocks_of, hidden
from tests.docs.rules import RULES, Rule, rule_of
from tests.docs.runner import PAGES, ROOT, SITE, Runner, write_surroundings

QUICK = ("your-data.md",)
"""Pages that train nothing: they run here as well."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a page runs in, with what it takes for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["visexpert"])
    monkeypatch.setenv("VISEXPERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_says_to_type_is_understood(page: Path, folder: Path) -> None:
    write_surroundings(folder)
    assert Runner(folder, parse=page.name not in QUICK).page(page) > 0


def test_no_code_is_hidden_from_the_runner() -> None:
    """Every page of the site, those without a block included."""
    assert {page.name: found for page in SITE if (found := hidden(page))} == {}


def test_every_rule_is_needed_and_says_why() -> None:
    used = {
        rule_of(page.name, words)
        for page in PAGES
        for block in blocks_of(page)
        if block.kind == "bash"
        for words in block.commands
    }
    assert [rule.begin for rule in RULES if rule not in used or not rule.why] == []


def test_a_rule_changes_a_command_or_leaves_it_out() -> None:
    words = ["torchrun", "-m", "mine", "fit", "--run", "a"]
    rule = Rule("torchrun -m mine fit", "GPUs", add=("--small",), instead=("visexpert", "fit"))
    assert rule.fits("any.md", words) and not rule.fits("any.md", words[1:])
    assert rule.applied(words) == ["visexpert", "fit", "--run", "a", "--small"]
    assert Rule("torchrun", "GPUs", instead=()).applied(words) == []
    assert not Rule("torchrun", "GPUs", page="b.md").fits("a.md", words)


def test_the_longest_rule_counts() -> None:
    taken = rule_of("movekd.md", ["visexpert", "fit", "--config", "movekd/llava/stage1"])
    assert taken is not None and taken.parsed
    taken = rule_of("movekd.md", ["visexpert", "fit", "--config", "movekd/tabletop"])
    assert taken is not None and not taken.parsed and rule_of("faq.md", ["visexpert", "configs", "list"]) is None


def test_blocks_are_found_with_their_commands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = (
        "# Title\n\n```python\n# mine.py\nx = 1\n```\n\n"
        "```bash\nvisexpert fit \\\n  --run a  # comment\ncd a && ls\n```\n\n"
        "```\nplain\n```\n\n- a list\n\n    not code\n"
    )
    page.write_text(text, encoding="utf-8")
    file, command, plain = blocks_of(page)
    assert (file.kind, file.line, file.file) == ("python", 4, "mine.py")
    assert command.commands == [["visexpert", "fit", "--run", "a"], ["cd", "a"], ["ls"]]
    assert plain == Block("", "plain\n", 15) and hidden(page) == ["line 15: ''"]
    page.write_text("Type\n\n    visexpert fit\n\nand\n\n```sh\nls\n```\n", encoding="utf-8")
    assert hidden(page) == ["indented: visexpert fit", "line 8: 'sh'"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nassert 1 ==\n```\n", r"page\.md:2: SyntaxError"),
        ("```bash\nvisexpert fitt\n```\n", r"page\.md:2: .*"),
        ("```bash\nvisexpert merge runs/a --step 2\n```\n", r"page\.md:2: .*--step"),
        ("```bash\nvisexpert fit --config tove/none\n```\n", r"page\.md:2: .*ended with 2"),
        ("```bash\nrm everything\n```\n", r"page\.md:2: .*rm is no command"),
        ("```yaml\na: 1\n```\n", r"page\.md:2: .*'yaml' is neither"),
    ],
)
def test_a_block_that_is_not_understood_is_named_by_its_line(text: str, said: str, folder: Path) -> None:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=said):
        Runner(folder, parse=True).page(page)


def test_a_command_that_runs_must_end_as_its_rule_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = folder / "page.md"
    page.write_text("```bash\nvisexpert configs show tove/none\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"page\.md:2: .*ended with 2, not 0"):
        Runner(folder).page(page)
    monkeypatch.setattr("tests.docs.rules.RULES", (Rule("visexpert configs", "is missing", code=2),))
    assert Runner(folder).page(page) == 1


def test_equal_fits_of_shipped_configurations_run_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed: list[list[str]] = []

    def fit(words: list[str]) -> None:
        typed.append(words)
        Path(words[words.index("--run") + 1]).mkdir(parents=True)

    monkeypatch.setattr("tests.docs.runner.main", fit)
    page = folder / "page.md"
    (folder / "mine.yaml").write_text("", encoding="utf-8")
    fits = {"a": "tove/smoke", "b": "tove/smoke", "c": "movekd/smoke", "d": "mine.yaml"}
    lines = "".join(f"visexpert fit --config {config} --run runs/{run}\n" for run, config in fits.items())
    page.write_text(f"```bash\n{lines}```\n", encoding="utf-8")
    Runner(folder / "shared").page(page)
    assert [words[2] for words in typed] == ["tove/smoke", "movekd/smoke", "mine.yaml"]
    assert all((folder / "runs" / name).is_dir() for name in fits)
