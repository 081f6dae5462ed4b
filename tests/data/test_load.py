"""Sources: digits, folders with every kind of image file, subsets, caching."""

import shutil

import numpy as np
import pytest
from PIL import Image

from jaxsynth.data.dataset import DataConfig, ImageSource, SourceError
from jaxsynth.data.decode import ImageError, decode_image, encode_png, square
from jaxsynth.data.load import load_dataset
from jaxsynth.data.names import class_of_folder, natural_key, safe_name
from jaxsynth.data.repeats import repeats
from jaxsynth.data.sources.arrays import cached
from jaxsynth.data.views import Subset, joined
from jaxsynth.runs.sources import data_source

COLOUR = (200, 30, 90)


def photo(path, colour=COLOUR, size=(12, 9), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for split, count in (("train", 11), ("test", 2)):
        for name in ("F/A-18", "crème brûlée", "plain"):
            for i in range(count):
                photo(root / split / safe_name(name) / f"{i}.png", (i, 0, 0))
    return root


def test_digits():
    data = load_dataset(DataConfig())
    assert data.display_names[3] == "three" and data.class_names[3] == "3"
    assert len(data.train) + len(data.test) == 1797
    assert abs(len(data.train) - len(data.test)) <= 10
    assert not set(data.train.ids) & set(data.test.ids)
    record = data.train[0]
    assert record.image.shape == (32, 32, 3) and record.image.dtype == np.uint8
    assert record.image.min() == 0 and record.image.max() == 255
    assert record.image[0, 0].max() < 128, "the background is black"
    assert [data.train[i].label for i in range(20)] == list(data.train.labels[:20])
    assert all(isinstance(part, ImageSource) for part in (data.train, data.test))
    assert load_dataset(DataConfig(image_size=16)).test[5].image.shape == (16, 16, 3)


def test_digits_to_choose_settings_by():
    """None of the test images is among them."""
    data, own = load_dataset(DataConfig()), load_dataset(DataConfig(test_split="validation"))
    assert set(own.train.ids) | set(own.test.ids) == set(data.train.ids)
    assert not set(own.train.ids) & set(own.test.ids) and abs(len(own.train) - len(own.test)) <= 10
    assert own.split == "half of the training digits; the test digits are not seen"
    with pytest.raises(SourceError, match="digits have no 'small', only 'validation', or nothing"):
        load_dataset(DataConfig(test_split="small"))


def test_class_subset_renumbers():
    data = load_dataset(DataConfig(class_names=("7", "2")))
    assert data.display_names == ("seven", "two")
    assert set(data.train.labels) == {0, 1}
    record = data.train[int(np.flatnonzero(data.train.labels == 0)[0])]
    assert record.label == 0 and record.id.startswith("7/")
    with pytest.raises(SourceError, match="'12' is not a class of digits"):
        load_dataset(DataConfig(class_names=("12",)))


def test_folder_with_splits(folder):
    (folder / "train" / ".DS_Store").write_text("hidden")
    data = load_dataset(DataConfig(source="folder", path=str(folder), name="pets"))
    assert data.class_names == ("F/A-18", "crème brûlée", "plain")
    assert data.template == "a pet photo of a {}"
    assert [i.split("/")[1] for i in data.train.ids[:11]] == [f"{i}.png" for i in range(11)]
    assert len(data.test) == 6 and data.split == "the folder test/"
    assert data.train[10].image[0, 0, 0] == 10


def test_folder_held_out_is_seeded(folder):
    def ids(seed):
        config = DataConfig(
            source="folder", path=str(folder / "train"), split_seed=seed, test_fraction=0.3
        )
        data = load_dataset(config)
        assert not set(data.train.ids) & set(data.test.ids)
        assert np.bincount(data.test.labels).tolist() == [3, 3, 3]
        assert "seed" in data.split
        return data.test.ids

    assert ids(0) == ids(0) != ids(1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "train/plain/notes.txt").write_text("x"), "notes.txt: not an image file"),
        (lambda r: (r / "train/plain/more").mkdir(), "more: a folder inside"),
        (lambda r: (r / "train/empty").mkdir(), "class 'empty' has no images"),
        (lambda r: photo(r / "test/other/1.png"), r"unexpected \['other'\]"),
        (lambda r: photo(r / "stray.png"), "stray.png: a file beside train"),
        (lambda r: photo(r / "cats/1.png"), r"found \['cats'\] beside train/"),
    ],
)
def test_folder_errors_name_the_path(folder, spoil, message):
    spoil(folder)
    with pytest.raises(SourceError, match=message):
        load_dataset(DataConfig(source="folder", path=str(folder)))


