"""What sees faces: ArcFace's alignment, an ONNX file by way of its runtime, embeddings in files."""

import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from jaxsynth.core.errors import UserError
from jaxsynth.tasks.networks import NetworkConfig, features_of
from jaxsynth.weights.face_encoder import (
    TEMPLATE,
    aligned,
    load_face_encoder,
    read_embeddings,
)
from jaxsynth.weights.networks.classifiers import Classifier, save_classifier
from jaxsynth.weights.preprocessing import Preprocessing

WIDTH = 5


class Session:
    """An ONNX Runtime's session of a network that returns the means of its channels' rows."""

    shapes = ([None, 3, 112, 112], ["n", WIDTH])

    def __init__(self, path, providers):
        if not Path(path).read_bytes().startswith(b"onnx"):
            raise RuntimeError("INVALID_PROTOBUF")
        self.given = []

    def get_inputs(self):
        return [types.SimpleNamespace(name="input.1", shape=self.shapes[0])]

    def get_outputs(self):
        return [types.SimpleNamespace(name="683", shape=self.shapes[1])]

    def run(self, names, feed):
        (pixels,) = feed["input.1"]
        self.given.append(pixels)
        return [pixels.mean((0, 2))[None, :WIDTH]]


@pytest.fixture
def runtime(monkeypatch):
    module = types.ModuleType("onnxruntime")
    module.InferenceSession = Session
    monkeypatch.setitem(sys.modules, "onnxruntime", module)


def face(points, size=160):
    """A picture with a disc of its own color on each point."""
    image = Image.new("RGB", (size, size), (20, 20, 20))
    draw = ImageDraw.Draw(image)
    for i, (x, y) in enumerate(points):
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=(60 + 40 * i, 250 - 40 * i, 0))
    return np.array(image)


def turned(angle, scale, shift):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (TEMPLATE - TEMPLATE.mean(0)) @ turn.T * scale + shift


@pytest.mark.parametrize(("angle", "scale", "shift"), [(0.4, 0.8, (70, 90)), (-0.7, 1.2, (80, 75))])
def test_faces_are_cut_out_by_their_points(angle, scale, shift):
    """The points come to lie on ArcFace's; a similarity of least squares, as torch solves it."""
    points = turned(angle, scale, shift)
    cut = aligned(face(points), points)
    assert cut.shape == (112, 112, 3)
    for i, (x, y) in enumerate(TEMPLATE.round().astype(int)):
        np.testing.assert_allclose(cut[y, x], (60 + 40 * i, 250 - 40 * i, 0), atol=12)
    # Points that no similarity brings there: the same as with the best similarity of them.
    rng = np.random.default_rng(0)
    moved = points + rng.normal(0, 3, points.shape)
    rows, right = [], []
    for (x, y), (u, v) in zip(moved, TEMPLATE, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        right += [u, v]
    a, b, c, d = (
        torch.linalg.lstsq(
            torch.tensor(rows, dtype=torch.float64),
            torch.tensor(right, dtype=torch.float64)[:, None],
        )
        .solution[:, 0]
        .tolist()
    )
    best = np.stack([a * moved[:, 0] - b * moved[:, 1] + c, b * moved[:, 0] + a * moved[:, 1] + d])
    marked = face(moved)
    found = aligned(marked, moved)
    for i, (x, y) in enumerate(best.T.round().astype(int)):
        np.testing.assert_allclose(found[y, x], (60 + 40 * i, 250 - 40 * i, 0), atol=25)
    with pytest.raises(UserError, match="no face has its points like"):
        aligned(marked, np.full((5, 2), 7.0))


def test_an_onnx_file_sees_the_face_alone_as_arcface_does(runtime, tmp_path):
    file = tmp_path / "glintr100.onnx"
    file.write_bytes(b"onnx")
    encoder = load_face_encoder(file)
    points = turned(0.2, 1.0, (80, 80))
    rows = encoder([face(points), face(TEMPLATE + 20)], np.stack([points, TEMPLATE + 20]))
    assert rows.shape == (2, WIDTH) == (2, encoder.width) and rows.dtype == np.float32
    pixels = encoder.session.given[0]
    expected = np.moveaxis((aligned(face(points), points) - 127.5) / 127.5, -1, 0)
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    assert pixels.shape == (3, 112, 112) and encoder.digest
    file.write_bytes(b"no")
    with pytest.raises(UserError, match=r"glintr100.onnx: cannot be read as ONNX \(RuntimeError\)"):
        load_face_encoder(file)
    file.write_bytes(b"onnx")
    Session.shapes, before = ([None, 1, 112, 112], ["n", WIDTH]), Session.shapes
    with pytest.raises(UserError, match=r"expected a face encoder of \(n, 3, side, side\)"):
        load_face_encoder(file)
    Session.shapes = before


def test_a_missing_runtime_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    file = tmp_path / "x.onnx"
    with pytest.raises(UserError, match="no such file"):
        load_face_encoder(file)
    file.write_bytes(b"onnx")
    with pytest.raises(UserError, match=r"pip install 'jaxsynth\[faces\]'.*embeddings that were"):
        load_face_encoder(file)


def test_a_vision_transformer_s_folder_is_an_encoder(tmp_path):
    network = NetworkConfig(width=8, layers=1, heads=2, patch_size=16, image_size=32)
    model = network.make(3, jax.random.key(0))
    made = Preprocessing(32, 32, False, "bicubic", network.mean, network.std, "floor")
    save_classifier(Classifier(model, made), tmp_path / "vit")
    encoder = load_face_encoder(tmp_path / "vit")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found = encoder(list(images), np.zeros((3, 5, 2)))
    assert encoder.width == 8 and encoder.digest
    np.testing.assert_allclose(found, features_of(model, network, images), atol=1e-5)


def test_embeddings_are_read_or_named(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "two.npy", values)
    np.savez(tmp_path / "two.npz", embeddings=values)
    np.save(tmp_path / "one.npy", values[0])
    for name, count in (("two.npy", 2), ("two.npz", 2), ("one.npy", 1)):
        np.testing.assert_array_equal(read_embeddings(tmp_path / name), values[:count])
    np.save(tmp_path / "whole.npy", np.ones((2, 3), int))
    np.save(tmp_path / "many.npy", np.ones((2, 3, 4)))
    np.save(tmp_path / "nan.npy", values * np.nan)
    np.savez(tmp_path / "other.npz", x=values)
    for name, words in (
        ("whole.npy", r"embeddings of int64 \(2, 3\), expected floats"),
        ("many.npy", r"\(2, 3, 4\), expected floats \(n, width\)"),
        ("nan.npy", "not finite"),
        ("other.npz", "key 'embeddings' missing"),
        ("x.txt", "expected embeddings of a face"),
    ):
        with pytest.raises(UserError, match=words):
            read_embeddings(tmp_path / name)
