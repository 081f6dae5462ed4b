"""Folders of clips: every kind of film with its text, what is refused, and the drawn ones."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from jaxsynth.data.dataset import DataConfig, SourceError
from jaxsynth.data.films import read_frames
from jaxsynth.data.load import load_dataset
from jaxsynth.data.sources.captioned import captions
from jaxsynth.data.sources.clips import check_lengths, clip_at, window
from jaxsynth.generation.animations import Film

LEVELS = (0, 80, 160, 240)


def film(levels=LEVELS, height=8, width=6):
    """Frames of one grey each."""
    return np.stack([np.full((height, width, 3), level, np.uint8) for level in levels])


def animated(path, frames):
    first, *others = (Image.fromarray(frame) for frame in frames)
    more = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=100, **more)


def numbered(folder, frames, names=None):
    folder.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / (names or [f"{n}.png" for n in range(99)])[i])


@pytest.fixture
def root(tmp_path):
    """A GIF, a WebP and a folder whose tenth frame comes after its second."""
    folder = tmp_path / "walks"
    folder.mkdir()
    animated(folder / "a.gif", film())
    animated(folder / "b.webp", film())
    numbered(folder / "c.d", film(), ["2.png", "9.png", "10.png", "11.png"])
    for name in ("a", "b", "c.d"):
        (folder / f"{name}.txt").write_text(f"a  walk {name}\n")
    return folder


def load(root, **more):
    return load_dataset(DataConfig(source="clips", path=str(root), **more))


def test_every_kind_of_clip_has_frames_and_a_text(root):
    data = load(root, test_fraction=0.4)
    assert data.class_names == ("walks",) and (len(data.train), len(data.test)) == (2, 1)
    texts = {}
    for part in (data.train, data.test):
        for i, (id_, text) in enumerate(zip(part.ids, captions(data, part), strict=True)):
            clip, place = clip_at(part, i)
            assert clip.lengths[place] == 4
            found = clip.frames(place, window(1, 2, 2))
            assert found.shape == (2, 8, 6, 3)
            np.testing.assert_allclose(found.mean((1, 2, 3)), [80, 240], atol=2)
            # As an image it is its middle frame.
            assert abs(float(part[i].image.mean()) - 160) < 2
            texts[id_] = text
    assert texts == {"a.gif": "a walk a", "b.webp": "a walk b", "c.d": "a walk c.d"}


def test_a_table_of_texts_and_a_size(root):
    for path in root.glob("*.txt"):
        path.unlink()
    lines = [{"file_name": x, "text": f"of {x}"} for x in ("a.gif", "b.webp", "c.d")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load(root, image_size=4)
    assert set(captions(data, data.train)) < {"of a.gif", "of b.webp", "of c.d"}
    assert data.train[0].image.shape == (4, 4, 3)
    before = data.listing
    (root / "metadata.jsonl").write_text(
        "\n".join(map(json.dumps, [*lines[:2], lines[2] | {"text": "x"}]))
    )
    numbered_frame = root / "c.d" / "9.png"
    after = load(root, image_size=4).listing
    Image.fromarray(film()[3]).save(numbered_frame)
    last = load(root, image_size=4).listing
    for one, other in ((before, after), (after, last)):
        assert {key.split(": ")[-1] for key, text in one.items() if other[key] != text} == {"c.d"}


def test_a_video_is_read_where_the_codec_is_installed(root, monkeypatch):
    Film(mp4=True).write(root / "v.gif", film(height=16, width=16), "")
    (root / "v.gif").unlink()
    (root / "v.txt").write_text("a video")
    found = read_frames(root / "v.mp4", [0, 3])
    np.testing.assert_allclose(found.mean((1, 2, 3)), [0, 240], atol=8)
    monkeypatch.setitem(sys.modules, "av", None)
    (root / "v.mp4").rename(root / "w.mp4")  # not the one that was read before
    (root / "v.txt").rename(root / "w.txt")
    with pytest.raises(SourceError, match=r"w\.mp4: a video; pip install 'jaxsynth\[video\]'"):
        load(root)


def test_all_that_is_no_clip_is_named_in_one_message(root):
    (root / "notes.pdf").write_bytes(b"%PDF")
    (root / "broken.gif").write_bytes((root / "a.gif").read_bytes()[:30])
    (root / "video.mp4").write_bytes(b"no video")
    (root / "empty").mkdir()
    numbered(root / "unnumbered", film(), ["a.png", "b.png", "c.png", "d.png"])
    numbered(root / "sizes", [film()[0], film(height=4)[0]])
    with pytest.raises(SourceError) as caught:
        load(root)
    message = str(caught.value)
    for part in (
        "notes.pdf: no clip", "broken.gif: cannot be decoded", "video.mp4: cannot be decoded",
        "empty: no frames", "unnumbered: 'a.png' has no number",
        "sizes: frame 1 has 6x4 pixels, and those before 6x8",
        "Clips are .gif, .webp, .mp4",
    ):  # fmt: skip
        assert part in message, part


def test_what_is_missing_is_named(root, tmp_path):
    (root / "b.txt").unlink()
    with pytest.raises(SourceError, match=r"1 of 3 clips have no text, the first is 'b\.webp'"):
        load(root)
    (tmp_path / "none").mkdir()
    for path, message in (
        ("", "needs the folder"), (tmp_path / "none", "no clips"), (root / "a.gif", "not a folder"),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=message):
            load(path)


def test_clips_that_are_too_short_are_named(root):
    data = load(root)
    check_lengths((data.train, data.test), 2, 3)
    with pytest.raises(SourceError) as caught:
        check_lengths((data.train, data.test), 3, 2)
    message = str(caught.value)
    assert "3 clips shorter than the 5 frames that frames=3, stride=2 need" in message
    assert all(f"{name} has 4" in message for name in ("a.gif", "b.webp", "c.d"))
    images = load_dataset(DataConfig(source="digits", class_names=("1",)))
    with pytest.raises(SourceError, match=r"--config\.data\.source=clips"):
        check_lengths((images.train,), 2, 1)


def test_drawn_clips_move_as_their_class_says():
    from jaxsynth.data.procedural.moving import DIRECTIONS
    from jaxsynth.quality.motion import frame_shift

    data = load_dataset(DataConfig(source="builtin", name="moving", images_per_class=2))
    assert data.class_names == tuple(DIRECTIONS) and len(data.train) == 8
    assert not any(way in text for text in captions(data, data.train) for way in DIRECTIONS)
    shifts = frame_shift(data.train.clips)
    for label, way in enumerate(DIRECTIONS.values()):
        own = shifts[data.train.labels == label]
        np.testing.assert_allclose(own, np.broadcast_to(1.2 * np.array(way), own.shape), atol=0.25)
    one = load_dataset(
        DataConfig(source="builtin", name="moving", images_per_class=2, class_names=("up",))
    )
    clip, place = clip_at(one.train, 1)
    np.testing.assert_array_equal(clip.clips[place], data.train.clips[5])
