"""Changes to files that readers must survive: bits and bytes, and the structure of each format."""

import copy
import io
import itertools
import json
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

# Suffixes of PyTorch's files.
TORCH = (".pt", ".pth", ".ckpt", ".bin")
VALUES: list[Any] = [
    0, -1, 1, 2, -5, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**20, 1e308, 1.5, float("nan"),
    float("inf"), True, False, None, "", "4", "a" * 3, "\u0000", "../../x", "/etc/passwd", "\u202e",
    [], {}, [1], [[]], {"a": 1}, [0] * 5000, {"a": {"b": [{}]}},
]  # fmt: skip
NAMES = ["x", "", "r", "../../a", "__class__", "a" * 300, "\u202e\n"]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3",
          "F8_E5M2", "F4", "C64", "U16", "U32", "U64", "F8_E8M0", "X"]  # fmt: skip
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2,
           "BF16": 2, "I16": 2, "U16": 2, "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1,
           "F8_E5M2": 1}  # fmt: skip


def data(random: Random, content: bytes, head: int | None = None) -> bytes:
    """Bits flipped, bytes set, cut out, put in and repeated, mostly in the first `head` bytes."""
    changed = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 4, 16])):
        if not changed:
            break
        limit = min(len(changed), head) if head and random.random() < 0.8 else len(changed)
        place, kind = random.randrange(limit), random.random()
        if kind < 0.4:
            changed[place] ^= 1 << random.randrange(8)
        elif kind < 0.6:
            changed[place] = random.choice([0, 255, 127, 128, 48, 57, 34, 123, 125, 91, 93])
        elif kind < 0.75:
            del changed[place : place + random.choice([1, 2, 4, 8, 64])]
        elif kind < 0.9:
            changed[place:place] = random.randbytes(random.choice([1, 2, 4, 8]))
        elif kind < 0.95:
            del changed[place:]
        else:
            other, length = random.randrange(limit), random.choice([1, 4, 16, 64])
            changed[place : place + length] = changed[other : other + length]
    return bytes(changed)


def value(random: Random, document: Any, times: int | None = None) -> Any:
    """A JSON value with parts of it replaced, removed, renamed, moved by one or repeated."""
    document = copy.deepcopy(document)
    for _ in range(times or random.choice([1, 1, 1, 2, 3])):
        places: list[tuple[Any, Any]] = [(None, None)]
        waiting = [document]
        while waiting and len(places) < 2000:
            part = waiting.pop()
            items = part.items() if isinstance(part, dict) else enumerate(part)
            for key, item in list(items)[:400]:
                places.append((part, key))
                if isinstance(item, (dict, list)):
                    waiting.append(item)
        parent, key = random.choice(places)
        if parent is None:
            if random.random() < 0.1:
                document = copy.deepcopy(random.choice(VALUES))
            if not isinstance(document, (dict, list)):
                return document
            continue
        old, kind = parent[key], random.random()
        number = isinstance(old, (int, float)) and not isinstance(old, bool)
        if kind < 0.55:
            parent[key] = copy.deepcopy(random.choice(VALUES))
        elif kind < 0.7:
            del parent[key]
        elif kind < 0.8 and isinstance(parent, dict):
            parent[random.choice(NAMES)] = parent.pop(key)
        elif kind < 0.9 and number:
            parent[key] = old + random.choice([-1, 1, 2, -old, old, 1000])
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(old))
        else:
            parent[key] = [copy.deepcopy(old)]
    return document


def document(random: Random, content: bytes) -> bytes:
    """A JSON file: its value, or now and then its text."""
    kind = random.random()
    if kind < 0.72:
        return json.dumps(value(random, json.loads(content))).encode()
    if kind < 0.76:
        return b'{"a":' * random.choice([50, 900, 100_000]) + content
    if kind < 0.8 and content.startswith(b"{"):
        return b'{"format": 1, "format": 2, ' + content[1:]
    return data(random, content)


def lines(random: Random, content: bytes) -> bytes:
    """A JSONL file: one of its documents."""
    parts = content.decode().splitlines()
    if not parts or random.random() < 0.2:
        return data(random, content)
    place = random.randrange(len(parts))
    parts[place] = json.dumps(value(random, json.loads(parts[place])))
    return ("\n".join(parts) + "\n").encode("utf-8", "surrogatepass")


