"""Tables, grids, plots and the page, on names and values that break naive renderers."""

import html.parser
import io
import math

import numpy as np
import pytest
import rich.console
from PIL import Image

from jaxsynth.report.fonts import drawable, font_file
from jaxsynth.report.grids import image_grid, write_grid
from jaxsynth.report.page import Details, Picture, Section, write_page
from jaxsynth.report.plots import (
    Bars,
    Series,
    moving_average,
    plot_bars,
    plot_curves,
    plot_reliability,
    plot_scores,
)
from jaxsynth.report.tables import Measure, Table, to_html, to_markdown, to_rich

ODD = "cat/dog <b>& “猫” | $x$"


@pytest.fixture
def table():
    rows = [
        ["zero-shot", 0.25, None],
        [ODD, Measure((0.5, 0.6, 0.7)), Measure((0.9,))],
        ["both", Measure((0.6, 0.6, 0.6)), 0.5],
    ]
    return Table(["set", "1 shot", "4 shots"], rows, caption="Accuracy", scale=100, rules=(1,))


def test_measure_is_the_sample_statistic():
    measure = Measure((0.5, 0.6, 0.7))
    assert math.isclose(measure.mean, 0.6) and math.isclose(measure.std, 0.1)
    assert Measure((0.3,)).std is None
    with pytest.raises(ValueError, match="no values"):
        Measure(())


def test_best_is_per_column_and_shared_by_what_prints_the_same(table):
    assert table.best(0) == frozenset()
    assert table.best(1) == {1, 2}  # both print 60.0
    assert table.best(2) == {1}
    lower = Table(["a", "loss"], [["x", 2.0], ["y", float("nan")], ["z", 1]], better="lower")
    assert lower.best(1) == {2}
    with pytest.raises(ValueError, match="row 0: 1 cells for 2 columns"):
        Table(["a", "b"], [["x"]])


def test_table_renderings_hold_the_same_numbers(table):
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(to_rich(table))
    terminal, markdown, page = console.export_text(), to_markdown(table), to_html(table)
    for text in ("60.0 ± 10.0", "90.0", "25.0", "–"):
        assert text in terminal and text in markdown
    assert "**60.0 ± 10.0**" in markdown and "\\|" in markdown
    assert len({line.count("|") - line.count("\\|") for line in markdown.splitlines()}) == 1
    assert '<td class="num best">60.0<span class="std"> ± 10.0</span></td>' in page
    assert "cat/dog &lt;b&gt;&amp;" in page and "<b>" not in page


def test_grid_enlarges_by_whole_factors_and_labels_rows(tmp_path, rng_images):
    path = write_grid(tmp_path / "a" / "grid.png", [rng_images(3, 32, 32)], tile=70)
    with Image.open(path) as image:
        assert image.size == (3 * 64 + 2 * 4, 64)
        pixels = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(pixels[:64:2, :64:2], rng_images(3, 32, 32)[0])
    np.testing.assert_array_equal(pixels[1:64:2, 1:64:2], rng_images(3, 32, 32)[0])
    rows = [rng_images(2, 300, 100), rng_images(3, 8, 8)[..., 0]]
    image = image_grid(rows, [ODD * 5, "grey"], headings=("a", "b", "c"))
    assert image.mode == "RGBA" and image.width < 320 + 14 + 3 * 64 + 2 * 4 + 1


def test_grid_names_the_row_of_a_wrong_image(rng_images):
    with pytest.raises(ValueError, match=r"row 'cat': expected uint8.*float64 \(8, 8, 3\)"):
        image_grid([rng_images(1, 8, 8) / 255.0], ["cat"])
    with pytest.raises(ValueError, match="no images in 1 row"):
        image_grid([[]])
    with pytest.raises(ValueError, match="1 label for 2 rows"):
        image_grid([[], rng_images(1, 8, 8)], ["cat"])


def test_plots_write_pictures(tmp_path):
    series = [
        Series("real", [1, 4, 16], [50, 80, 95], [1, 2, math.nan]),
        Series(ODD, [1, 4], [30, 30], dashed=True),
        Series("interval", [1, 4], [30, 40], low=[10, 20], high=[35, 45]),
    ]
    diagram = {
        "edges": [0, 0.5, 1], "count": [0, 9], "confidence": [None, 0.9], "accuracy": [None, 0.8]
    }  # fmt: skip
    paths = [
        plot_scores(tmp_path / "s.png", series, xlabel="shots", ylabel="%", log_x=True),
        plot_scores(tmp_path / "one.png", [Series("x", [1], [2])], xlabel="x", ylabel="y"),
        plot_curves(tmp_path / "c.png", {ODD: ([0, 10, 20, 30], [3, 2, math.nan, 1])}, log_y=True),
        plot_bars(
            tmp_path / "b.png",
            ["a", ODD],
            [
                Bars("real", [1, math.nan], [0, math.nan], [2, math.nan]),
                Bars("b", [2, 3], [1, 2], [3, 4]),
            ],
            xlabel="%",
        ),
        plot_reliability(tmp_path / "r.png", {ODD: diagram, "b": diagram}),
    ]
    for path in paths:
        with Image.open(path) as image:
            assert image.width > 1000 and np.asarray(image).std() > 0
    with pytest.raises(ValueError, match="series 'x'"):
        Series("x", [1, 2], [1])
    with pytest.raises(ValueError, match="bars 'real': 1 value for 2 labels"):
        plot_bars(tmp_path / "b.png", ["a", "b"], [Bars("real", [1], [0], [2])], xlabel="%")