def test_image_size_crops_the_centre(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert (square(wide, 10) == 255).all()
    photo(tmp_path / "a" / "1.jpg", size=(40, 21))
    photo(tmp_path / "a" / "2.jpg", size=(21, 40))
    data = load_dataset(DataConfig(source="folder", path=str(tmp_path), image_size=16))
    assert data.train[0].image.shape == data.test[0].image.shape == (16, 16, 3)


def test_every_kind_of_file_becomes_rgb(tmp_path):
    def near(path, colour, tolerance=6):
        image = decode_image(path)
        assert image.dtype == np.uint8 and image.shape[2] == 3
        assert np.abs(image.astype(int) - colour).max() <= tolerance, (path, image[0, 0])

    rgb = Image.new("RGB", (8, 6), COLOUR)
    for suffix in ("jpg", "png", "webp", "bmp", "ppm", "tif"):
        rgb.save(tmp_path / f"rgb.{suffix}")
        near(tmp_path / f"rgb.{suffix}", COLOUR)
    Image.new("L", (8, 6), 77).save(tmp_path / "grey.jpg")
    near(tmp_path / "grey.jpg", (77, 77, 77), 1)
    Image.new("1", (8, 6), 1).save(tmp_path / "bits.png")
    near(tmp_path / "bits.png", (255, 255, 255), 0)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    near(tmp_path / "cmyk.jpg", COLOUR)
    rgb.quantize(4).save(tmp_path / "palette.png")
    near(tmp_path / "palette.png", COLOUR)
    Image.new("RGBA", (8, 6), (*COLOUR, 0)).save(tmp_path / "clear.png")
    near(tmp_path / "clear.png", (255, 255, 255), 0)
    Image.new("LA", (8, 6), (40, 255)).save(tmp_path / "la.png")
    near(tmp_path / "la.png", (40, 40, 40), 0)
    Image.fromarray(np.full((6, 8), 0x8123, np.uint16)).save(tmp_path / "deep.png")
    near(tmp_path / "deep.png", (0x81, 0x81, 0x81), 0)
    Image.fromarray(np.full((6, 8), 0x8123, np.uint16)).save(tmp_path / "deep.tif")
    near(tmp_path / "deep.tif", (0x81, 0x81, 0x81), 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(tmp_path / "rotated.jpg", exif=exif)
    assert decode_image(tmp_path / "rotated.jpg").shape == (8, 6, 3)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "broken.png"
    photo(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"broken\.png: cannot be decoded"):
        decode_image(path)
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ImageError, match=r"text\.jpg: cannot be decoded"):
        decode_image(tmp_path / "text.jpg")
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match="floating point"):
        decode_image(tmp_path / "float.tif")
    frames = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "film.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="3 frames"):
        decode_image(tmp_path / "film.tif")


def test_png_round_trip_is_deterministic():
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    data = encode_png(image)
    assert data == encode_png(image.copy())
    np.testing.assert_array_equal(decode_image(data), image)
    with pytest.raises(ImageError, match="float32"):
        encode_png(image.astype(np.float32))


def test_safe_names():
    names = [
        "F/A-18", "crème brûlée", "..", ".hidden", "100% cotton", "a b", "x%20y", "ok-1_2.3~",
        " spaces ", "con", "NUL.txt", "a\nb", "what?", "<b>", "dot.", "back\\slash", "%",
    ]  # fmt: skip
    for name in names:
        safe = safe_name(name)
        assert not set(safe) & set('/\\:*?"<>|\n') and safe[0] not in ". " and safe[-1] not in ". "
        assert class_of_folder(safe) == name
    assert safe_name("golden retriever") == "golden retriever"
    assert safe_name("crème brûlée 犬") == "crème brûlée 犬"
    assert class_of_folder("golden%20retriever") == "golden retriever", "as older exports wrote it"
    assert class_of_folder("100% cotton") == "100% cotton"
    assert len({safe_name(name) for name in names}) == len(names)


