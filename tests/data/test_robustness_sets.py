"""Published sets, in small folders of the same layout."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxsynth.data import robustness_sets as sets
from jaxsynth.data.dataset import SourceError
from jaxsynth.data.decode import ImageError
from jaxsynth.data.robustness_sets import CIFAR10_CLASSES, LabelSpace
from jaxsynth.data.sources.arrays import ArraySource

WNIDS = tuple(f"n0144{i:04d}" for i in range(12))
SPACE = LabelSpace(WNIDS, tuple(f"thing {i}" for i in range(12)))


def write(path, shade=100, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 0)).save(path)


class TestLabelSpace:
    def test_is_read_from_every_kind_of_file(self, tmp_path):
        index = {str(i): [name, f"big_thing_{i}"] for i, name in enumerate(WNIDS)}
        mapping = "".join(f"{name} fish {i}, sea fish\n" for i, name in enumerate(WNIDS))
        words = ("tabby cat", "dog", "cow", "red fox")
        for name, text, expected in (
            ("index.json", json.dumps(index), (WNIDS, "big thing 3")),
            ("mapping.txt", mapping, (WNIDS, "fish 3")),
            ("synsets.txt", "\n".join(WNIDS), (WNIDS, WNIDS[3])),
            ("words.txt", "tabby cat\ndog\n\ncow\nred fox\n", (words, "red fox")),
        ):
            (tmp_path / name).write_text(text)
            found = sets.read_label_space(tmp_path / name)
            assert (found.names, found.words[3]) == expected

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.json", '{"0": ["n01", "a"], "2": ["n02", "b"]}', "with every number once"),
            ("a.json", '{"0": "cat", "1": "dog"}', "with every number once"),
            ("a.txt", "\n", "holds no class"),
            ("a.txt", "cat\ncat\n", "2 names, 1 of them different"),
        ],
    )
    def test_other_files_are_named(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(SourceError, match=message):
            sets.read_label_space(tmp_path / name)
        with pytest.raises(SourceError, match=r"none\.txt: no such file; expected the model's cl"):
            sets.read_label_space(tmp_path / "none.txt")


class TestLabelled:
    def test_some_classes_are_places_among_all(self, tmp_path):
        """ImageNet-R, -A and -Sketch; the label is the model's, not the folder's number."""
        for i in (7, 2, 11):
            write(tmp_path / WNIDS[i] / "art_0.jpg", shade=10 * i)
        (tmp_path / "README.txt").write_text("ImageNet-R")
        source, space = sets.read_labelled(tmp_path, SPACE)
        assert space is SPACE and source.labels.tolist() == [2, 7, 11]
        assert source[1].label == 7 and abs(int(source[1].image[0, 0, 0]) - 70) < 4
        write(tmp_path / "n09999999" / "a.jpg")
        with pytest.raises(
            SourceError, match=r"1 of 4 classes are none of the model's 12 .*n09999"
        ):
            sets.read_labelled(tmp_path, SPACE)

    def test_without_a_space_the_folders_are_one(self, tmp_path):
        for name in ("fox", "cat"):
            write(tmp_path / name / "1.png")
        source, space = sets.read_labelled(tmp_path)
        assert space.names == ("cat", "fox") and source.labels.tolist() == [0, 1]

    def test_numbered_folders_are_numbers(self, tmp_path):
        """ImageNet-V2: sorted as text, 10 comes before 2."""
        for i in (0, 2, 10):
            write(tmp_path / str(i) / "a.jpeg")
        source, _ = sets.read_labelled(tmp_path, SPACE)
        assert dict(zip(source.ids, source.labels, strict=True)) == {
            "0/a.jpeg": 0, "2/a.jpeg": 2, "10/a.jpeg": 10
        }  # fmt: skip
        with pytest.raises(SourceError, match="class folders are numbers, which need the model's"):
            sets.read_labelled(tmp_path)
        write(tmp_path / "12" / "a.jpeg")
        with pytest.raises(SourceError, match="class folder 12, expected 0 to 11"):
            sets.read_labelled(tmp_path, SPACE)

    def test_images_side_by_side_have_a_file_of_labels(self, tmp_path):
        root, labels = tmp_path / "val", tmp_path / "labels.txt"
        for i in (1, 2, 10):
            write(root / f"ILSVRC2012_val_{i:08d}.JPEG")
        rows = [f"ILSVRC2012_val_{i:08d},{WNIDS[i]} 1 2 3 4 {WNIDS[0]} 1 2 3 4" for i in (10, 1, 2)]
        for text in (
            "\n".join(["ImageId,PredictionString", *rows]),
            "\n".join(WNIDS[i] for i in (1, 2, 10)),
            "\n".join(f"ILSVRC2012_val_{i:08d}.JPEG {WNIDS[i]}" for i in (1, 2, 10)),
        ):
            labels.write_text(text)
            source, _ = sets.read_labelled(root, SPACE, labels=labels)
            assert source.labels.tolist() == [1, 2, 10]
        for text, message in (
            (WNIDS[0], "1 label for 3 images"),
            ("\n".join(rows[:2]), r"2 labels for 3 images in .*, 1 of them without one"),
            ("\n".join(["n09999999"] * 3), "1 of 1 classes are none of the model's 12"),
        ):
            labels.write_text(text)
            with pytest.raises(SourceError, match=message):
                sets.read_labelled(root, SPACE, labels=labels)
        with pytest.raises(SourceError, match="need the model's classes"):
            sets.read_labelled(root, labels=labels)
        with pytest.raises(SourceError, match="no such file; expected the classes of the images"):
            sets.read_labelled(root, SPACE, labels=tmp_path / "none.txt")
        (root / "deeper").mkdir()
        with pytest.raises(SourceError, match="deeper: a folder, expected images side by side"):
            sets.read_labelled(root, SPACE, labels=labels)


class TestImages:
    def test_of_no_class_lie_at_any_depth(self, tmp_path):
        """SUN397, Textures, NINCO and flat subsets."""
        for name in ("a/abbey/sun_2.jpg", "a/abbey/sun_10.jpg", "b/bar/indoor/sun_1.jpg", "x.png"):
            write(tmp_path / name)
        (tmp_path / "ClassName.txt").write_text("/a/abbey")
        (tmp_path / ".DS_Store").write_text("")
        source = sets.read_images(tmp_path)
        assert source.ids == (
            "a/abbey/sun_2.jpg", "a/abbey/sun_10.jpg", "b/bar/indoor/sun_1.jpg", "x.png"
        )  # fmt: skip
        assert (source.labels == -1).all() and source[2].image.shape == (6, 8, 3)
        files = tmp_path / "list.txt"
        files.write_text("x.png -1\nb/bar/indoor/sun_1.jpg 4\n")
        assert sets.read_images(tmp_path, files=files).ids == ("b/bar/indoor/sun_1.jpg", "x.png")
        files.write_text("x.jpg\n")
        with pytest.raises(SourceError, match=r"x\.jpg: no such file, but .*list\.txt lists it"):
            sets.read_images(tmp_path, files=files)
        (tmp_path / "a" / "film.mp4").write_text("")
        with pytest.raises(SourceError, match=r"film\.mp4: not an image file"):
            sets.read_images(tmp_path)

    def test_nothing_is_an_error(self, tmp_path):
        with pytest.raises(SourceError, match="no images found"):
            sets.read_images(tmp_path)
        with pytest.raises(SourceError, match="no such folder"):
            sets.read_images(tmp_path / "none")
        (tmp_path / "a.jpg").write_text("no image")
        with pytest.raises(ImageError, match=r"a\.jpg: cannot be decoded"):
            sets.read_images(tmp_path)[0]

    def test_a_part_is_spread_over_the_whole(self):
        source = ArraySource(np.zeros((10, 2, 2, 3), np.uint8), np.arange(10), list("abcdefghij"))
        assert sets.evenly(source, 4).labels.tolist() == [0, 2, 5, 7]
        assert sets.evenly(source, 0) is sets.evenly(source, 11) is source
        with pytest.raises(SourceError, match="count: expected 0"):
            sets.evenly(source, -1)


class TestImageNetC:
    @pytest.fixture
    def clean(self, tmp_path):
        for wnid, number in ((WNIDS[3], 7), (WNIDS[3], 11), (WNIDS[5], 1)):
            write(tmp_path / "val" / wnid / f"ILSVRC2012_val_{number:08d}.png")
            for severity in sets.SEVERITIES:
                for kind in ("snow", "fog"):
                    name = f"ILSVRC2012_val_{number:08d}.JPEG"
                    folder = tmp_path / "c" / kind / str(severity) / wnid
                    write(folder / name, shade=20 * severity + number)
        return sets.read_labelled(tmp_path / "val", SPACE)[0]

    def test_images_are_those_of_the_clean_ones(self, clean, tmp_path):
        found = sets.read_imagenet_c(tmp_path / "c", sets.evenly(clean, 2), SPACE)
        assert list(found) == ["fog", "snow"] and len(found["fog"]) == 5
        assert found["snow"][4].labels.tolist() == [3, 3]
        assert [int(r.image[0, 0, 0]) for r in found["snow"][4]] == pytest.approx([107, 111], abs=3)
        assert list(sets.read_imagenet_c(tmp_path / "c", clean, SPACE, ("fog",))) == ["fog"]

    def test_what_is_missing_is_named(self, clean, tmp_path):
        with pytest.raises(SourceError, match=r"no corruption 'frost'; found \['fog', 'snow'\]"):
            sets.read_imagenet_c(tmp_path / "c", clean, SPACE, ("frost",))
        gone = tmp_path / "c" / "snow" / "3" / WNIDS[5]
        (gone / "ILSVRC2012_val_00000001.JPEG").unlink()
        with pytest.raises(
            SourceError, match=rf"3/{WNIDS[5]}/ILSVRC2012_val_00000001: no such ima"
        ):
            sets.read_imagenet_c(tmp_path / "c", clean, SPACE)
        gone.rmdir()
        with pytest.raises(SourceError, match=rf"{WNIDS[5]}: no such folder of a class"):
            sets.read_imagenet_c(tmp_path / "c", clean, SPACE)
        (tmp_path / "c" / "snow" / "3").rename(tmp_path / "c" / "snow" / "three")
        with pytest.raises(SourceError, match="snow/3: no such folder; expected severities 1 to 5"):
            sets.read_imagenet_c(tmp_path / "c", clean, SPACE)


class TestCifar:
    SPACE = LabelSpace(CIFAR10_CLASSES[::-1], CIFAR10_CLASSES[::-1])

    @pytest.fixture
    def root(self, tmp_path):
        rng = np.random.default_rng(0)
        labels = np.array([3, 8, 0, 6], np.uint8)
        images = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
        rows = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(4, -1)], 1)
        (tmp_path / "cifar-10-batches-bin").mkdir()
        rows.tofile(tmp_path / "cifar-10-batches-bin" / "test_batch.bin")
        np.save(tmp_path / "labels.npy", np.tile(labels, 5).astype(np.int64))
        shades = np.repeat(np.arange(5, dtype=np.uint8) * 50, 4)[:, None, None, None]
        np.save(tmp_path / "snow.npy", np.tile(images, (5, 1, 1, 1)) // 255 + shades)
        return tmp_path

    def test_is_read_in_its_order(self, root):
        source, space = sets.read_cifar10(root)
        assert source.labels.tolist() == [3, 8, 0, 6] and space.names == CIFAR10_CLASSES
        data = np.fromfile(root / "cifar-10-batches-bin" / "test_batch.bin", np.uint8)
        assert source.images[1, 2, 3, 1] == data[3073 + 1 + 1024 + 2 * 32 + 3]
        found = sets.read_cifar10_c(root, sets.evenly(source, 2), space)
        assert list(found) == ["snow"] and len(found["snow"]) == 5
        assert [r.label for r in found["snow"][3]] == [3, 0]
        assert [int(r.image.max()) // 50 for r in found["snow"][3]] == [3, 3]

    def test_labels_are_the_models(self, root):
        """Of a model that has the classes in another order."""
        source, _ = sets.read_cifar10(root)
        turned = ArraySource(source.images, 9 - source.labels, source.ids)
        assert sets.read_cifar10_c(root, turned, self.SPACE)["snow"][0].labels.tolist() == [
            6, 1, 9, 3
        ]  # fmt: skip

    def test_what_does_not_fit_is_named(self, root):
        source, space = sets.read_cifar10(root)
        turned = ArraySource(source.images, source.labels[::-1], source.ids)
        with pytest.raises(SourceError, match="not the labels of the clean images, whose order"):
            sets.read_cifar10_c(root, turned, space)
        with pytest.raises(SourceError, match=r"no corruption 'fog'; found \['snow'\]"):
            sets.read_cifar10_c(root, source, space, ("fog",))
        with pytest.raises(SourceError, match="10 of 10 classes are none of the model's 12"):
            sets.read_cifar10_c(root, source, SPACE)
        np.save(root / "snow.npy", np.zeros((20, 32, 32, 3), np.float32))
        with pytest.raises(SourceError, match=r"snow\.npy: float32 .* expected uint8 \(20, height"):
            sets.read_cifar10_c(root, source, space)
        np.save(root / "labels.npy", np.arange(20))
        with pytest.raises(SourceError, match=r"labels\.npy: from 0 to 19, expected 0 to 9"):
            sets.read_cifar10_c(root, source, space)
        np.save(root / "labels.npy", np.zeros(7))
        with pytest.raises(SourceError, match=r"labels\.npy: float64 \(7,\), expected integers"):
            sets.read_cifar10_c(root, source, space)
        (root / "labels.npy").unlink()
        with pytest.raises(
            SourceError, match=r"labels\.npy: no such file; expected it as in CIFAR"
        ):
            sets.read_cifar10_c(root, source, space)
        path = root / "cifar-10-batches-bin" / "test_batch.bin"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(SourceError, match="12291 bytes, expected a multiple of 3073"):
            sets.read_cifar10(root)
