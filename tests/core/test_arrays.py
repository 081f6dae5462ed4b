"""numpy's files: read as numpy does, and refused by name where they are damaged or hostile."""

import io
import zipfile

import numpy as np
import pytest

from jaxsynth.core.arrays import read_array, read_arrays
from jaxsynth.core.errors import UserError

ARRAYS = (
    np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.zeros((0, 3), np.uint8),
    np.float64(1.5),
    np.array(["a", "class of words"]),
    np.arange(3, dtype=">i4"),
)


def same(found, expected):
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype and found.shape == expected.shape


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_holds_what_numpy_wrote(tmp_path, save, mapped):
    save(tmp_path / "a.npz", **{f"x{i}": value for i, value in enumerate(ARRAYS)})
    found = read_arrays(tmp_path / "a.npz", mapped=mapped)
    assert isinstance(found["x0"], np.memmap) == (mapped and save is np.savez)
    assert list(found) == [f"x{i}" for i in range(len(ARRAYS))]
    for value, expected in zip(found.values(), ARRAYS, strict=True):
        same(value, np.asarray(expected))
    assert list(read_arrays(tmp_path / "a.npz", ["x2"], optional=["x0", "none"])) == ["x2", "x0"]


@pytest.mark.parametrize("array", ARRAYS)
def test_an_array_is_what_numpy_wrote(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    same(read_array(tmp_path / "a.npy"), np.asarray(array))


def test_a_mapped_array_stays_in_its_file(tmp_path):
    for array in ARRAYS[:2]:
        np.save(tmp_path / "a.npy", array)
        found = read_array(tmp_path / "a.npy", mapped=True)
        assert isinstance(found, np.memmap)
        same(found, array)


def _bytes_of(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _claiming(shape) -> bytes:
    """64 bytes under a header that says another shape."""
    buffer = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + bytes(64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_bytes_of(np.zeros(8))[:-1], "63 bytes, expected 64"),
        (_bytes_of(np.zeros(8)) + b"x", "65 bytes, expected 64"),
        (_claiming((-8,)), "64 bytes"),
        (_claiming((2**40, 2**40)), "64 bytes, expected"),
        (_bytes_of(np.zeros(8)).replace(b"<f8", b"|O8"), "pickled objects"),
        (b"\x93NUMPY\x01\x00", r"cannot be read as an array"),
        (b"", r"cannot be read as an array"),
    ],
)
def test_a_damaged_array_is_named(tmp_path, content, message):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.npy: .*{message}"):
        read_array(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(UserError, match=rf"a\.npz: x: .*{message}"):
        read_arrays(tmp_path / "a.npz", ["x"])


def test_an_archive_that_unpacks_to_more_than_it_needs_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", _bytes_of(np.zeros(2**26, np.uint8)) + bytes(2**28))
    with pytest.raises(UserError, match=r"a\.npz: unpacks to \d+ bytes"):
        read_arrays(tmp_path / "a.npz")
