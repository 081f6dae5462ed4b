"""Bias figures by hand, and of classifiers of which it is known what they go by."""

import json
import sqlite3
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxsynth.data.dataset import SourceError
from jaxsynth.data.procedural.cues import (
    PLAIN,
    hue_of,
    render_backgrounds,
    render_conflicts,
    render_contexts,
)
from jaxsynth.data.procedural.shapes import SHAPES
from jaxsynth.robustness import bias_sets
from jaxsynth.robustness.metrics.bias import (
    background_bias,
    context_bias,
    context_partition,
    decide_by_class,
    decide_by_group,
    shape_bias,
)

SIZE = 32
CLASSES = len(SHAPES)
HUES = np.stack([hue_of(i, CLASSES) for i in range(CLASSES)]).astype(np.float32)


def chroma(images):
    """What is left of each pixel's colour without its grey."""
    return images - images.mean(-1, keepdims=True)


@partial(jax.jit, static_argnames="inside")
def by_colour(images, *, inside: bool):
    """Logits of the class whose hue the coloured pixels have, all or those at the border.

    It cannot see shapes: the pixels are only added up.
    """
    colours = chroma(images)
    if not inside:
        border = jnp.ones(images.shape[1:3]).at[2:-2, 2:-2].set(0)
        colours = colours * border[..., None]
    total = colours.sum((1, 2))
    hues = chroma(jnp.asarray(HUES))
    return total @ (hues / jnp.linalg.norm(hues, axis=1, keepdims=True)).T


def descriptors(mask):
    """Of a shape wherever it lies, however it is turned and large: how far its area reaches."""
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(n) + 0.5 for n in mask.shape[1:]], indexing="ij"))
    area = mask.sum((1, 2))
    middle = (mask[:, None] * grid).sum((2, 3)) / area[:, None]
    squares = jnp.square(grid[None] - middle[:, :, None, None]).sum(1)
    spread = (mask * squares).sum((1, 2)) / area**2
    fourth = (mask * squares**2).sum((1, 2)) / area**3
    farthest = jnp.where(mask > 0.5, squares, 0).max((1, 2)) / area
    return jnp.stack([spread, jnp.sqrt(fourth), farthest], axis=1)


@pytest.fixture(scope="module")
def by_shape():
    """Logits of the class whose shape's descriptor is nearest; it cannot see colours.

    A shape is what is coloured; its prototype is the mean of drawn masks of its class.
    """
    drawn = render_conflicts(2, 64, seed=9)
    found = np.asarray(jax.jit(descriptors)(drawn.masks / np.float32(255)))
    prototypes = np.stack([found[drawn.shapes == c].mean(0) for c in range(CLASSES)])
    spread = np.stack([found[drawn.shapes == c].std(0) for c in range(CLASSES)]).mean(0)

    @jax.jit
    def predict(images):
        coloured = jnp.linalg.norm(chroma(images), axis=-1) > 40
        features = descriptors(coloured.astype(jnp.float32))
        return -jnp.square((features[:, None] - prototypes) / spread).sum(-1)

    return predict


class TestContext:
    def test_partitions_and_cb_are_the_formulas(self, key):
        rng = np.random.default_rng(0)
        uncommon = rng.random((400, 3)) < 0.3
        partition = context_partition(uncommon)
        correct = rng.random(400) < 0.9 - 0.2 * partition
        found = context_bias(correct, partition, key, resamples=200)
        np.testing.assert_array_equal(partition, uncommon.astype(int).sum(1))
        for k in range(4):
            among = correct[partition == k]
            assert found.images[k] == len(among)
            assert found.accuracy[k].value == pytest.approx(among.mean())
            if k:
                expected = 100 * among.mean() / correct[partition == 0].mean()
                assert found.cb[k].value == pytest.approx(expected, rel=1e-5)
                assert found.cb[k].low < expected < found.cb[k].high
        # P3 has a few images only: its interval is the widest.
        widths = [found.cb[k].high - found.cb[k].low for k in (1, 2, 3)]
        assert widths[2] == max(widths)

    def test_a_classifier_of_backgrounds_fails_where_they_are_uncommon(self, key):
        """Right exactly where the location is common: 2 of 3 in P1, 1 of 3 in P2, none in P3."""
        contexts = bias_sets.drawn_contexts(2, SIZE, 0)
        images = contexts.source.images.astype(np.float32)
        correct = by_colour(images, inside=False).argmax(1) == contexts.source.labels
        np.testing.assert_array_equal(correct, ~contexts.uncommon[:, 2])
        partition = context_partition(contexts.uncommon)
        found = context_bias(np.asarray(correct), partition, key, resamples=200)
        assert found.accuracy[0].value == 1
        values = [found.cb[k].value for k in (1, 2, 3)]
        np.testing.assert_allclose(values, [200 / 3, 100 / 3, 0], atol=1e-3)
        # Who goes by shapes alone does not care.
        blind = context_bias(np.ones(len(correct), bool), partition, key, resamples=200)
        assert [blind.cb[k].value for k in (1, 2, 3)] == pytest.approx([100] * 3)

    def test_missing_partitions_are_named(self, key):
        correct, partition = np.ones(9, bool), np.repeat([0, 1, 2], 3)
        with pytest.raises(ValueError, match="no image in P3; found P0 with 3, P1 with 3, P2 with"):
            context_bias(correct, partition, key)
        with pytest.raises(ValueError, match="no image of P0 is right"):
            context_bias(partition > 0, partition, key, partitions=(0, 1))
        found = context_bias(correct, partition, key, partitions=(0, 1, 2), resamples=200)
        assert found.cb.keys() == {1, 2}


