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

STYLE = Path(__file__).with_name("page.css")
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
    make a list, `code` and **bold** are set as such. Tables come before images, `folded` ones after
    them, behind a line to open."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    images: Sequence[Picture] = ()
    details: Sequence[Details] = ()
    folded: Sequence[Table] = ()


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
<style>
{STYLE.read_text("utf-8")}</style>
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
    if section.folded:
        tables = "\n".join(to_html(table) for table in section.folded)
        title = "Table" if len(section.folded) == 1 else f"{len(section.folded)} tables"
        parts.append(f'<details class="tables"><summary>{title}</summary>\n{tables}</details>')
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
