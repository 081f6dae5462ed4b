"""Pictures of prompts as PNG files, each with how it was made, in a folder to go on with.

    00000-000.png ...   image 0 of prompt 0; its settings are in it too, as the text "jaxsynth"
    00000-000.gif ...   or an animation, with its settings as comment, and its frames as PNG files
    00000-000/000.png   in a folder
    generate.json       what was asked for, written first: another request is refused
    metadata.jsonl      one line an image, written last, in the form that image folders have

Image i of a prompt has the key of image i of class 0 at the prompt's seed (`sampler.image_keys`).
So a picture depends on its prompt, seed, number and settings, and not on the prompts beside it.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin

from jaxsynth.core.console import progress
from jaxsynth.core.documents import parse_json, read_text
from jaxsynth.core.errors import UsageError, UserError, quoted
from jaxsynth.core.io import read_json, write_bytes, write_json, write_text
from jaxsynth.generation.animations import Film
from jaxsynth.generation.generate import Generator
from jaxsynth.generation.sampler import image_keys

REQUEST_FILE, METADATA_FILE, TEXT_KEY = "generate.json", "metadata.jsonl", "jaxsynth"
MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Request:
    """A prompt to be drawn, what it is guided away from, and the seed of its images."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0


def read_requests(path: Path, *, negative_prompt: str, seed: int) -> list[Request]:
    """Prompts from a text file, one a line, or from a .jsonl file of `Request`s.

    `negative_prompt` and `seed` are for lines that do not say their own. UserError naming file and
    line.
    """
    requests = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            where = f"{path}, line {number}"
            requests.append(_request(line, where, Request("", negative_prompt, seed)))
        else:
            requests.append(Request(line.strip(), negative_prompt, seed))
    if not requests:
        raise UserError(f"{path}: holds no prompt; expected one a line")
    return requests


def _request(line: str, where: str, default: Request) -> Request:
    values = parse_json(line, where, Any)
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f'{where}: expected {{"prompt": "..."}}, found {quoted(values)}')
    if unknown := sorted(values.keys() - asdict(default).keys()):
        raise UserError(
            f"{where}: unknown field {quoted(unknown[0])}, expected prompt, negative_prompt or seed"
        )
    if not isinstance(values.get("negative_prompt", ""), str):
        raise UserError(
            f"{where}: negative_prompt {quoted(values['negative_prompt'])}, expected a text"
        )
    seed = values.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MOST_SEED:
        raise UserError(f"{where}: seed {quoted(seed)}, expected a whole number 0 to {MOST_SEED}")
    return Request(**{**asdict(default), **values})


def begin(folder: Path, requests: Sequence[Request], count: int, settings: Mapping[str, Any]):
    """Writes what is asked for, or finds that the folder was begun for the same.

    UsageError for a folder that holds other files, or images of other settings, naming the first.
    """
    asked = {"format": 1, "count": count, **settings, "requests": [asdict(r) for r in requests]}
    asked = json.loads(json.dumps(asked))
    path = folder / REQUEST_FILE
    if path.is_file():
        there = read_json(path)
        for name in {**asked, **there}:
            if there.get(name) != asked.get(name):
                raise UsageError(
                    f"{folder} holds images of another request: {quoted(name)[1:-1]} was "
                    f"{_short(there.get(name))}, now {_short(asked.get(name))}; "
                    "give another --out or remove the folder"
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} is not empty and no folder of images to go on with ({REQUEST_FILE} is "
            "missing); give another --out"
        )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, asked)


def fill_folder(
    generator: Generator,
    folder: Path,
    requests: Sequence[Request],
    count: int,
    settings: Mapping[str, Any],
    film: Film | None = None,
) -> int:
    """Draws the images that are not there yet, `count` of each request; returns how many it drew.

    The generator's prompts are the requests'. `folder` is one that `begin` was called for. With a
    `film` the generator draws animations, which are written so.
    """
    ending = "png" if film is None else "gif"
    wanted = [(row, index) for row in range(len(requests)) for index in range(count)]
    missing = [place for place in wanted if not (folder / file_name(*place, ending)).is_file()]
    seeds = np.array([request.seed for request in requests], np.int64)
    with progress("images", len(wanted), start=len(wanted) - len(missing)) as bar:
        for start in range(0, len(missing), generator.batch_size):
            labels, indices = np.array(missing[start : start + generator.batch_size]).T
            keys = image_keys(seeds[labels], np.zeros_like(labels), indices)
            images = generator.draw(keys, labels, indices)
            for image, label, index in zip(images, labels, indices, strict=True):
                record = _record(requests[label], index, settings)
                path = folder / file_name(label, index, ending)
                if film is None:
                    write_bytes(path, _png(image, record))
                    continue
                path.with_suffix("").mkdir(exist_ok=True)
                for number, frame in enumerate(image):
                    own = {**record, "frame": number}
                    write_bytes(path.with_suffix("") / f"{number:03d}.png", _png(frame, own))
                film.write(path, image, json.dumps(record))
            bar.advance(len(images))
    lines = [
        {"file_name": file_name(row, index, ending), **_record(requests[row], index, settings)}
        for row, index in wanted
    ]
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    write_text(folder / METADATA_FILE, text)
    return len(missing)


def file_name(row: int, index: int, ending: str = "png") -> str:
    """The file of image `index` of request `row`."""
    return f"{row:05d}-{index:03d}.{ending}"


def _record(request: Request, index: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**asdict(request), "index": int(index), **settings}


def _png(image: UInt8[np.ndarray, "h w 3"], record: Mapping[str, Any]) -> bytes:
    """PNG bytes with the record as a text chunk."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt(TEXT_KEY, json.dumps(record, ensure_ascii=False))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=6, pnginfo=text)
    return buffer.getvalue()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
