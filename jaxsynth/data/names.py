"""Names of classes and files: class names to folder names and back, and the order of names."""

import re
from urllib.parse import quote, unquote


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts "img2" before "img10"."""
    parts = re.findall(r"\d+|\D+", text)
    return tuple((0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts)


def safe_name(name: str) -> str:
    """A class name as one portable folder name: percent-encoded, no "/", space or first dot."""
    if not name:
        raise ValueError("a class name is empty")
    safe = quote(name, safe="")
    return "%2E" + safe[1:] if safe.startswith(".") else safe


def class_of_folder(folder: str) -> str:
    """The class that `safe_name` wrote as `folder`; any other folder name is the class itself."""
    name = unquote(folder)
    return name if name and safe_name(name) == folder else folder