class TestShapeBias:
    def test_figures_are_counted_by_hand(self, key):
        shapes = np.array([0, 0, 0, 1, 1, 2, 2])
        textures = np.array([1, 2, 0, 0, 2, 0, 1])
        # Shape, texture, (no conflict), shape, neither, texture, texture.
        decisions = np.array([0, 2, 0, 1, 0, 0, 1])
        names = ("a", "b", "c")
        found = shape_bias(decisions, shapes, textures, names, key, resamples=200)
        assert found.images == 6 and found.overall.value == pytest.approx(2 / 5)
        assert found.per_class == {"a": 0.5, "b": 1, "c": 0}
        assert found.accuracy["shape"].value == pytest.approx(2 / 6)
        assert found.accuracy["texture"].value == pytest.approx(3 / 6)
        by_decision = shape_bias(
            decisions, shapes, textures, names, key, per_class="decision", resamples=200
        )
        assert by_decision.per_class == {"a": 0.5, "b": 0.5, "c": 0}

    def test_a_classifier_of_textures_has_none_and_one_of_shapes_all(self, key, by_shape):
        conflicts = bias_sets.drawn_conflicts(1, 64, 0)
        images = conflicts.source.images.astype(np.float32)
        shapes, textures = conflicts.source.labels, conflicts.textures
        found = {}
        for name, logits in (
            ("texture", by_colour(images, inside=True)),
            ("shape", by_shape(images)),
        ):
            decisions = np.asarray(logits.argmax(1))
            found[name] = shape_bias(
                decisions, shapes, textures, conflicts.names, key, resamples=200
            )
        assert found["texture"].overall.value == 0 < found["texture"].overall.high < 0.1
        assert found["texture"].accuracy["texture"].value == 1
        assert found["shape"].overall.value == 1
        assert found["shape"].accuracy["shape"].value > 0.9
        assert found["shape"].images == CLASSES * (CLASSES - 1)

    def test_what_does_not_conflict_is_refused(self, key):
        same = np.arange(3)
        with pytest.raises(ValueError, match="expected images that conflict"):
            shape_bias(same, same, same, "abc", key)
        with pytest.raises(ValueError, match="no image was decided by its shape or its texture"):
            shape_bias(same, (same + 1) % 3, (same + 2) % 3, "abc", key)
        with pytest.raises(ValueError, match="decisions: 1 of 3 outside 0 to 1, the first is 2"):
            shape_bias(same, same % 2, same % 2, "ab", key)


class TestBackgrounds:
    def test_a_classifier_of_backgrounds_has_the_whole_gap(self, key):
        sets = bias_sets.drawn_backgrounds(2, SIZE, 0)
        right = {
            name: np.asarray(
                by_colour(source.images.astype(np.float32), inside=False).argmax(1) == source.labels
            )
            for name in bias_sets.VARIANTS
            for source in [getattr(sets, name)]
        }
        found = background_bias(**right, key=key, paired=sets.paired, resamples=200)
        assert found.original.value == found.mixed_same.value == 1
        assert (
            found.mixed_rand.value == 0 and found.gap.low < found.gap.value == found.gap.high == 1
        )

    def test_pairs_make_the_gap_surer(self, key):
        rng = np.random.default_rng(0)
        same = rng.random(300) < 0.7
        random = same & (rng.random(300) < 0.9)
        paired, apart = (
            background_bias(same, same, random, key, paired=paired, resamples=500).gap
            for paired in (True, False)
        )
        assert paired.value == pytest.approx(apart.value, abs=1e-6)
        assert paired.value == pytest.approx(same.mean() - random.mean(), abs=1e-6)
        assert paired.error < 0.6 * apart.error
        with pytest.raises(ValueError, match="mixed_rand: 299 images, expected the 300 of mixed"):
            background_bias(same, same, random[1:], key, paired=True)


