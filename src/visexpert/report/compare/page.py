"""The report as one HTML page that needs nothing else: pictures inside, no request to anywhere, light and dark."""

from __future__ import annotations

import base64
import io

from jinja2 import Environment
from PIL import Image, UnidentifiedImageError

from visexpert.report.compare.document import Document, Picture

WIDEST = 960
"""Pixels to which pictures of runs are made smaller, so that a page of many runs stays light."""

QUALITY = 76

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{ document.title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
{% macro table(item) %}
{% if item.caption %}<p class="caption">{{ item.caption }}</p>{% endif %}
<div class="wide"><div class="scroll" tabindex="0" role="region" aria-label="table"><table>
<thead><tr>
{% for title in item.heading %}
<th scope="col" {% if loop.index0 < item.text_columns %}class="word"{% endif %}
    ><button type="button">{{ title }}</button></th>
{% endfor %}
</tr></thead>
<tbody>
{% set strong = item.strong %}
{% for row in item.rows %}
<tr {% if loop.index0 == strong %}class="baseline" title="baseline"{% endif %}>
{% for cell in row %}
<td class="{{ cell.mark }}{% if loop.index0 < item.text_columns %} word{% endif %}"
    {% if cell.value is not none %}data-value="{{ cell.value }}"{% endif %}
    >{{ cell.text }}{% if cell.detail %}<small>{{ cell.detail }}</small>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div><p class="hint">More columns: scroll sideways →</p></div>
{% endmacro %}
{% macro picture(item, plot) %}
<figure {% if plot %}class="plot"{% endif %}>
{% set uri = item | data_uri %}
{% if uri %}<img src="{{ uri }}" alt="{{ item.title }}" loading="lazy">{% else %}<p>not readable</p>{% endif %}
<figcaption>{{ item.title }}</figcaption>
</figure>
{% endmacro %}
{% macro body(section) %}
{% for text in section.text %}<p>{{ text }}</p>{% endfor %}
{% for item in section.tables %}{{ table(item) }}{% endfor %}
{% for item in section.pictures %}{{ picture(item, item.is_plot) }}{% endfor %}
{% for title, items in section.strips %}
<h3>{{ title }}</h3>
<div class="wide"><div class="strip" tabindex="0" role="region" aria-label="{{ title }}">
{% for item in items %}{{ picture(item, item.is_plot) }}{% endfor %}
</div><p class="hint">More pictures: scroll sideways →</p></div>
{% endfor %}
{% endmacro %}
<main>
<header>
<h1>{{ document.title }}</h1>
{% for text in document.summary %}<p>{{ text }}</p>{% endfor %}
</header>
<nav>{% for section in document.sections %}<a href="#s{{ loop.index }}"
  {% if section.warning %}class="warning"{% endif %}>{{ section.title }}</a>{% endfor %}</nav>
{% for section in document.sections %}
<section id="s{{ loop.index }}" {% if section.warning %}class="warning"{% endif %}>
{% if section.folded %}
<details><summary><h2>{{ section.title }}</h2></summary>{{ body(section) }}</details>
{% else %}
<h2>{{ section.title }}</h2>
{{ body(section) }}
{% endif %}
</section>
{% endfor %}
</main>
<script>{{ script | safe }}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #1d2126; --quiet: #67707b; --line: #e2e4e7; --card: #ffffff;
  --head: #f3f4f5; --accent: #0067a8; --better: #00754b; --worse: #b03a00; --warn: #9a6400; --warn-bg: #fff7e6;
  --base: #eef4fa; --blend: multiply; --invert: none; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e4e7ea; --quiet: #98a1ab; --line: #2c323a;
  --card: #1a1e23; --head: #20252b; --accent: #6cb8ee; --better: #4cc795; --worse: #f08a57; --warn: #e8b04a;
  --warn-bg: #2a2416; --base: #1c2733; --blend: screen; --invert: invert(1) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.55rem; margin: 0 0 .6rem; font-weight: 650; }
h2 { font-size: 1.12rem; margin: 0 0 .6rem; font-weight: 650; }
h3 { font-size: .98rem; margin: 1.4rem 0 .5rem; font-weight: 600; }
p { margin: 0 0 .7rem; max-width: 78ch; color: var(--ink); }
.caption, header p { color: var(--quiet); }
nav { display: flex; flex-wrap: wrap; gap: .3rem .9rem; padding: .7rem 0 1.2rem; border-bottom: 1px solid var(--line);
  font-size: .88rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
nav a.warning, section.warning h2 { color: var(--warn); }
section { padding: 1.6rem 0 .4rem; scroll-margin-top: .5rem; }
section.warning { background: var(--warn-bg); border-left: 3px solid var(--warn); padding: 1rem 1.1rem .5rem;
  margin: 1.1rem 0 0; border-radius: 0 6px 6px 0; }
summary { cursor: pointer; } summary h2 { display: inline; } details > :nth-child(2) { margin-top: .8rem; }
.scroll { overflow-x: auto; margin: 0 0 1rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .5rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th { background: var(--head); font-weight: 600; white-space: normal; vertical-align: bottom; line-height: 1.25; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort=ascending] button::after { content: " \\25B2"; font-size: .7em; }
th[aria-sort=descending] button::after { content: " \\25BC"; font-size: .7em; }
td.word, th.word { text-align: left; } td.word { white-space: normal; min-width: 2.2rem; overflow-wrap: break-word; }
td.word[data-value] { white-space: nowrap; } td.word:nth-child(2) { min-width: 11rem; }
td small { display: block; color: var(--quiet); font-size: .82em; font-weight: 400; }
tr.baseline td { background: var(--base); }
tbody tr:hover td { background: var(--head); }
.best { font-weight: 700; } .better { color: var(--better); } .worse { color: var(--worse); }
.absent { color: var(--quiet); }
figure { margin: 0 0 1.2rem; } figcaption { color: var(--quiet); font-size: .84rem; margin-top: .25rem; }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
.plot { background: var(--page); isolation: isolate; }
.plot img { filter: var(--invert); mix-blend-mode: var(--blend); max-width: min(100%, 1000px); }
section.warning .plot { background: transparent; }
.strip { display: flex; gap: 1rem; overflow-x: auto; padding-bottom: .6rem; align-items: flex-start; }
.strip figure { flex: 0 0 min(540px, 88vw); }
.strip figure:not(.plot) { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; }
.strip figure:not(.plot) figcaption { color: #444; }
.hint { display: none; margin: -.6rem 0 1rem; text-align: right; font-size: .82rem; color: var(--accent); }
.more > .hint { display: block; }
.more > .scroll, .more > .strip { mask-image: linear-gradient(to left, transparent, #000 3.5rem); }
@media print { .hint { display: none !important; } .more > * { mask-image: none !important; }
  nav { display: none; } .scroll { overflow: visible; } }
"""

SCRIPT = """
for (const box of document.querySelectorAll(".scroll, .strip")) {
  const cue = () => box.parentElement.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  box.addEventListener("scroll", cue, { passive: true });
  new ResizeObserver(cue).observe(box);
}
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const of = row => row.cells[column], number = row => of(row).dataset.value;
    const compare = (a, b) => {
      const x = number(a), y = number(b);
      if (x !== undefined && y !== undefined) return (x - y) * (down ? -1 : 1);
      if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1;
      return of(a).textContent.localeCompare(of(b).textContent, undefined, { numeric: true }) * (down ? -1 : 1);
    };
    body.append(...[...body.rows].sort(compare));
  }));
}
"""


def page(document: Document) -> str:
    """The page; text from runs is escaped."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = data_uri
    return environment.from_string(TEMPLATE).render(document=document, style=STYLE, script=SCRIPT)


def data_uri(picture: Picture) -> str:
    """A picture as a data URI: a plot as it is, a photograph as JPEG of moderate size; empty where it is damaged."""
    try:
        content = picture.path.read_bytes()
        if picture.is_plot:
            return _uri(content, "png")
        return _uri(_as_jpeg(content), "jpeg")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return ""


def _as_jpeg(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        smaller = image.convert("RGB")
    smaller.thumbnail((WIDEST, 4 * WIDEST), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    smaller.save(out, "jpeg", quality=QUALITY, optimize=True)
    return out.getvalue()


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
