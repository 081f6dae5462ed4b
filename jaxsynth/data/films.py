"""Films to uint8 frames: animated GIF and WebP, folders of numbered frames, and MP4 with its kin.

Videos are decoded by FFmpeg (`pip install 'jaxsynth[video]'`), everything else by Pillow. Frames
are read one after another, and kept where they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageSequence

from jaxsynth.core.errors import quoted, shown
from jaxsynth.data.decode import LARGE, ImageError, decode_image, square, to_rgb
from jaxsynth.data.names import natural_key

ANIMATED = (".gif", ".webp")
VIDEOS = (".mp4", ".m4v", ".mov", ".webm")
# Of one film.
MOST_FRAMES = 100_000
Frame = UInt8[np.ndarray, "h w 3"]


def is_film(path: Path) -> bool:
    """Whether a file's name says that it is a film."""
    return path.suffix.lower() in (*ANIMATED, *VIDEOS)


def frame_files(folder: Path) -> list[Path]:
    """The frames of a folder in the order of their numbers.

    ImageError for a folder without any, and for a file whose name has no number.
    """
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    found.sort(key=lambda path: natural_key(path.name))
    if not found:
        raise ImageError(f"{folder}: no frames; expected numbered images")
    for path in found:
        if path.is_dir():
            raise ImageError(f"{folder}: holds a folder, {shown(path.name)}; expected frames")
        if not re.search(r"\d", path.stem):
            raise ImageError(f"{folder}: {shown(path.name)} has no number, as frames have")
    return found


def count_frames(path: Path) -> int:
    """The frames of a film; all are decoded. ImageError naming it where one cannot be."""
    count, size = 0, None
    for frame in _frames(path):
        count += 1
        if count > MOST_FRAMES:
            raise ImageError(f"{path}: more than {MOST_FRAMES} frames; cut it into clips")
        if size is not None and frame.shape != size:
            raise ImageError(
                f"{path}: frame {count - 1} has {frame.shape[1]}x{frame.shape[0]} pixels, and "
                f"those before {size[1]}x{size[0]}"
            )
        size = frame.shape
    return count


def read_frames(
    path: Path, rows: Collection[int], image_size: int = 0
) -> UInt8[np.ndarray, "f h w 3"]:
    """The frames of these numbers, in their order, each as `square` makes it.

    ImageError naming the film where one of them cannot be read.
    """
    wanted, found = set(rows), {}
    for number, frame in enumerate(_frames(path)):
        if number in wanted:
            found[number] = square(frame, image_size)
        if number == max(wanted):
            break
    missing = wanted - found.keys()
    if missing:
        raise ImageError(f"{path}: has no frame {min(missing)}")
    return np.stack([found[row] for row in rows])


def _frames(path: Path) -> Iterator[Frame]:
    if path.is_dir():
        yield from map(decode_image, frame_files(path))
    elif path.suffix.lower() in VIDEOS:
        yield from _of_video(path)
    else:
        yield from _of_animation(path)


def _of_animation(path: Path) -> Iterator[Frame]:
    try:
        with Image.open(path, formats=("GIF", "WEBP")) as film:
            if film.width * film.height > LARGE:
                raise ImageError(
                    f"{path}: {film.width}x{film.height} pixels a frame, expected at most "
                    f"{LARGE:,} in all; make it smaller"
                )
            for frame in ImageSequence.Iterator(film):
                yield np.array(to_rgb(frame.copy(), str(path)))
    except ImageError:
        raise
    except Exception as error:  # decoders raise many types for damaged files
        raise _undecodable(path, error) from error


def _of_video(path: Path) -> Iterator[Frame]:
    try:
        import av
    except ImportError as error:
        raise ImageError(
            f"{path}: a video; pip install 'jaxsynth[video]' to read it, or make it a GIF or a "
            f"folder of numbered frames ({error})"
        ) from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ImageError(f"{path}: holds no video")
            for frame in container.decode(video=0):
                # Telephones keep how they were held beside the frames.
                turns = round(frame.rotation / 90)
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
    except ImageError:
        raise
    except Exception as error:  # FFmpeg's own for each kind of damage
        raise _undecodable(path, error) from error


def _undecodable(path: Path, error: Exception) -> ImageError:
    text = quoted(str(error) or type(error).__name__, 200)[1:-1]
    return ImageError(f"{path}: cannot be decoded as a film ({text})")
