"""Paths on the command line."""

import argparse
import re
from pathlib import Path

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def local_path(text: str) -> Path:
    """A path on a file system, as a type of an argument; an address of a store is refused.

    As a path, gs://bucket/runs would be a folder "gs:" here, and every host would write its own.
    Nothing, which a shell makes of a variable that is not set, would be the current folder.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty, expected a path (. is the current folder)")
    found = _ADDRESS.match(text)
    if found is not None:
        mount = (
            "; mount the bucket (gcsfuse BUCKET DIR) and give DIR, or have a run copied there by "
            f"--workdir=DIR --mirror={text}"
        ) * (found[1] == "gs")
        raise argparse.ArgumentTypeError(f"{text!r} is an address, expected a path here{mount}")
    return Path(text)


def address(text: str) -> str:
    """An address of a store such as gs://BUCKET/runs/NAME, as a type of an argument."""
    found = _ADDRESS.match(text)
    if found is None or not text[found.end() :].strip("/"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no address, expected one such as gs://BUCKET/runs/NAME"
        )
    return text