def safetensors(random: Random, content: bytes) -> bytes:
    """A safetensors file: types, shapes, names, places, metadata and values that are no numbers."""
    size = struct.unpack("<Q", content[:8])[0]
    if random.random() < 0.35:
        return data(random, content, head=8 + size)
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    keys = [key for key in header if key != "__metadata__"]
    kind, twice = random.random(), ""
    key = random.choice(keys) if keys else None
    entry = header[key] if key else {}
    if kind < 0.25 and key:
        length = entry["data_offsets"][1] - entry["data_offsets"][0]
        dtype = random.choice(list(_WIDTHS))
        if length % _WIDTHS[dtype] == 0:
            count = length // _WIDTHS[dtype]
            shapes = [[count], [1, count], [count, 1], [count, 1, 1, 1], [1] * 6 + [count]]
            entry |= {"dtype": dtype, "shape": random.choice(shapes)}
    elif kind < 0.4 and key:
        shape = entry["shape"]
        entry["shape"] = random.choice([shape[::-1], [*shape, 1], [1, *shape], shape[:-1]])
    elif kind < 0.5 and key:
        entry["dtype"] = random.choice(DTYPES)
    elif kind < 0.6 and key:
        changed = random.choice(
            [key + "x", key.replace("lora_A", "lora_B"), key.upper(), "", f"unet.{key}",
             key.replace(".", "_"), key.replace("0", "9" * 12), "x\n<script>",
             key.replace("weight", "alpha")]
        )  # fmt: skip
        header[changed] = header.pop(key)
    elif kind < 0.65 and key:
        twice = f"{json.dumps(key)}: {json.dumps(entry)}, "
    elif kind < 0.85 and header.get("__metadata__"):
        metadata = header["__metadata__"]
        name = random.choice(list(metadata))
        try:
            metadata[name] = json.dumps(value(random, json.loads(metadata[name])))
        except (ValueError, TypeError):
            metadata[name] = random.choice(["", "x", "NoneType", "LoRAConfig", "FullConfig", "[]"])
    else:
        header = value(random, header)
    text = json.dumps(header).encode()
    if twice:
        text = b"{" + twice.encode() + text[1:]
    text += b" " * (-len(text) % 8)
    if random.random() < 0.15 and len(body) > 8:
        place = random.randrange(0, len(body) - 4, 4)
        number = random.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"])
        body = body[:place] + number + body[place + 4 :]
    return struct.pack("<Q", len(text)) + text + body


# Instructions of a pickle that do most to a machine, with arguments.
_SNIPPETS = [
    b"(", b".", b"0", b"1", b"2", b"N", b"}", b"]", b")", b"t", b"l", b"d", b"u", b"e", b"a", b"s",
    b"R", b"b", b"Q", b"o", b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x93", b"\x94", b"\x90",
    b"q\x01", b"h\x01", b"h\x00", b"r\xff\xff\xff\xff", b"j\x00\x00\x00\x00", b"K\xff",
    b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\0", b"\x8a\x20" + b"\x7f" * 32,
    b"cos\nsystem\n", b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nLongStorage\n",
    b"}X\x05\x00\x00\x00shapeK\x01sb",
    b"X\x04\x00\x00\x00\xe2\x80\xae!", b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"I9999\n",
    b"h\x01h\x01\x86q\x01" * 30, b"]" * 200, b"\x95" + b"\xff" * 8,
]  # fmt: skip


def pickled(random: Random, content: bytes) -> bytes:
    """A pickle: instructions put in, taken out, repeated and exchanged, or its bytes."""
    if random.random() < 0.4:
        return data(random, content)
    places = [place for _, _, place in pickletools.genops(content) if place is not None]
    bounds = [*places, len(content)]
    parts = [content[a:b] for a, b in itertools.pairwise(bounds)]
    for _ in range(random.choice([1, 1, 2, 5])):
        place, kind = random.randrange(len(parts)), random.random()
        if kind < 0.5:
            parts.insert(place, random.choice(_SNIPPETS))
        elif kind < 0.65:
            parts[place] = random.choice(_SNIPPETS)
        elif kind < 0.75 and len(parts) > 1:
            del parts[place]
        elif kind < 0.9:
            parts.insert(place, random.choice(parts))
        else:
            other = random.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
    return b"".join(parts)


def archive(random: Random, path: Path, target: Path) -> None:
    """A torch file at `path`, changed, to `target`: mostly its pickle, else a file or the zip."""
    if random.random() < 0.2:
        target.write_bytes(data(random, path.read_bytes()))
        return
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        names = old.namelist()
        chosen = random.choice(names) if random.random() < 0.15 else ""
        for name in names:
            content = old.read(name)
            if name == chosen:
                content = data(random, content)
            elif name.endswith("data.pkl") and not chosen:
                content = pickled(random, content)
            new.writestr(name, content)


