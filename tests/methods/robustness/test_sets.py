"""Published sets by config: read lazily, at a model's size, among its classes."""

import pytest

from jaxsynth.core.config import ConfigError, to_dataclass
from jaxsynth.data.dataset import SourceError
from jaxsynth.data.procedural.shapes import SHAPES
from jaxsynth.methods.robustness.sets import SetsConfig, load_sets
from tests.methods.robustness.published_sets import FOLDER, every, write, write_sets


def load(**fields):
    return load_sets(to_dataclass(SetsConfig, fields), size=32, per_class=2, seed=0)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("published"))


def test_drawn_sets_are_the_default():
    found = load()
    assert found.words == SHAPES and len(found.sets.clean) == 2 * len(SHAPES)
    assert found.sets.conflict is not None and list(found.sets.ood) == ["textures"]


def test_published_sets_are_read_as_they_lie(published):
    found = load(**every(published))
    sets = found.sets
    assert found.words == SHAPES and len(sets.clean) == 16
    assert sets.subsets == {"sketch": [1, 3, 5, 7]}
    assert sets.shifted["sketch"].labels.tolist() == [7, 5, 1, 3]
    assert len(sets.ood["strange"]) == 2
    assert sets.depth_folder == published / "depth"
    rows = sets.corrupted["snow"]
    assert len(rows) == 5 and rows[2].labels.tolist() == sets.clean.labels.tolist()
    # The sets' classes in sorted order are groups of one of the model's each.
    names = sorted(SHAPES)
    expected = {name: (SHAPES.index(name),) for name in names}
    assert sets.class_maps == {"conflict": expected, "background": expected}
    assert sets.conflict.names == sets.background.names == tuple(names)
    assert sets.context is None


def test_focus_by_partition(published):
    one = {**FOLDER, "path": str(published / "focus")}
    with pytest.raises(SourceError, match=r"sets\.context\.class_map: missing: the set's classes "):
        load(**{**every(published), "context": one})
    mapped = {**one, "class_map": str(published / "focus.json")}
    found = load(**{**every(published), "context": mapped})
    assert found.sets.context.uncommon.sum(1).tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert found.sets.class_maps["context"]["car"] == (1,)


def test_what_does_not_fit_is_named(published, tmp_path):
    sets = every(published)
    with pytest.raises(SourceError, match="sets: a set of source 'folder' needs its path"):
        load(clean=FOLDER)
    with pytest.raises(ConfigError, match=r"clean\.source='zip'.*expected one of nothing, "):
        load(clean={"source": "zip"})
    with pytest.raises(ConfigError, match=r"ood: of sets in files, but the clean set is drawn"):
        load(ood=sets["ood"])
    with pytest.raises(ConfigError, match=r"source: there is a path; expected folder, tfds"):
        load(clean={"source": "", "path": "a"})
    with pytest.raises(SourceError, match=r"sets\.shifted\.R: expected a source: folder, tfds"):
        load(**{**sets, "shifted": {"R": {}}})
    with pytest.raises(SourceError, match=r"sets\.ood\.N: expected a source: folder or tfds"):
        load(**{**sets, "ood": {"N": {}}})
    with pytest.raises(SourceError, match="source 'cifar10', expected folder"):
        load(**{**sets, "conflict": {"source": "cifar10", "path": "a"}})
    with pytest.raises(SourceError, match=r"sets\.corrupted\.c: source 'tfds', expected folder"):
        load(**{**sets, "corrupted": {"c": {"source": "tfds"}}})
    with pytest.raises(SourceError, match=r"sets\.corrupted\.d: \['snow'\] are in a set before"):
        load(**{**sets, "corrupted": {**sets["corrupted"], "d": sets["corrupted"]["c"]}})
    with pytest.raises(SourceError, match=r"no corruption 'fog'; found \['snow'\]"):
        load(**{**sets, "corrupted": {"c": {**sets["corrupted"]["c"], "kinds": ["fog"]}}})
    write(tmp_path / "hexagon" / "1.png")
    other = {**FOLDER, "path": str(tmp_path)}
    with pytest.raises(SourceError, match=r"1 of 1 classes are none of the model's 8 .*'hexagon'"):
        load(**{**sets, "shifted": {"R": other}})
