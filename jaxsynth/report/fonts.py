"""Fonts that have the letters of a text, in plots and grids; a class may have any language's name.

DejaVu Sans comes with matplotlib. Where a text has letters that it lacks (Chinese, Japanese or
Korean, emoji), an installed font that has them is taken; where none has, such letters are written
as their code points, "U+732B", rather than all as the same box.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

DEFAULT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@cache
def _letters(path: Path) -> frozenset[int]:
    try:
        return frozenset(FT2Font(str(path)).get_charmap())
    except (RuntimeError, OSError):
        # A file that FreeType cannot read has no letters for us.
        return frozenset()


@cache
def font_file(text: str) -> Path:
    """The first installed font that has all of a text's letters, DejaVu Sans before all others."""
    needed = {ord(letter) for letter in text if letter.isprintable()}
    if needed <= _letters(DEFAULT):
        return DEFAULT
    for path in sorted(map(Path, font_manager.findSystemFonts())):
        if needed <= _letters(path):
            return path
    return DEFAULT


def drawable(text: str) -> str:
    """The text on one line, with the letters that no installed font has as their code points."""
    text = " ".join(text.split())
    known = _letters(font_file(text))
    return "".join(
        x if ord(x) in known or x.isspace() else f"U+{ord(x):04X} " for x in text
    ).strip()


def families(texts: Iterable[str]) -> list[str]:
    """matplotlib's font families that together have the texts' letters, DejaVu Sans first."""
    found = ["DejaVu Sans"]
    for path in {font_file(text) for text in texts} - {DEFAULT}:
        font_manager.fontManager.addfont(str(path))
        found.append(font_manager.FontProperties(fname=str(path)).get_name())
    return found
