"""Safetensors: what the library lets pass in silence is named here."""

import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsynth.core.errors import UserError
from jaxsynth.models.diffusion.dit import DiTConfig
from jaxsynth.weights import hub
from jaxsynth.weights.checks import check_counts, finite
from jaxsynth.weights.safetensors import opened


def write(path, header, body: bytes = b""):
    """A file of this header (a text or what JSON holds) and this body."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def adapter(path):
    with opened(path) as file:
        return {
            key: file.read_any(key) if file.shape(key) == () else file.read(key)
            for key in file.keys
        }


ONE = json.dumps(entry([2], 0, 8)).encode()


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        (b'{"a": %b, "a": %b}' % (ONE, ONE), bytes(8), "header: 'a' is there twice"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), "not a complete safetensors"),
        ({"a": entry([2], 0, 8)}, bytes(4), "not a complete safetensors"),
        ({"a": entry([2**30], 0, 2**32)}, bytes(8), "not a complete safetensors"),
        ({"a": entry([2], 0, 8, "I32")}, bytes(8), "a: dtype I32, expected one of F64, F32"),
        ({"a": entry([8], 0, 8, "BOOL")}, bytes(8), "a: dtype BOOL, expected one of F64"),
        ({"a": entry([1], 0, 8, "C64")}, bytes(8), "a: dtype C64, expected one of F64"),
        ({"a": entry([2], 0, 8)}, struct.pack("<2f", 1, np.nan), "a: holds NaN or infinity"),
        ({"a": entry([2], 0, 8)}, struct.pack("<2f", -np.inf, 1), "a: holds NaN or infinity"),
        ({"a": entry([1], 0, 1, "F8_E4M3")}, b"\x7f", "a: holds NaN or infinity"),
        ({"a": entry([0, 2**62], 0, 0)}, b"", "a: impossible shape"),
        ({"a": entry([2**62, 0], 0, 0, "F8_E5M2")}, b"", "a: impossible shape"),
        ({"\u202e" * 200: entry([8], 0, 8, "U8")}, bytes(8), r"(\\u202e)+'?\.*: dtype U8"),
        (b"[1]", b"", "not a complete safetensors|expected a JSON object"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, b"", "not a complete safetensors|levels"),
    ],
)
def test_what_is_refused(tmp_path, header, body, message):
    path = write(tmp_path / "x.safetensors", header, body)
    with pytest.raises(UserError, match=rf"x\.safetensors: ({message})") as caught:
        adapter(path)
    assert len(str(caught.value)) < 800 and str(caught.value).isprintable()


def test_headers_are_bounded(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(UserError, match=r"a header of 1099511627776 bytes, expected 16777216"):
        adapter(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="not a complete safetensors"):
        adapter(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>404</html>", "a text such as the page of a download that failed"),
        (b'\xef\xbb\xbf\n{"error": "gone"}', "a JSON text"),
        (b"version https://git-lfs.github.com/spec/v1\n", "the pointer .* git-lfs has not fetched"),
        (b"PK\3\4 and so on", "a ZIP archive, as PyTorch's files are"),
        (b"\x80\2}q\0X\3\0\0", "a pickle"),
        (b"GGUF\3\0\0\0\0\0\0\0", "a GGUF file"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\r", "a PNG picture"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1", "a JPEG picture"),
        (b"Put the weights here.", "a text"),
    ],
    ids=["page", "json", "git-lfs", "zip", "pickle", "gguf", "png", "jpeg", "text"],
)
def test_other_files_of_that_name_are_named(tmp_path, content, what):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.safetensors: is {what}.*, not a safetensors file"):
        adapter(path)


def test_floats_of_all_widths_and_integer_scalars(tmp_path):
    values = {"a": np.arange(4, dtype="f4"), "b": np.ones((2, 2), "f2")}
    path = tmp_path / "x.safetensors"
    path.write_bytes(hub.to_bytes(values, {"format": "x"}))
    with opened(path) as file:
        assert file.metadata == {"format": "x"} and file.numbers == 8
        np.testing.assert_array_equal(file.read("a", (4,)), values["a"])
        with pytest.raises(UserError, match=r"a: shape \(4,\), expected \(2, 2\)"):
            file.read("a", (2, 2))
        with pytest.raises(UserError, match="key 'c' is missing"):
            file.read("c")
    eight = np.array([0.5, -448, 2.0], ml_dtypes.float8_e4m3fn)
    header = {"w": entry([3], 0, 3, "F8_E4M3"), "alpha": entry([], 3, 11, "I64")}
    found = adapter(write(path, header, eight.tobytes() + struct.pack("<q", 4)))
    assert found["w"].dtype == np.float32 and found["w"].tolist() == [0.5, -448, 2.0]
    assert found["alpha"] == 4


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_single_value_that_is_no_number_is_found(dtype, wrong):
    array = np.full((3, 400_001), 3e4, dtype)
    assert finite(array) and finite(array.T)
    array[2, 399_999] = wrong
    assert not finite(array) and not finite(array[:, 1::2].T) and finite(array[:2])
    assert finite(np.array([2**62])) and finite(np.zeros((0, 3), dtype))


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "b/../a.safetensors", "a.py"])
def test_an_index_names_files_in_its_own_folder(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    write(tmp_path / "a.safetensors", {"w": entry([2], 0, 8)}, bytes(8))
    index = {"weight_map": {"w": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=r"weight_map: '.*', expected files of weights in its folder"
    ):
        hub.weight_files(folder)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (DiTConfig(num_layers=10**9), "num_layers is 1000000000"),
        (DiTConfig(num_attention_heads=10**9), "num_attention_heads is 1000000000"),
        (DiTConfig(num_layers=101), "num_layers is 101"),
    ],
)
def test_counts_of_a_config_fit_its_weights(tmp_path, config, field):
    check_counts(tmp_path, DiTConfig(num_layers=100), 100, 10**6)
    with pytest.raises(UserError, match=f"{field}, but the weights have 100 tensors of 1000000 n"):
        check_counts(tmp_path, config, 100, 10**6)


def test_views_and_scalars_are_written_as_they_are(tmp_path):
    plain = np.arange(6, dtype=np.float32).reshape(2, 3)
    given = {
        "turned": plain.T,
        "every other": plain[:, ::2],
        "one": np.float32(7)[...],
        "as": plain,
    }
    hub.write_tensors(tmp_path / "t.safetensors", given)
    with opened(tmp_path / "t.safetensors") as file:
        for name, expected in given.items():
            found = file.read_any(name)
            assert found.shape == expected.shape and np.array_equal(found, expected), name