@pytest.mark.parametrize("letter", ["w", "é", "犬", "😀"])
def test_long_names_fit_a_file_system(tmp_path, letter):
    name = letter * (400 // len(letter.encode()))
    safe, other = safe_name(name), safe_name(name + "!")
    assert safe != other and len(safe.encode()) <= 180
    (tmp_path / f"{safe}.safetensors").touch()


def test_natural_order():
    assert sorted(["b10", "b2", "a", "10", "9"], key=natural_key) == ["9", "10", "a", "b2", "b10"]


def test_cached_equals_the_source(folder):
    photo(folder / "train" / "plain" / "large.jpg", size=(31, 17))
    data = load_dataset(DataConfig(source="folder", path=str(folder)))
    copy = cached(data.train)
    assert copy is not data.train and len(copy) == len(data.train)
    for a, b in zip(copy, data.train, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        assert a[1:] == b[1:]
    assert cached(data.train, limit_bytes=500) is data.train
    assert isinstance(cached(Subset(copy, [1, 2])), Subset)


def test_data_sets_join_into_one(folder):
    photos = load_dataset(DataConfig("folder", path=str(folder), class_names=("plain", "F/A-18")))
    digits = load_dataset(DataConfig(image_size=8))
    both = joined({"photos": photos, "digits": digits})
    assert both.class_names[:3] == ("photos plain", "photos F/A-18", "digits 0")
    assert both.display_names[2] == "digits zero" and both.num_classes == 12
    for part in ("train", "test"):
        first, second, found = (getattr(x, part) for x in (photos, digits, both))
        assert isinstance(found, ImageSource) and len(found) == len(first) + len(second)
        assert len(set(found.ids)) == len(found)
        for index in (0, len(first) - 1, len(first), len(found) - 1):
            late = index >= len(first)
            record = (second if late else first)[index - len(first) if late else index]
            np.testing.assert_array_equal(found[index].image, record.image)
            expected = record.label + 2 * late
            assert found[index].label == found.labels[index] == expected
            assert (
                found[index].id
                == found.ids[index]
                == f"{'digits' if late else 'photos'}/{record.id}"
            )
        with pytest.raises(IndexError):
            found[len(found)]


def test_a_hidden_folder_of_images_is_no_class_in_silence(folder):
    photo(folder / "train" / ".thumbnails" / "1.png")
    load_dataset(DataConfig(path=str(folder)))
    photo(folder / "train" / ".net" / "1.png")
    with pytest.raises(SourceError, match=r"\.net: a hidden folder with images: is it a class"):
        load_dataset(DataConfig(path=str(folder)))


def test_images_that_stand_twice_are_told(folder, capsys):
    """In two classes, and among training and test images; files that are another's to the byte."""
    root = folder.parent / "twice"
    for name, start in (("cat", 0), ("dog", 100)):
        for split, count, first in (("train", 3, start), ("test", 2, start + 10)):
            for i in range(count):
                photo(root / split / name / f"{i}.png", (first + i, 0, 0))
    config = DataConfig(path=str(root))
    assert repeats(load_dataset(config)) == []
    shutil.copy(root / "train/cat/0.png", root / "train/dog/again.png")
    shutil.copy(root / "train/cat/1.png", root / "test/cat/9.png")
    expected = [
        "twice: 1 image in more than one class, such as cat/0.png and dog/again.png; move or "
        "remove what is wrong",
        "twice: 1 test image also among the training images, such as cat/1.png and cat/9.png, so "
        "that accuracies may be too high; remove one of each",
    ]
    assert repeats(load_dataset(config)) == expected
    assert len(data_source(config).value.train) == 7
    assert capsys.readouterr().out.replace("\n", " ").split() == " ".join(expected).split()
