"""Names of classes and files: class names to folder names and back, and the order of names."""

import hashlib
import re
from urllib.parse import quote, unquote

# What Windows, macOS or Linux does not take in a file's name, and the sign of the encoding itself.
_UNSAFE = re.compile(r'[%/\\:*?"<>|\x00-\x1f\x7f]|^[. ]|[. ]$')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
# File systems take names of 255 bytes; some of them are for suffixes and temporary names.
_LONGEST = 180


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts "img2" before "img10"."""
    parts = re.findall(r"\d+|\D+", text)
    return tuple((0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts)


def safe_name(name: str) -> str:
    """A class name as one portable folder name.

    Words, spaces and letters of any script stay; what a file system may refuse is percent-encoded.
    A name of more than 180 bytes is cut and ends in a digest of the whole.
    """
    if not name:
        raise ValueError("a class name is empty")
    safe = _UNSAFE.sub(lambda found: quote(found[0], safe="").replace(".", "%2E"), name)
    if _RESERVED.fullmatch(safe):
        safe = f"%{ord(safe[0]):02X}{safe[1:]}"
    if len(safe.encode()) > _LONGEST:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        safe = f"{safe.encode()[: _LONGEST - 17].decode(errors='ignore').rstrip('. ')}~{digest}"
    return safe


def class_of_folder(folder: str) -> str:
    """The class that `safe_name` wrote as `folder`; any other folder name is the class itself.

    Earlier exports encoded spaces and accents, too: those are decoded as well.
    """
    name = unquote(folder)
    return name if name and folder in (safe_name(name), _encoded(name)) else folder


def _encoded(name: str) -> str:
    safe = quote(name, safe="")
    return "%2E" + safe[1:] if safe.startswith(".") else safe
