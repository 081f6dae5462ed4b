"""One self-contained HTML page for a run: text, tables, pictures, and the details folded away.

Everything is inside the file (styles, images as base64; no script, nothing fetched), so it can be
mailed, archived beside its run, or opened from a cluster's file browser, and it follows the
reader's light or dark setting.
"""

import base64
import dataclasses
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsynth.core.io import write_text
from jaxsynth.report.tables import Table, to_html

_MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image file with its caption; `pixelated` keeps enlarged pixels sharp."""

    path: Path
    caption: str = ""
    alt: str = ""
    pixelated: bool = False


@dataclasses.dataclass(frozen=True)
class Details:
    """Something folded away: text, or a dict shown as JSON (a config, a manifest)."""

    title: str
    content: str | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page. `text` is plain: blank lines part paragraphs, lines that start with `- `
    make a list, `code` and **bold** are set as such. Tables come before images."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    images: Sequence[Picture] = ()
    details: Sequence[Details] = ()


def write_page(
    path: Path,
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    facts: Sequence[tuple[str, str]] = (),
    footer: str = "",
) -> Path:
    """Writes the page atomically and returns its path.

    `facts` are (name, value) pairs shown as a row of cards under the title. Raises
    `FileNotFoundError` or `ValueError` naming an image that is missing or of another kind.
    """
    path = Path(path)
    anchors = _anchors(sections)
    contents = "".join(
        f'<li><a href="#{anchor}">{html.escape(section.title)}</a></li>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    cards = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts
    )
    body = "\n".join(
        _section(anchor, section) for anchor, section in zip(anchors, sections, strict=True)
    )
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
{f'<p class="subtitle">{_inline(subtitle)}</p>' if subtitle else ""}
{f'<dl class="facts">{cards}</dl>' if cards else ""}
</header>
<div class="columns">
<nav aria-label="Contents"><h2>Contents</h2><ol>{contents}</ol></nav>
<main>
{body}
</main>
</div>
<footer>{_inline(footer or "Made by jaxsynth.")}</footer>
</body>
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def _section(anchor: str, section: Section) -> str:
    parts = [f'<section id="{anchor}"><h2>{html.escape(section.title)}</h2>', _prose(section.text)]
    parts += [to_html(table) for table in section.tables]
    parts += [_picture(picture) for picture in section.images]
    for details in section.details:
        content = details.content
        if not isinstance(content, str):
            content = json.dumps(content, indent=2, ensure_ascii=False, default=str)
        parts.append(
            f"<details><summary>{html.escape(details.title)}</summary>"
            f'<pre tabindex="0">{html.escape(content)}</pre></details>'
        )
    return "\n".join(part for part in parts if part) + "\n</section>"


def _picture(picture: Picture) -> str:
    path = Path(picture.path)
    media = _MEDIA.get(path.suffix.lower())
    if media is None:
        raise ValueError(f"page image {path}: expected one of {', '.join(_MEDIA)}")
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    alt = html.escape(picture.alt or picture.caption or path.stem, quote=True)
    kind = ' class="pixelated"' if picture.pixelated else ""
    caption = f"<figcaption>{_inline(picture.caption)}</figcaption>" if picture.caption else ""
    image = f'<img{kind} src="data:{media};base64,{data}" alt="{alt}">'
    return f'<figure class="picture"><div class="scroll">{image}</div>{caption}</figure>'


def _prose(text: str) -> str:
    """Paragraphs and lists of plain text, escaped."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in block.splitlines()]
        if lines and all(line.startswith("- ") for line in lines):
            items = "".join(f"<li>{_inline(line[2:])}</li>" for line in lines)
            blocks.append(f"<ul>{items}</ul>")
        elif block.strip():
            blocks.append(f"<p>{_inline(' '.join(lines))}</p>")
    return "\n".join(blocks)


def _inline(text: str) -> str:
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)