def test_moving_average_is_unbiased_and_passes_over_nan():
    np.testing.assert_allclose(moving_average(np.full(5, 3.0), 0.9), 3.0)
    assert np.isfinite(moving_average(np.array([1.0, np.nan, 2.0]), 0.5)).all()


def test_page_is_self_contained_and_escaped(tmp_path, table, rng_images):
    grid = write_grid(tmp_path / "grid.png", [rng_images(2, 32, 32)])
    sections = [
        Section(
            "Result <1>",
            "A **bold** `code` & <script>.\n\n- one\n- two",
            [table],
            [Picture(grid, 'A "caption"')],
            [Details("Config", {"a": ("<x>", tmp_path)})],
        ),
        Section("Result 1"),
        Section("猫"),
    ]
    path = write_page(
        tmp_path / "out" / "report.html",
        ODD,
        sections,
        subtitle="sub",
        facts=[("Seeds", "3 < 4")],
    )
    text = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    page.close()
    assert not page.open, page.open
    assert page.ids == {"result-1", "result-1-2", "part-3"}
    assert {link.removeprefix("#") for link in page.links} == page.ids
    assert len(page.sources) == 1 and page.sources[0].startswith("data:image/png;base64,")
    assert "script" not in page.tags and "http" not in text.replace(page.sources[0], "")
    assert "<strong>bold</strong>" in text and "&lt;script&gt;" in text
    assert not list(path.parent.glob("*.tmp"))
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        write_page(path, "t", [Section("s", images=[Picture(tmp_path / "gone.png")])])
    with pytest.raises(ValueError, match=r"gone\.gif: expected one of"):
        write_page(path, "t", [Section("s", images=[Picture(tmp_path / "gone.gif")])])


def test_none_is_best_where_all_tie():
    table = Table(["a", "x", "y"], [["one", 0.5, 0.0], ["two", 0.4, 0.0], ["three", 0.5, 0.0]])
    assert table.best(1) == {0, 2} and table.best(2) == frozenset()


def test_a_table_of_many_columns_goes_on_below():
    columns = ["row", *(f"class {i}" for i in range(10))]
    page = to_html(Table(columns, [["a", *(i / 10 for i in range(10))]]))
    assert page.count("<table>") == 2 and page.count('<th scope="row">a</th>') == 2
    assert all(page.count(f">{name}<") == 1 for name in columns[1:])
    assert to_html(Table(columns[:9], [["a", *range(8)]])).count("<table>") == 1


def test_folded_tables_are_behind_a_line_to_open(tmp_path, table):
    path = write_page(tmp_path / "page.html", "t", [Section("s", folded=[table, table])])
    text = path.read_text("utf-8")
    before, after = text.split("<summary>2 tables</summary>")
    assert "<table>" not in before and after.count("<table>") == 2
    assert "--accent" in before  # the style comes from its file


def test_a_place_of_a_grid_may_stay_empty_and_a_heading_spans_its_group(rng_images):
    one, two = rng_images(2, 32, 32)
    image = np.asarray(image_grid([[one, None, two]], headings=("real", "", "drawn"), tile=32))
    assert (image[-32:, 36:68] == 0).all()  # transparent, not black
    np.testing.assert_array_equal(image[-32:, 72:104, :3], two)
    headings = image[:-36, :, 3]
    middle = np.flatnonzero(headings[:, :68].any(0)).mean()
    assert abs(middle - 34) < 4  # over the middle of its two columns
    with pytest.raises(ValueError, match="no images in 1 row"):
        image_grid([[None]])


def test_letters_that_no_font_has_are_written_as_code_points():
    assert drawable("Größe, λ, Ж") == "Größe, λ, Ж"
    # A letter of the private use area, which is no one's.
    assert drawable("cat \U000f1234") == "cat U+F1234"
    assert font_file("cat").name == "DejaVuSans.ttf"
    shown = drawable("猫")
    assert shown == "猫" or (shown == "U+732B" and font_file("猫").name == "DejaVuSans.ttf")


class _Page(html.parser.HTMLParser):
    """Collects what a page refers to, and checks that its tags close in order."""

    VOID = frozenset({"meta", "img", "br", "hr"})

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.sources = [], set(), set(), [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in attrs:
            assert attrs["id"] not in self.ids
            self.ids.add(attrs["id"])
        if "href" in attrs:
            self.links.append(attrs["href"])
        if "src" in attrs:
            self.sources.append(attrs["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def rng_images():
    def make(number, height, width):
        rng = np.random.default_rng(0)
        return rng.integers(0, 256, (number, height, width, 3), dtype=np.uint8)

    return make


def test_a_legend_of_long_names_stays_in_the_figure(tmp_path):
    names = [f"a long name of something that was trained, {i}" for i in range(5)]
    series = [Series(name, [1, 2], [i, i + 1]) for i, name in enumerate(names)]
    path = plot_scores(tmp_path / "p.png", series, xlabel="x", ylabel="y")
    alpha = np.asarray(Image.open(path))[..., 3]
    assert not alpha[: len(alpha) // 3, -3:].any()  # the legend's third, at the right border
    assert alpha[: len(alpha) // 3].any()