class TestDecisions:
    def test_classes_and_groups_decide_differently(self):
        """The likeliest class is in no group; the group of two has the higher mean."""
        logits = np.log(np.array([[0.4, 0.25, 0.2, 0.1, 0.05]], np.float32))
        groups = {"one": [1, 4], "two": [2, 3]}
        assert decide_by_class(logits, groups, ("one", "two")).tolist() == [-1]
        # Means of .15 each, so the tie is broken by a little.
        logits[0, 3] += 0.1
        assert decide_by_group(logits, groups, ("one", "two")).tolist() == [1]
        assert decide_by_class(logits[:, 1:], {"one": [0, 3], "two": [1, 2]}, ("one", "two")) == [0]

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ({"a": [0]}, r"class map: missing \['b'\], unexpected \[\]"),
            ({"a": [0], "b": [1], "c": [2]}, r"unexpected \['c'\]"),
            ({"a": [0], "b": [4]}, "class map, 'b': 4 is outside 0 to 3"),
            ({"a": [0, 1], "b": [1]}, "class map: class 1 is in a and b"),
        ],
    )
    def test_maps_that_do_not_match_are_refused(self, groups, message):
        with pytest.raises(ValueError, match=message):
            decide_by_class(np.zeros((2, 4), np.float32), groups, ("a", "b"))


class TestDrawn:
    def test_cues_are_what_they_are_said_to_be(self):
        found = render_conflicts(1, SIZE, 0)
        assert len(found) == CLASSES**2 and (found.backgrounds == PLAIN).all()
        assert (found.shapes == found.textures).sum() == CLASSES
        inside, outside = found.masks == 255, found.masks == 0
        for image, within, without, texture in zip(
            found.images.astype(float), inside, outside, found.textures, strict=True
        ):
            # Grey outside; inside all pixels have the texture's hue.
            assert np.abs(chroma(image)[without]).max() < 10
            hue = chroma(HUES)[texture]
            colours = chroma(image)[within].mean(0)
            assert colours @ hue > 0.999 * np.linalg.norm(colours) * np.linalg.norm(hue)
        assert ((found.depths > 0) == (found.masks >= 128)).all()
        rows = (inside.sum((1, 2)), found.places, found.depths.max((1, 2)))
        assert rows[0].min() > 20 and (rows[1] > 3).all() and (rows[1] < SIZE - 3).all()
        # The nearer, the larger: of one shape.
        circles = found.shapes == 0
        covered = found.masks.sum((1, 2), dtype=float)[circles]
        assert np.corrcoef(rows[2][circles], np.sqrt(covered))[0, 1] > 0.98

    def test_backgrounds_share_their_foregrounds(self):
        found = render_backgrounds(2, SIZE, 0)
        first = found["original"]
        for cues in found.values():
            np.testing.assert_array_equal(cues.masks, first.masks)
            covered = first.masks == 255
            difference = cues.images[covered].astype(int) - first.images[covered]
            assert np.abs(difference).max() < 20
        assert (found["mixed_same"].backgrounds == first.shapes).all()
        assert (found["mixed_rand"].backgrounds != first.shapes).all()
        assert not np.array_equal(found["mixed_same"].images, first.images)

    def test_contexts_are_all_ways_and_repeatable(self):
        found, again = (render_contexts(1, SIZE, 3) for _ in range(2))
        np.testing.assert_array_equal(found.images, again.images)
        assert not np.array_equal(found.images, render_contexts(1, SIZE, 4).images)
        assert len(found) == 8 * CLASSES
        brightness = found.images.mean((1, 2, 3))
        assert brightness[found.night].mean() < 0.6 * brightness[~found.night].mean()
        assert set(found.weathers) == {0, 1, 2, 3}
        with pytest.raises(ValueError, match="classes: expected 1 to 8, found 9"):
            render_contexts(1, SIZE, 0, classes=9)


def write(path, shade=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)


