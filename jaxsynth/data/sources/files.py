"""Image files on disk: which of a folder's files are images, and a source of them.

What operating systems, cloud drives and trainers of captions leave beside photos is passed over;
anything else that is no image is named, all of it in one message, so that nothing is skipped
unnoticed.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxsynth.core.io import file_digests_cached
from jaxsynth.data.dataset import Indices, Record, SourceError
from jaxsynth.data.decode import (
    IMAGE_SUFFIXES,
    ImageError,
    decode_image,
    decoded_digest,
    open_image,
    square,
)

# Left by Windows, macOS, Synology and the like; names that begin with a dot are hidden anyway.
RUBBISH = ("thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r", "__macosx", "@eadir",
           "#recycle", "$recycle.bin", "system volume information", "lost+found",
           "__pycache__")  # fmt: skip
# Hidden folders of previews, notebooks, version control, file servers and waste baskets.
HIDDEN = (".thumb", ".@__thumb", ".ipynb", ".cache", ".git", ".hg", ".svn", ".dvc", ".trash",
          ".picasa", ".snap", ".sync", ".stversions", ".spotlight", ".fseventsd", ".temporary",
          ".documentrevisions", ".dtrash")  # fmt: skip
# Texts that describe an image lie beside it under its name, and so do the seconds of film that
# telephones keep with a photo.
CAPTIONS = (".txt", ".caption", ".json", ".xml", ".xmp", ".aae", ".npz", ".mov")
# What macOS leaves in the place of a file that it has moved to iCloud: .NAME.icloud.
_IN_THE_CLOUD = ".icloud"
# To find broken files early so many bytes of them are decoded, or so many headers read.
DECODED_BYTES = 2**28
HEADERS = 20_000
_SHOWN = 20
_checked: set[tuple[str, int, int]] = set()


@dataclass(frozen=True)
class FileSource:
    """Image files; ids are their paths below `root`, with "/" between the parts."""

    root: Path
    ids: Sequence[str]
    labels: Int[np.ndarray, " n"]
    image_size: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Record:
        image = decode_image(self.root / self.ids[index])
        return Record(square(image, self.image_size), int(self.labels[index]), self.ids[index])

    def record_digests(self, indices: Indices | None = None) -> Sequence[str]:
        ids = self.ids if indices is None else [self.ids[i] for i in indices]
        digests = file_digests_cached([self.root / id_ for id_ in ids])
        return [decoded_digest(digest, self.image_size) for digest in digests]


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without hidden files and rubbish.

    SourceError for a name that is no text, which records and prompts could not hold.
    """
    found = sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name.lower() not in RUBBISH
    )
    for path in found:
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise SourceError(
                f"{folder}: the name of {os.fsencode(path.name)!r} is not UTF-8, as archives of "
                "other systems may leave names; rename it"
            ) from None
    return found


def hidden_images(folder: Path) -> list[Path]:
    """Hidden folders with images that no program is known to leave there."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.startswith(".")
        and not path.name.lower().startswith(HIDDEN)
        and path.is_dir()
        and any(map(is_image, path.iterdir()))
    )


def is_image(path: Path) -> bool:
    """Whether a file's name says that it is an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def images_in(folder: Path, problems: dict[Path, str]) -> list[Path]:
    """The images of one folder; what else lies there, but captions, is added to `problems`."""
    paths = visible(folder)
    images = [path for path in paths if is_image(path) and not path.is_dir()]
    stems = {path.stem for path in images} | {path.name for path in images}
    for path in folder.glob(f".*{_IN_THE_CLOUD}"):
        name = path.name.removeprefix(".").removesuffix(_IN_THE_CLOUD)
        problems[folder / name] = "is in iCloud and not on this disk; download it in the Finder"
    for path in paths:
        if path.is_dir():
            problems[path] = (
                "a folder inside the folder of a class: move its images up; where the classes lie "
                "further down, give that folder as path, or name splits by train_split, test_split"
            )
        elif not is_image(path) and not (path.suffix.lower() in CAPTIONS and path.stem in stems):
            problems[path] = "not an image file"
    return images


def check_images(paths: Sequence[Path], problems: dict[Path, str]) -> None:
    """Add the files that cannot be read to `problems`.

    All are decoded where they are small enough together; otherwise the headers of some thousands
    are read. What was read once is not read again in this process.
    """
    stamps = {}
    for path in paths:
        try:
            found = path.stat()
        except OSError as error:
            problems[path] = f"cannot be read ({error.strerror})"
            continue
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would never end
            problems[path] = "a pipe, socket or device, expected a file"
            continue
        stamps[path] = (str(path), found.st_size, found.st_mtime_ns)
    whole = sum(size for _, size, _ in stamps.values()) <= DECODED_BYTES
    pending = [path for path, stamp in stamps.items() if stamp not in _checked]
    if not whole and len(pending) > HEADERS:
        return
    with ThreadPoolExecutor(4) as pool:
        faults = pool.map(_fault_decoding if whole else _fault_of_header, pending)
        for path, fault in zip(pending, faults, strict=True):
            if fault:
                problems[path] = fault
            else:
                _checked.add(stamps[path])


def _fault_decoding(path: Path) -> str:
    return _fault(path, lambda: decode_image(path))


def _fault_of_header(path: Path) -> str:
    def read() -> None:
        with open(path, "rb") as file:
            open_image(file, str(path))

    return _fault(path, read)


def _fault(path: Path, read: Callable[[], object]) -> str:
    try:
        read()
    except (ImageError, OSError, SyntaxError, ValueError) as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def refuse(root: Path, problems: Mapping[Path, str]) -> None:
    """SourceError naming every file and folder that is in the way, and what to do."""
    if not problems:
        return
    if len(problems) == 1:
        ((path, reason),) = problems.items()
        raise SourceError(f"{path}: {reason}. {_WAY_OUT}")
    lines = [f"{_below(path, root)}: {reason}" for path, reason in sorted(problems.items())]
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"]
    raise SourceError(
        f"{root}: {len(problems)} files or folders cannot be used: {'; '.join(lines)}. {_WAY_OUT}"
    )


_WAY_OUT = (
    f"Images are read from {', '.join(IMAGE_SUFFIXES)} files in one folder a class; move or remove "
    "anything else"
)


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def nearest_stems(names: Iterable[str]) -> dict[str, str]:
    """File paths as lists give them: whole, without the suffix, or without the folder if one."""
    names = list(names)
    counts = Counter(Path(name).name for name in names)
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(str(Path(name).with_suffix("")), name)
        if counts[Path(name).name] == 1:
            found.setdefault(Path(name).name, name)
            found.setdefault(Path(name).stem, name)
    return found | {name: name for name in names}
