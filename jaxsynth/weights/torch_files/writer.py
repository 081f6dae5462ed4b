"""PyTorch's own files (.pt), written without PyTorch: dicts, lists, numbers, texts and tensors.

For programs that read nothing else (A1111's hypernetworks). The pickle names what `torch.load` with
`weights_only` allows, the functions that rebuild tensors, and nothing else. The zip archive is
PyTorch's since 1.6: `data.pkl`, the byte order, a version, and one file for each tensor.
"""

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxsynth.core.io import replacing

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}
_DATE = (1980, 1, 1, 0, 0, 0)


def write_pickled(path: str | Path, content: dict[Any, Any]) -> None:
    """Writes nested plain data; TypeError naming what is none. The same bytes for the same data."""
    path = Path(path)
    writer = _Writer()
    writer.out.write(b"\x80\x02")  # protocol 2
    writer.put(content)
    writer.out.write(b".")
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {
        "data.pkl": writer.out.getvalue(),
        "byteorder": b"little",
        **{f"data/{i}": array.tobytes() for i, array in enumerate(writer.arrays)},
        "version": b"3\n",
    }
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}", _DATE), data)


class _Writer:
    """The opcodes of a pickle; see the `pickletools` module for what each means."""

    def __init__(self):
        self.out = io.BytesIO()
        self.arrays: list[np.ndarray] = []

    def put(self, value: Any) -> None:
        if value is None:
            self.out.write(b"N")
        elif value is True or value is False:
            self.out.write(b"\x88" if value else b"\x89")
        elif isinstance(value, int):
            if not -(2**31) <= value < 2**31:
                raise TypeError(f"{value}: only integers of 32 bits are written")
            self.out.write(b"J" + struct.pack("<i", value))
        elif isinstance(value, float):
            self.out.write(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            data = value.encode()
            self.out.write(b"X" + struct.pack("<I", len(data)) + data)
        elif isinstance(value, dict):
            self.out.write(b"}(")
            for key, item in value.items():
                self.put(key)
                self.put(item)
            self.out.write(b"u")
        elif isinstance(value, list):
            self.out.write(b"](")
            for item in value:
                self.put(item)
            self.out.write(b"e")
        elif isinstance(value, tuple):
            self.out.write(b"(")
            for item in value:
                self.put(item)
            self.out.write(b"t")
        elif isinstance(value, np.ndarray):
            self._tensor(value)
        else:
            raise TypeError(f"a {type(value).__name__} is no plain data or array: {value!r:.60}")

    def _tensor(self, array: np.ndarray) -> None:
        if array.dtype.name not in _STORAGES:
            raise TypeError(f"an array of {array.dtype}, expected one of {', '.join(_STORAGES)}")
        array = np.ascontiguousarray(array)
        strides = tuple(step // array.itemsize for step in array.strides)
        self.out.write(b"ctorch._utils\n_rebuild_tensor_v2\n(")
        # The persistent id of a storage: ("storage", class, key, device, elements).
        self.out.write(b"(")
        self.put("storage")
        self.out.write(f"ctorch\n{_STORAGES[array.dtype.name]}\n".encode())
        for part in (str(len(self.arrays)), "cpu", array.size):
            self.put(part)
        self.out.write(b"tQ")
        for part in (0, tuple(array.shape), strides, False):
            self.put(part)
        self.out.write(b"ccollections\nOrderedDict\n)RtR")
        self.arrays.append(array)
