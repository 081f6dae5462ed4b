"""The numbers of a figure beside its picture, as JSON and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsynth.core.io import write_json, write_text


def write_numbers(path: Path, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """`path` with .json (the rows under "rows", beside `more`) and with .csv (the rows alone).

    Columns are the keys of all rows in the order in which they first appear.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_json(path.with_suffix(".json"), {"rows": [dict(row) for row in rows], **more})
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path.with_suffix(".csv"), text.getvalue())