def _anchors(sections: Sequence[Section]) -> list[str]:
    """A distinct fragment per section, from its title."""
    anchors: list[str] = []
    for number, section in enumerate(sections, 1):
        anchor = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or f"part-{number}"
        anchors.append(anchor if anchor not in anchors else f"{anchor}-{number}")
    return anchors


_STYLE = """
:root {
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2128; --soft: #5b636e; --line: #dfe3e8;
  --accent: #1f6fc4; --best: #e7f5ec; --best-ink: #10693c; --code: #eef1f4;
  --rule: #aab2bd;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #101216; --card: #181b21; --ink: #e4e7eb; --soft: #9aa3ae; --line: #2b3038;
    --accent: #6cb0f5; --best: #15321f; --best-ink: #7fdca4; --code: #22262d;
    --rule: #59626e;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
header, .columns, footer { max-width: 1180px; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .75rem; }
.subtitle { color: var(--soft); margin: .4rem 0 0; font-size: 1.05rem; }
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0;
}
.facts div {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem
  .9rem;
}
.facts dt {
  color: var(--soft); font-size: .78rem; text-transform: uppercase; letter-spacing: .04em;
}
.facts dd { margin: .1rem 0 0; font-size: 1.2rem; font-weight: 600; overflow-wrap: anywhere; }
.columns {
  display: grid; grid-template-columns: 13rem minmax(0, 1fr); gap: 2rem; padding-top: 1.75rem;
  align-items: start;
}
nav {
  position: sticky; top: 1rem; font-size: .92rem; max-height: calc(100vh - 2rem); overflow-y:
  auto;
}
nav h2 {
  font-size: .78rem; text-transform: uppercase; letter-spacing: .06em; color: var(--soft);
  margin-bottom: .4rem;
}
nav ol { list-style: none; margin: 0; padding: 0; border-left: 2px solid var(--line); }
nav a { display: block; padding: .22rem .8rem; color: var(--ink); text-decoration: none; }
nav a:hover { color: var(--accent); }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.4rem
  1.6rem; margin-bottom: 1.25rem;
}
p, ul { margin: 0 0 .9rem; max-width: 46rem; }
section > :last-child { margin-bottom: 0; }
figure { margin: 1.1rem 0; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; }
.table figcaption { font-weight: 600; color: var(--ink); margin-bottom: .4rem; }
.picture figcaption { margin-top: .5rem; }
.scroll { overflow-x: auto; }
table {
  border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums; min-width:
  60%;
}
th, td {
  padding: .45rem .85rem; border-bottom: 1px solid var(--line); text-align: left; white-space:
  nowrap;
}
thead th {
  color: var(--soft); font-size: .85rem; font-weight: 600; border-bottom: 2px solid var(--line);
}
tbody th { font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
tr.rule > * { border-top: 2px solid var(--rule); }
.num { text-align: right; }
.best { background: var(--best); color: var(--best-ink); font-weight: 700; }
.std { font-size: .85em; font-weight: 400; opacity: .75; }
img { display: block; max-width: 100%; height: auto; }
img.pixelated { image-rendering: pixelated; }
details { border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0; }
summary { cursor: pointer; padding: .5rem .9rem; font-weight: 500; }
pre {
  margin: 0; padding: .9rem; overflow: auto; max-height: 28rem; border-top: 1px solid
  var(--line);
}
pre, code { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { background: var(--code); border-radius: 4px; padding: .1em .35em; }
footer { color: var(--soft); font-size: .88rem; padding-top: .5rem; padding-bottom: 2.5rem; }
@media (max-width: 820px) {
  .columns { grid-template-columns: minmax(0, 1fr); gap: 1rem; }
  nav { position: static; }
  header, .columns, footer { padding-left: 1rem; padding-right: 1rem; }
  section { padding: 1.1rem 1rem; }
}
@media print {
  body { background: #fff; } nav { display: none; } .columns { display: block; }
  section { break-inside: avoid; border: 0; padding: 0; }
}
"""