class TestFolders:
    def test_cue_conflict(self, tmp_path):
        for name in ("cat/cat1-dog2.png", "cat/cat10-cat1.png", "dog/dog3-cat7.png"):
            write(tmp_path / name)
        found = bias_sets.read_conflicts(tmp_path)
        assert found.names == ("cat", "dog")
        assert found.source.labels.tolist() == [0, 0, 1]
        assert found.textures.tolist() == [1, 0, 0]
        write(tmp_path / "dog" / "dog4.png")
        with pytest.raises(SourceError, match=r"dog4\.png: expected a name like dog1-cat2"):
            bias_sets.read_conflicts(tmp_path)

    def test_imagenet_9(self, tmp_path):
        for variant in bias_sets.VARIANTS[:2]:
            for name in ("00_dog", "01_bird"):
                write(tmp_path / variant / "val" / name / "1.JPEG")
        with pytest.raises(SourceError, match="mixed_rand: no such folder; expected original"):
            bias_sets.read_backgrounds(tmp_path)
        write(tmp_path / "mixed_rand" / "val" / "00_dog" / "1.JPEG")
        with pytest.raises(SourceError, match=r"its classes differ .* missing \['01_bird'\]"):
            bias_sets.read_backgrounds(tmp_path)
        write(tmp_path / "mixed_rand" / "val" / "01_bird" / "1.JPEG")
        found = bias_sets.read_backgrounds(tmp_path)
        assert found.names == ("00_dog", "01_bird") and not found.paired
        assert found.mixed_rand.labels.tolist() == [0, 1]
        path = tmp_path / "in_to_in9.json"
        path.write_text(json.dumps({"0": -1, "1": 1, "2": 0, "3": 1}))
        assert bias_sets.read_class_map(path, found.names) == {"00_dog": (2,), "01_bird": (1, 3)}
        path.write_text(json.dumps({"a": [0, 2], "b": [1]}))
        assert bias_sets.read_class_map(path, "ab") == {"a": (0, 2), "b": (1,)}
        path.write_text(json.dumps({"0": 2}))
        with pytest.raises(SourceError, match=r"'0': 2; expected a list of classes for each name"):
            bias_sets.read_class_map(path, found.names)

    def test_focus(self, tmp_path):
        rows = [
            (1, "./truck/a.jpg", "truck", "day", "sunny", "street", "yes"),
            (2, "./truck/b.jpg", "truck", "night", "foggy", "street, snow", "yes"),
            (3, "./frog/c.jpg", "frog", "night", "none", "grass", "no"),
        ]
        path = tmp_path / "annotations.db"
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE rows (i, file, kind, time, weather, place, humans)")
        database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        database.commit()
        with pytest.raises(SourceError, match=r"truck/a\.jpg: no such file, but .*annotations\.db"):
            bias_sets.read_focus(tmp_path)
        for row in rows:
            write(tmp_path / row[1])
        found = bias_sets.read_focus(tmp_path)
        assert found.source.labels.tolist() == [0, 0, 8]
        assert context_partition(found.uncommon).tolist() == [0, 3, 0]
        assert found.source[1].image.shape == (8, 8, 3)
        database.execute("UPDATE rows SET weather = 'hail' WHERE i = 2")
        database.commit()
        database.close()
        with pytest.raises(SourceError, match=r"no table with .* found rows \(i, file, kind"):
            bias_sets.read_focus(tmp_path)
        path.write_text("nothing of the kind, but long enough to be told from an empty file")
        with pytest.raises(SourceError, match="not an SQLite file"):
            bias_sets.read_focus(tmp_path)

    def test_focus_in_partitions(self, tmp_path):
        for name in ("P0/truck/a.jpg", "P1/bird/b.jpg", "P1/truck/c.jpg", "P3/truck/d.jpg"):
            write(tmp_path / name)
        with pytest.raises(SourceError, match="P2: no such folder; expected P0, P1, P2, P3"):
            bias_sets.read_focus(tmp_path)
        write(tmp_path / "P2" / "lorry" / "e.jpg")
        with pytest.raises(SourceError, match=r"P2: \['lorry'\] are none of FOCUS's classes"):
            bias_sets.read_focus(tmp_path)
        (tmp_path / "P2" / "lorry").rename(tmp_path / "P2" / "cat")
        found = bias_sets.read_focus(tmp_path)
        assert found.source.labels.tolist() == [0, 9, 0, 4, 0]
        assert context_partition(found.uncommon).tolist() == [0, 1, 1, 2, 3]
        assert found.source[4].id == "P3/truck/d.jpg"

    def test_focus_classes_are_the_published_ones(self):
        groups = bias_sets.FOCUS_CLASSES
        assert tuple(groups) == bias_sets.FOCUS_NAMES
        assert len(groups["bird"]) == 59 and len(groups["dog"]) == 121
        assert decide_by_class(
            np.eye(1000, dtype=np.float32)[[404, 1]], groups, tuple(groups)
        ).tolist() == [2, -1]
