"""The page, the Markdown file and the figures that a comparison writes."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from tests.report.compare.made import make_run
from visexpert.report.compare import Choices, compare_runs, find_runs, write_report
from visexpert.report.compare.figures import curves, pareto, skills
from visexpert.report.palette import GRAY
from visexpert.report.pareto import FRONT

EVIL = "<script>alert('x')</script>|a"


class Page(HTMLParser):
    """Collects what a page refers to, its text by tag, and its tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP only and two variants of two seeds, one run that failed, one log."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        make_run(folder / "clip-only" / f"seed{seed}", seed=seed, vqa=0.5 + seed / 100, nll=0.6)
        tove = {"cost/gflop_vision": 0.4, "cost/train_gflop": 12345.0}
        make_run(folder / "tove" / f"seed{seed}", seed=seed, vqa=0.7 + seed / 50, metrics=tove, gates=True)
        make_run(
            folder / "bad" / f"seed{seed}",
            seed=seed,
            vqa=0.4,
            metrics={"cost/gflop_vision": 0.3},
            gates=True,
            trainer={"max_steps": 9},
        )
    (make_run(folder / "died" / "seed0") / "metrics.json").unlink()
    return folder


@pytest.fixture(scope="module")
def out(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on them; one variant has a name that wants to be code."""
    out = tmp_path_factory.mktemp("report")
    named = {folder: EVIL for folder in find_runs([runs / "bad"])[0]}
    folders, strays = find_runs(sorted(runs.iterdir()))
    write_report(compare_runs(folders, Choices(named), strays=[*strays, runs / "x.txt"]), out)
    return out


def test_the_page_asks_for_nothing_from_outside(out: Path) -> None:
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.references and all(ref.startswith(("data:image/", "#")) for ref in page.references)
    assert "link" not in page.tags and page.tags.count("script") == 1
    style = (out / "report.html").read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


def test_names_of_runs_are_no_code(out: Path) -> None:
    html = (out / "report.html").read_text(encoding="utf-8")
    assert EVIL not in html and "&lt;script&gt;alert(" in html
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    row = next(line for line in tables if "&lt;script>" in line and " ± " in line)
    heading = next(line for line in tables if line.startswith("| # | variant | seeds"))
    assert row.replace("\\|", "").count("|") == heading.count("|")


def test_every_picture_is_inside_and_whole(out: Path) -> None:
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    pictures = [ref for ref in page.references if ref.startswith("data:")]
    sizes = []
    for uri in pictures:
        content = base64.b64decode(uri.partition(",")[2])
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            sizes.append((image.format, image.size))
    assert sizes.count(("JPEG", (30, 20))) == 2  # the gate map of one seed of each of two variants
    assert sum(kind == "PNG" for kind, _ in sizes) == len(list((out / "figures").glob("*.png"))) >= 4


def test_the_report_says_what_is_wrong_with_what_was_given(out: Path) -> None:
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "/died/seed0 | failed or still going: there is no metrics.json" in text
    assert "x.txt | is not a run and holds none" in text
    assert "| schedule | trainer.max_steps | 10: clip-only, tove; 9: " in text


def test_the_markdown_holds_scores_costs_and_tests(out: Path) -> None:
    lines = (out / "report.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith("| 3 | tove | 2 |"))
    assert "**71.0 ± 1.4** [58.3, 83.7]" in row  # sd 0.02 / sqrt 2, t of one degree of freedom 12.706
    assert next(line for line in lines if line.startswith("| 2 (baseline) | clip-only | 2 |"))
    cost = next(line for line in lines if line.startswith("| 3 | tove | 2 | 3 |"))
    assert "| 12,345 |" in cost and "not recorded" in cost and "| 0.5 |" in cost
    assert any("p 0." in line for line in lines if line.startswith("| 3 | tove | +"))
    assert any(
        line.startswith("![VQA against work of the vision side, GFLOP per image](figures/pareto_gflop.png)")
        for line in lines
    )


def _blue(path: Path) -> tuple[Any, Any]:
    pixels = np.asarray(Image.open(path).convert("RGB")) / 255.0
    rows, columns = np.nonzero(np.abs(pixels - np.array(to_rgb(FRONT))).max(axis=2) < 0.012)
    return rows, columns


def test_the_front_is_drawn_through_what_is_on_it(runs: Path, tmp_path: Path) -> None:
    """CLIP and ToVE lie on it (0.1 and 0.4 GFLOP), the bad one between them does not: a step up at 0.4."""
    first = [runs / name / "seed0" for name in ("clip-only", "bad", "tove")]  # one seed: no interval in the way
    path = pareto(compare_runs(first, Choices()), tmp_path / "p.png")
    assert path is not None
    rows, columns = _blue(path)
    there = np.unique(columns)
    end = there[np.nonzero(np.diff(there) > 10)[0][0]]  # behind the first gap lies the legend
    rows, columns = rows[columns <= end], columns[columns <= end]
    upright, counts = np.unique(columns, return_counts=True)
    assert upright[counts.argmax()] > upright.min() + 0.9 * np.ptp(upright)
    level, counts = np.unique(rows, return_counts=True)
    assert level[counts.argmax()] > level.min() + 0.6 * np.ptp(level)  # rows count downwards


def test_curves_are_split_over_figures_with_the_baseline_in_each(runs: Path, tmp_path: Path) -> None:
    made = [
        make_run(tmp_path / "runs" / f"v{number}" / "seed0", trainer={"max_steps": 9 - number % 2})
        for number in range(8)
    ]
    (made[7] / "metrics.csv").write_text("step,train/loss\n1,2\n", encoding="utf-8")
    found = compare_runs(made, Choices())
    paths, told = curves(found, tmp_path)
    assert [path.name for path in paths] == ["curves_1.png", "curves_2.png"]
    assert told.startswith("train/text_loss: mean over seeds") and told.endswith("Without such a curve: v7.")


def test_bars_of_skills_are_as_long_as_the_scores(runs: Path, tmp_path: Path) -> None:
    found = compare_runs(find_runs([runs / "clip-only", runs / "tove"])[0], Choices())
    scores = [score for score in found.all_scores if score.key.endswith("family/size")]
    rows, columns = _blue(skills(found, scores, "vqa", tmp_path / "s.png"))
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")) / 255.0
    gray = np.abs(pixels - np.array(to_rgb(GRAY))).max(axis=2) < 0.012
    bar = np.nonzero(gray.sum(axis=1) > 60)[0]
    length = np.nonzero(gray[int(np.quantile(bar, 0.2))])[0]  # beside the interval, which lies across the end
    assert np.ptp(length) / np.ptp(columns) == pytest.approx(0.405 / 0.61, rel=0.02)


@pytest.mark.browser
def test_a_click_sorts_a_table(out: Path) -> None:
    import shutil

    playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs the extra browser-test")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no chromium on the PATH: apt-get install chromium")
    column = "[...document.querySelectorAll('section')].find(s => s.innerText.startsWith('Scores'))"
    names = f"[...{column}.querySelectorAll('tbody tr')].map(row => row.cells[1].innerText)"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--headless=new", "--no-sandbox"])
        tab = browser.new_page()
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(f"file://{out}/report.html")
        before = tab.evaluate(names)
        tab.evaluate(f"{column}.querySelectorAll('th button')[3].click()")
        rising = tab.evaluate(names)
        tab.evaluate(f"{column}.querySelectorAll('th button')[3].click()")
        falling = tab.evaluate(names)
        browser.close()
    assert rising == [EVIL, "clip-only", "tove"] and falling == rising[::-1] and sorted(before) == sorted(rising)
    assert errors == []


def test_every_wide_part_has_a_cue_that_it_scrolls(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    boxes = page.count('class="scroll"') + page.count('class="strip"')
    assert boxes > 3 and page.count("scroll sideways") == boxes
    assert 'toggle("more"' in page and ".more > .hint { display: block; }" in page


def test_the_report_says_which_images_the_models_know(out: Path, tmp_path: Path) -> None:
    said = "training data: Tabletop's rendered scenes"
    assert said in (out / "report.md").read_text(encoding="utf-8").partition("\n## ")[0]
    photos = make_run(tmp_path / "photos")
    config = (photos / "config.yaml").read_text(encoding="utf-8")
    (photos / "config.yaml").write_text(config.replace("tabletop.TabletopData", "data.VQAv2"), encoding="utf-8")
    runs = [make_run(tmp_path / "scenes"), photos]
    write_report(compare_runs(runs, Choices(allow_mixed=True)), tmp_path / "out")
    head = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").partition("\n## ")[0]
    assert "'photos': VQAv2" in head and "'scenes': Tabletop's rendered scenes" in head


def test_that_there_is_one_seed_is_said_once(tmp_path: Path) -> None:
    for name, vqa in (("a", 0.5), ("b", 0.6), ("c", 0.7)):
        make_run(tmp_path / "v" / name / "seed0", vqa=vqa)
    write_report(compare_runs(find_runs([tmp_path / "v"])[0], Choices()), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert text.count("one seed:") == 1 and "Every variant has one seed" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 20 and not any("one seed" in row for row in rows)
    make_run(tmp_path / "v" / "a" / "seed1", seed=1)
    write_report(compare_runs(find_runs([tmp_path / "v"])[0], Choices()), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert text.count("Some variants have one seed") == 1


def test_milliseconds_of_a_busy_machine_are_hollow_and_off_the_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The busy variant would be the cheapest and best; the front is the steady one alone."""
    busy = {"cost/others_cpu_share": 0.6, "cost/images_per_s": 900.0}
    runs = [
        make_run(tmp_path / "steady" / "seed0", vqa=0.5),
        make_run(tmp_path / "slow" / "seed0", vqa=0.4, metrics={"cost/images_per_s": 100.0}),
        make_run(tmp_path / "busy" / "seed0", vqa=0.9, metrics=busy),
    ]
    found, drawn = compare_runs(runs, Choices()), []
    monkeypatch.setattr("visexpert.report.compare.figures.save", lambda figure, out: drawn.append(figure))
    pareto(found, tmp_path / "ms.png", measure="ms")
    pareto(found, tmp_path / "gflop.png", measure="gflop")
    in_ms, in_gflop = ({line.get_label()[3:]: line for line in figure.legends[0].get_lines()} for figure in drawn)
    assert set(in_ms) == {"steady", "slow", "~busy"} and set(in_gflop) == {"steady", "slow", "busy"}
    assert in_ms["~busy"].get_markerfacecolor() == "white" and in_ms["steady"].get_markerfacecolor() == FRONT
    assert in_gflop["busy"].get_markerfacecolor() == FRONT  # work does not depend on the machine's other load
    stairs = [line.get_xdata() for line in drawn[0].axes[0].get_lines() if line.get_drawstyle() == "steps-post"]
    assert [list(places) for places in stairs] == [[2.0]]
    assert drawn[0].axes[0].get_xlabel().startswith("time of the vision side, ms per image")


def test_milliseconds_of_a_busy_machine_are_marked_in_table_figure_and_words(tmp_path: Path) -> None:
    """One of two seeds was measured beside others; the other variant recorded no such thing."""
    for seed in (0, 1):
        make_run(tmp_path / "runs" / "old" / f"seed{seed}", seed=seed)
        make_run(
            tmp_path / "runs" / "busy" / f"seed{seed}",
            seed=seed,
            model={"lr": 0.5},
            metrics={"cost/others_cpu_share": 0.6 * seed, "cost/images_per_s_spread": 0.0},
        )
    folders, _ = find_runs([tmp_path / "runs"])
    write_report(compare_runs(folders, Choices()), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    costs = text.partition("## Costs")[2].partition("\n## ")[0]
    rows = {row.split("|")[2].strip(): row for row in costs.splitlines() if row.startswith("|")}
    assert "| ~2 |" in rows["busy"] and "~" not in rows["old"] and "by more than 20%" in costs