def arrays(random: Random, path: Path, target: Path) -> None:
    """An .npz at `path` with one of its arrays of another type, shape, name or size."""
    with np.load(path) as file:
        found = dict(file)
    name = random.choice(list(found))
    old, kind = found.pop(name), random.random()
    if kind < 0.2:
        kinds = ["S4"] if old.dtype.kind == "U" else ["f8", "i1", "c8", "U3", "?", "u8"]
        old = old.astype(random.choice(kinds))
    elif kind < 0.4:
        old = random.choice([old.reshape(-1), old[None], old[..., None], old.reshape(-1)[:0]])
    elif kind < 0.5:
        name = random.choice([*NAMES[:4], "arr_9"])
    elif kind < 0.6 and old.dtype.kind == "f":
        old = np.where(np.arange(old.size).reshape(old.shape) == 0, np.nan, old)
    elif kind < 0.7:
        old = np.full_like(old, random.choice([0, 127, 99]))
    found |= {name: old} if kind < 0.85 else {}
    buffer = io.BytesIO()
    if kind < 0.95:
        np.savez(buffer, **found)
    else:  # the header of an array, and not its numbers
        np.save(buffer, old)
        inner, buffer = data(random, buffer.getvalue(), head=128), io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as new:
            new.writestr(f"{name}.npy", inner)
    target.write_bytes(buffer.getvalue())


def png(random: Random, content: bytes) -> bytes:
    """A PNG: a chunk of it with its checksum made to fit, or its bytes."""
    if random.random() < 0.4:
        return data(random, content)
    chunks, place = [], 8
    while place < len(content):
        size = struct.unpack(">I", content[place : place + 4])[0]
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += 12 + size
    chosen, kind = random.randrange(len(chunks)), random.random()
    name, body = chunks[chosen]
    if kind < 0.5:
        chunks[chosen] = name, data(random, body, head=13)
    elif kind < 0.6:
        sizes = struct.pack(">II", *random.choices([0, 1, 2**16, 2**31 - 1, 2**31], k=2))
        chunks[0] = chunks[0][0], sizes + chunks[0][1][8:]
    elif kind < 0.8:
        chunks.insert(chosen, (random.choice([b"zTXt", b"iCCP", b"PLTE", b"tRNS", b"acTL"]), body))
    else:
        del chunks[chosen]
    packed = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return content[:8] + b"".join(packed)


def tar(random: Random, content: bytes) -> bytes:
    """A tar file: a header of it with its checksum made to fit, or its bytes."""
    if random.random() < 0.3:
        return data(random, content)
    changed = bytearray(content)
    start = 512 * random.randrange(len(content) // 512)
    head = bytearray(data(random, content[start : start + 512])[:512].ljust(512, b"\0"))
    if random.random() < 0.4:
        head[124:136] = random.choice([b"77777777777\0", b"00000000000\0", b"-0000000001\0"])
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    changed[start : start + 512] = head
    return bytes(changed)


_CELLS = ["", "x", "-1", "1e999", "../../x", '"', "\u0000", "9" * 30, "n01440764", "a,b", "é", " "]


def text(random: Random, content: bytes) -> bytes:
    """A list or a table: a cell or a line exchanged, repeated or removed, or its bytes."""
    if random.random() < 0.35:
        return data(random, content)
    rows = content.decode().split("\n")
    place, kind = random.randrange(len(rows)), random.random()
    separator = "," if "," in rows[place] else " "
    cells = rows[place].split(separator)
    if kind < 0.5:
        cells[random.randrange(len(cells))] = random.choice(_CELLS)
        rows[place] = separator.join(cells)
    elif kind < 0.65:
        del rows[place]
    elif kind < 0.8:
        rows.insert(place, random.choice(rows))
    elif kind < 0.9:
        rows[place] = separator.join([*cells, random.choice(_CELLS)])
    else:
        rows = rows[:place]
    return "\n".join(rows).encode()


BY_SUFFIX: Mapping[str, Callable[[Random, bytes], bytes]] = {
    ".json": document,
    ".jsonl": lines,
    ".safetensors": safetensors,
    ".seal": document,
    ".png": png,
    ".tar": tar,
    ".csv": text,
    ".txt": text,
}


def changed(random: Random, path: Path, content: bytes) -> bytes:
    """`content` of a file called `path`, changed as its format suggests."""
    return BY_SUFFIX.get(path.suffix, data)(random, content)
