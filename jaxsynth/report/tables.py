"""One table, three renderings: the terminal (rich), HTML for the page, Markdown for a README.

A cell that was measured over seeds is a `Measure`; it prints as mean ± sample standard deviation,
and the best mean of a column is emphasised, together with every mean that prints the same; none is
where all of them do.
"""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Literal

import rich.box
import rich.table
import rich.text


@dataclasses.dataclass(frozen=True)
class Measure:
    """A quantity measured once per seed."""

    values: tuple[float, ...]

    def __post_init__(self):
        if not self.values:
            raise ValueError("Measure: no values; give None for a cell that was not measured")

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def std(self) -> float | None:
        """The sample standard deviation (n - 1), or None for a single seed."""
        if len(self.values) < 2:
            return None
        mean = self.mean
        return math.sqrt(math.fsum((v - mean) ** 2 for v in self.values) / (len(self.values) - 1))


# Of a table on the page: more go below.
_MOST_COLUMNS = 8

Cell = str | int | float | Measure | None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; the first column is the row's label.

    `better` says which mean of a numeric column is emphasised, `scale` multiplies every float and
    Measure before it is printed with `digits` decimals (100 for accuracies in per cent). Rows whose
    index is in `rules` start a new group: a line is drawn above them.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    better: Literal["higher", "lower"] | None = "higher"
    scale: float = 1.0
    digits: int = 1
    rules: Sequence[int] = ()

    def __post_init__(self):
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.caption!r}, row {number}: {len(row)} cells for "
                    f"{len(self.columns)} columns"
                )
        if self.better not in ("higher", "lower", None):
            raise ValueError(f"table better={self.better!r}: expected 'higher', 'lower' or None")

    def text(self, cell: Cell) -> str:
        """A cell as plain text."""
        if cell is None:
            return "–"
        if isinstance(cell, Measure):
            mean, std = self._number(cell.mean), cell.std
            return mean if std is None else f"{mean} ± {self._number(std)}"
        return self._number(cell) if isinstance(cell, float) else str(cell)

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, so is aligned right and has a best value."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and not any(isinstance(cell, str) for cell in cells)

    def best(self, column: int) -> frozenset[int]:
        """The rows whose value is the best of a column; empty where no choice was to be made."""
        if self.better is None or column == 0 or not self.numeric(column):
            return frozenset()
        values = {}
        for index, row in enumerate(self.rows):
            cell = row[column]
            value = cell.mean if isinstance(cell, Measure) else cell
            if value is not None and not math.isnan(value):
                values[index] = value
        if len(values) < 2:
            return frozenset()
        top = max(values.values()) if self.better == "higher" else min(values.values())
        found = frozenset(i for i, v in values.items() if self._number(v) == self._number(top))
        return found if len(found) < len(values) else frozenset()

    def _number(self, value: float) -> str:
        if isinstance(value, int):
            return str(value)
        return f"{value * self.scale:.{self.digits}f}"

    def _cells(self):
        """Yields (starts a group, [(text, is numeric, is best)]) for each row."""
        columns = range(len(self.columns))
        best, numeric = [self.best(c) for c in columns], [self.numeric(c) for c in columns]
        for index, row in enumerate(self.rows):
            cells = [(self.text(row[c]), numeric[c], index in best[c]) for c in columns]
            yield index in self.rules, cells


def to_rich(table: Table) -> rich.table.Table:
    """The table for a rich console."""
    out = rich.table.Table(
        title=rich.text.Text(table.caption) if table.caption else None,
        title_style="bold",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for index, name in enumerate(table.columns):
        out.add_column(rich.text.Text(name), justify="right" if table.numeric(index) else "left")
    for ruled, cells in table._cells():
        if ruled and out.row_count:
            out.add_section()
        out.add_row(
            *(rich.text.Text(text, "bold green" if best else "") for text, _, best in cells)
        )
    return out


def to_html(table: Table) -> str:
    """The table as one HTML `<figure>`, its text escaped; styled by the page.

    One of many columns is cut into parts below each other, so that none lies out of sight.
    """
    count = len(table.columns) - 1
    parts = max(1, -(-count // _MOST_COLUMNS))
    size = -(-count // parts)
    tables = "\n".join(
        _html_part(table, range(1 + start, 1 + min(start + size, count)))
        for start in range(0, max(count, 1), max(size, 1))
    )
    caption = f"<figcaption>{html.escape(table.caption)}</figcaption>" if table.caption else ""
    return f'<figure class="table">{caption}{tables}</figure>'


def _html_part(table: Table, columns: range) -> str:
    """The rows' labels and some of the columns."""
    head = "".join(
        f'<th scope="col"{_class(table.numeric(index), False)}>'
        f"{html.escape(str(table.columns[index]))}</th>"
        for index in (0, *columns)
    )
    body = []
    for ruled, cells in table._cells():
        label = html.escape(cells[0][0])
        tds = "".join(
            f"<td{_class(num, best)}>{_spread(html.escape(text))}</td>"
            for text, num, best in (cells[index] for index in columns)
        )
        rule = ' class="rule"' if ruled else ""
        body.append(f'<tr{rule}><th scope="row">{label}</th>{tds}</tr>')
    # tabindex: a region that scrolls must be reachable from the keyboard.
    return (
        '<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>" + "\n".join(body) + "</tbody></table></div>"
    )


def to_markdown(table: Table) -> str:
    """The table as GitHub Markdown, columns padded so that the source reads as a table too."""
    grid = [[name.replace("|", "\\|") for name in table.columns]]
    for _, cells in table._cells():
        escaped = [(text.replace("|", "\\|"), best) for text, _, best in cells]
        grid.append([f"**{text}**" if best else text for text, best in escaped])
    widths = [max(3, *(len(row[c]) for row in grid)) for c in range(len(table.columns))]
    numeric = [table.numeric(c) for c in range(len(widths))]

    def line(row: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if num else text.ljust(width)
            for text, width, num in zip(row, widths, numeric, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    marks = ["-" * (w - 1) + (":" if num else "-") for w, num in zip(widths, numeric, strict=True)]
    lines = [line(grid[0]), line(marks), *(line(row) for row in grid[1:])]
    return "\n".join(lines) + "\n"


def _class(numeric: bool, best: bool) -> str:
    names = [name for name, on in (("num", numeric), ("best", best)) if on]
    return f' class="{" ".join(names)}"' if names else ""


def _spread(text: str) -> str:
    """The ± part of a cell in smaller, paler type."""
    mean, sign, std = text.partition(" ± ")
    return f'{mean}<span class="std"> ± {std}</span>' if sign else text
