"""A figure's numbers as files, and the picture of errors with their laws."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from jaxsynth.report.figures import write_numbers
from jaxsynth.report.plots import Series, _round_ticks, plot_scaling, plot_scatter


def test_numbers_are_json_and_csv_with_the_columns_of_all_rows(tmp_path):
    rows = [{"setting": "a, b", "error": 0.5}, {"setting": "c", "error": None, "worth": 3}]
    write_numbers(tmp_path / "new" / "error", rows, laws={"a, b": {"exponent": 0.5}})
    found = json.loads((tmp_path / "new" / "error.json").read_text())
    assert found == {"rows": rows, "laws": {"a, b": {"exponent": 0.5}}}
    with open(tmp_path / "new" / "error.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert table == [
        {"setting": "a, b", "error": "0.5", "worth": ""},
        {"setting": "c", "error": "", "worth": "3"},
    ]


def test_errors_are_drawn_with_and_without_a_law(tmp_path):
    sizes = [2, 8, 32]
    series = [
        Series("real", sizes, [50.0, 30.0, 20.0], [1.0, np.nan, 2.0]),
        Series("prompts", sizes, [85.0, 84.0, 86.0]),
    ]
    args = {"xlabel": "images", "ylabel": "error, %"}
    plain = plot_scaling(tmp_path / "plain.png", series, {}, **args)
    fitted = plot_scaling(tmp_path / "law.png", series, {"real": (sizes, [51, 30, 19])}, **args)
    one, other = (np.asarray(Image.open(path)) for path in (plain, fitted))
    assert one.shape == other.shape and (one != other).any()
    perfect = [Series("real", sizes, [20.0, 5.0, 0.0], [1.0, 2.0, 0.0])]
    assert plot_scaling(tmp_path / "zero.png", perfect, {}, **args).exists()
    nothing = [Series("real", sizes[:1], [0.0])]
    assert plot_scaling(tmp_path / "nothing.png", nothing, {}, **args).exists()
    assert _round_ticks([20.0, 86.0]) == [20.0, 30.0, 50.0, 70.0, 100.0]


def test_points_are_shaded_by_a_third_value(tmp_path):
    given = {"xlabel": "diversity", "ylabel": "recognised, %", "shade_label": "guidance"}
    args = (["a", "b"], [0.2, 0.4], [90.0, 70.0])
    one, other = (
        np.asarray(Image.open(plot_scatter(tmp_path / f"{i}.png", *args, shade, **given)))
        for i, shade in enumerate(([1.0, 7.5], [7.5, 1.0]))
    )
    assert one.shape == other.shape and (one != other).any()
    with pytest.raises(ValueError, match="one length above 0"):
        plot_scatter(tmp_path / "none.png", [], [], [], [], **given)
