"""Image files as phones, scanners, cameras and Windows leave them."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxsynth.data import decode
from jaxsynth.data.decode import IMAGE_SUFFIXES, ImageError, decode_image

COLOR = (180, 60, 20)
OTHER = (10, 200, 90)


def plain(color=COLOR, size=(24, 16)):
    return Image.new("RGB", size, color)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpe", {"format": "JPEG"}),
        ("a.jfif", {"format": "JPEG"}),
        ("A.JPG", {"format": "JPEG"}),
        ("a.avif", {}),
        ("a.gif", {}),
        ("a.webp", {}),
        ("a.dib", {}),
        ("phone.jpg", {"format": "MPO", "save_all": True, "append_images": [plain(OTHER, (8, 8))]}),
        ("phone.mpo", {"format": "MPO", "save_all": True, "append_images": [plain(OTHER)] * 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_first_picture_is_read(tmp_path, name, options):
    plain().save(tmp_path / name, **options)
    image = decode_image(tmp_path / name)
    assert image.shape == (16, 24, 3) and np.abs(image.astype(int) - COLOR).max() <= 8
    assert (tmp_path / name).suffix.lower() in IMAGE_SUFFIXES


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_films_are_refused(tmp_path, suffix):
    path = tmp_path / f"film.{suffix}"
    plain().save(path, save_all=True, append_images=[plain(OTHER), plain()])
    with pytest.raises(ImageError, match=rf"film\.{suffix}: holds 3 frames, expected a single"):
        decode_image(path)


def test_heic_without_its_package_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    for name in ("IMG_0001.HEIC", "IMG_0001.jpg"):
        (tmp_path / name).write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(40))
        with pytest.raises(ImageError, match=rf"{name}: a HEIC photo.*jaxsynth\[heic\].*to JPEG"):
            decode_image(tmp_path / name)


def test_heic_with_its_package(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(plain(size=(64, 48))).save(tmp_path / "a.heic")
    image = decode_image(tmp_path / "a.heic")
    assert image.shape == (48, 64, 3) and np.abs(image.astype(int) - COLOR).max() <= 8
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x1cftypheic" + bytes(60))
    with pytest.raises(ImageError, match=r"b\.heic: cannot be decoded.*damaged HEIC"):
        decode_image(tmp_path / "b.heic")


def tiff_of_floats():
    """A TIFF of one pixel with three colors in floating point, which Pillow does not read."""
    tags = {256: 1, 257: 1, 258: 32, 262: 2, 273: 8, 277: 3, 278: 1, 279: 12, 339: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (
        b"II*\0"
        + struct.pack("<I", 20)
        + bytes(12)
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (
            b"<!DOCTYPE html><html>404",
            "cannot be decoded as an image: it is a text such as the page",
        ),
        (b"PK\3\4", "it is a ZIP archive, as PyTorch's files are, none of JPEG"),
        (b"version https://git-lfs", "a file that git-lfs has not fetched"),
        (tiff_of_floats(), "it is a TIFF that is damaged, or whose pixels are of a kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript file, none of JPEG"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "cannot be decoded as an image"),
        (b"\x00\x00\x01\x00\x01\x00\x10\x10", "it is none of JPEG"),
    ],
    ids=["empty", "html", "zip", "lfs", "floats", "eps", "cut off", "ico"],
)
def test_what_is_no_photo_is_named(tmp_path, content, message):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"a\.jpg: .*{message}"):
        decode_image(path)


def test_files_that_cannot_be_opened_are_named(tmp_path):
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("link.jpg", "folder.jpg"):
        with pytest.raises(ImageError, match=rf"{name}: cannot be read \("):
            decode_image(tmp_path / name)


def header(width, height):
    """A PNG that promises pixels which it does not hold."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(bytes(99)))


@pytest.mark.parametrize("side", [25_000, 60_000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header(side):
    with pytest.raises(ImageError, match=r"bomb\.png: .*536,870,912 pixels; make it smaller"):
        decode_image(header(side, side), "bomb.png")


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("L", "jpg"), ("RGB", "png"), ("P", "png"), ("1", "tif"), ("RGBA", "png"),
     ("I;16", "png"), ("CMYK", "tif")],
)  # fmt: skip
def test_a_large_scan_is_decoded_smaller(tmp_path, monkeypatch, mode, suffix):
    monkeypatch.setattr(decode, "LARGE", 5000)
    halves = plain((255, 255, 255), (160, 120))
    halves.paste((0, 0, 0), (0, 0, 80, 120))
    path = tmp_path / f"scan.{suffix}"
    if mode == "I;16":
        Image.fromarray(np.asarray(halves.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        halves.convert(mode).save(path)
    image = decode_image(path)
    assert image.shape == (60, 80, 3)
    assert image[:, :36].max() < 25 and image[:, 44:].min() > 230


def test_a_large_scan_is_turned_upright(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "LARGE", 5000)
    exif = Image.Exif()
    exif[0x0112] = 6
    halves = plain(size=(160, 120))
    halves.paste(OTHER, (0, 0, 160, 60))
    halves.save(tmp_path / "scan.jpg", exif=exif)
    image = decode_image(tmp_path / "scan.jpg").astype(int)
    assert image.shape == (80, 60, 3)
    assert np.abs(image[40, 10] - COLOR).max() < 12 and np.abs(image[40, 50] - OTHER).max() < 12


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_photos_are_upright_in_every_format(tmp_path, suffix, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    halves = plain(size=(40, 24))
    halves.paste(OTHER, (0, 0, 40, 12))
    halves.save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    image = decode_image(tmp_path / f"a.{suffix}").astype(int)
    upright = {1: 0, 3: 2, 6: -1, 8: 1}[turn]
    wanted = np.rot90(np.asarray(halves), upright).astype(int)
    assert image.shape == wanted.shape
    assert np.abs(image[2, 2] - wanted[2, 2]).max() < 16
    assert np.abs(image[-3, -3] - wanted[-3, -3]).max() < 16


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(
    ("high", "expected"),
    [(65535, 255), (40000, 156), (4096, 16), (4095, 255), (2048, 128), (255, 0)],
)
def test_values_of_twelve_bits_are_not_black(tmp_path, suffix, high, expected, caplog):
    ramp = np.linspace(0, high, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    image = decode_image(tmp_path / f"a.{suffix}")
    assert image.max() == expected
    twelve = 255 < high < 4096
    assert ("read as 12-bit values" in caplog.text) == twelve
