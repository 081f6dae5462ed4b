"""Files of data: images, folders and tables of them, packed images, stores, lists of classes."""

import hashlib
import json
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from jaxsynth.data.dataset import DataConfig, Dataset
from jaxsynth.data.decode import decode_image
from jaxsynth.data.export import export
from jaxsynth.data.faces import Faces, read_faces, write_faces
from jaxsynth.data.films import count_frames
from jaxsynth.data.keypoints import read_keypoints
from jaxsynth.data.load import load_dataset
from jaxsynth.data.procedural.concepts import read_concepts
from jaxsynth.data.prompts import read_templates
from jaxsynth.data.robustness_sets import (
    LabelSpace,
    read_cifar10,
    read_flat,
    read_images,
    read_label_space,
)
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.sources.captioned import captions, read_captions
from jaxsynth.data.sources.shards import read_shards
from jaxsynth.data.store import Entry, ImageStore, StoreWriter
from jaxsynth.generation.folder import read_requests
from jaxsynth.robustness.bias_sets import read_class_map
from jaxsynth.weights.face_encoder import read_embeddings
from tests.fuzz.cases import Case, below


def _picture(seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (12, 8, 3), np.uint8)
    return Image.fromarray(values)


def images(folder: Path) -> list[Case]:
    cases = []
    for name, options in {
        "png": {}, "jpg": {}, "webp": {}, "bmp": {}, "ppm": {}, "gif": {}, "avif": {},
        "tif": {"compression": "tiff_lzw"},
    }.items():  # fmt: skip
        path = folder / f"picture.{name}"
        _picture().save(path, **options)
        cases.append(Case(name, path, decode_image))
    for mode in ("P", "L", "1", "RGBA", "I;16"):
        path = folder / f"{mode.replace(';', '')}.png"
        grey = Image.fromarray(np.full((8, 8), 300, np.uint16))
        (grey if mode == "I;16" else _picture().convert(mode)).save(path)
        cases.append(Case(f"png {mode}", path, decode_image))
    return cases


def films(folder: Path) -> list[Case]:
    """Animations; videos are FFmpeg's, which other programs fuzz."""
    cases = []
    for name in ("gif", "webp"):
        path = folder / f"film.{name}"
        first, *others = (_picture(i) for i in range(3))
        first.save(path, save_all=True, append_images=others)
        cases.append(Case(name, path, count_frames))
    return cases


def faces(folder: Path) -> list[Case]:
    """Embeddings and keypoints of faces, and texts of shots in a table of their own."""
    points = np.random.default_rng(0).uniform(0, 12, (5, 2))
    known = Faces(("a", "b"), np.ones((2, 4), np.float32), np.stack([points] * 2).astype("f4"))
    sized = {"keypoints": points.tolist(), "width": 24, "height": 36}
    (folder / "points.json").write_text(json.dumps(points.tolist()))
    (folder / "sized.json").write_text(json.dumps(sized))
    np.save(folder / "points.npy", points)
    np.savez(folder / "points.npz", keypoints=points, size=np.array([36, 24]))
    np.save(folder / "face.npy", known.embeddings)
    np.savez(folder / "face.npz", embeddings=known.embeddings)
    lines = [json.dumps({"file_name": id_, "text": f"a {id_}"}) for id_ in "ab"]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    drawn = ArraySource(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2), list("ab"))
    shown = Dataset("x", ("c", "d"), ("c", "d"), "{}", drawn, drawn)

    def keypoints(path: Path) -> None:
        assert np.isfinite(read_keypoints(path, (12, 8))).all()

    def embeddings(path: Path) -> None:
        assert np.isfinite(read_embeddings(path)).all()

    def texts(path: Path) -> None:
        read_captions(path, shown).of(drawn)

    return [
        Case("faces", write_faces(folder / "faces.npz", known), read_faces),
        *(
            Case(name, folder / name, keypoints)
            for name in ("points.json", "sized.json", "points.npy", "points.npz")
        ),
        *(Case(name, folder / name, embeddings) for name in ("face.npy", "face.npz")),
        Case("texts of shots", folder / "texts.jsonl", texts),
    ]


def _read_folder(path: Path) -> None:
    dataset = load_dataset(DataConfig(path=str(path), image_size=8, test_fraction=0.5))
    for source in (dataset.train, dataset.test):
        for index in range(min(len(source), 4)):
            source[index]


def _read_captions(path: Path) -> None:
    dataset = load_dataset(DataConfig(source="captions", path=str(path), image_size=8))
    captions(dataset, dataset.train)


def folders(folder: Path) -> list[Case]:
    cases = []
    tables = {
        "": [],
        "labels.csv": ["file,label", *(f"{n}.png,{'ab'[n % 2]}" for n in range(4))],
        "metadata.jsonl": [
            json.dumps({"file_name": f"{n}.png", "label": "ab"[n % 2]}) for n in range(4)
        ],
        "metadata.csv": ["file_name;class_name", *(f"{n}.png;{'ab'[n % 2]}" for n in range(4))],
    }
    for table, rows in tables.items():
        root = folder / (table.replace(".", "-") or "classes")
        for number in range(4):
            place = root if table else root / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            _picture(number).save(place / f"{number}.png")
        names = below(root)
        if table:
            (root / table).write_text("\n".join(rows) + "\n")
            names = [*names[:1], *[table] * 4]
        cases.append(Case(table or "classes", root, _read_folder, names))
    root = folder / "captions"
    root.mkdir()
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"a {n}"}) for n in range(4)]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    for number in range(4):
        _picture(number).save(root / f"{number}.png")
    cases.append(Case("captions", root, _read_captions, ["0.png", *["metadata.jsonl"] * 4]))
    return cases


def _store(root: Path) -> ImageStore:
    writer = StoreWriter(root, ["a", "b"], 4, 2)
    for shard in range(2):
        entries = [
            Entry(label, "ab"[label], shard, prompt="p", scores={"clip": 0.5}) for label in (0, 1)
        ]
        writer.write_shard(shard, [np.full((8, 8, 3), 60 * shard, np.uint8)] * 2, entries)
    return ImageStore(root)


def shards(folder: Path) -> list[Case]:
    """What `export` writes and `datasets` saves: tar, Parquet, Arrow, a folder with a manifest."""
    import pyarrow as pa

    store = _store(folder / "store")
    for kind in ("webdataset", "parquet", "imagefolder"):
        export(store, folder / kind, kind, shard_size=2)
    arrow = folder / "arrow"
    arrow.mkdir()
    rows = [{"image": {"bytes": store.encoded(n)}, "label": n % 2} for n in range(4)]
    features = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    schema = pa.Table.from_pylist(rows).schema.with_metadata({"huggingface": json.dumps(features)})
    with pa.OSFile(str(arrow / "data-0.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as w:
        w.write_table(pa.Table.from_pylist(rows, schema=schema))

    def read(path: Path) -> None:
        sources, _ = read_shards(path, 8)
        for source in sources.values():
            for index in range(min(len(source), 4)):
                source[index]

    cases = [
        Case(kind, folder / kind, read, below(folder / kind))
        for kind in ("webdataset", "parquet", "arrow")
    ]
    names = ["metadata.jsonl"]
    return [*cases, Case("imagefolder", folder / "imagefolder", _read_folder, names)]


def _sealed(random: Random, root: Path, path: Path) -> None:
    """Seven times in ten the seal of a changed shard is made to fit, as an attacker's would."""
    seal = path.with_suffix(".seal")
    if path.suffix in (".jsonl", ".array_record") and random.random() < 0.7:
        values = json.loads(seal.read_text())
        values[path.suffix] = hashlib.sha256(path.read_bytes()).hexdigest()
        seal.write_text(json.dumps(values))


def stores(folder: Path) -> list[Case]:
    root = folder / "store"
    _store(root)

    def read(path: Path) -> None:
        store = ImageStore(path)
        assert set(store.labels.tolist()) <= {0, 1}, "a label of no class"
        for index in range(min(len(store), 10)):
            store[index]
        store.digest, store.titles, store.record_digests()

    def go_on(path: Path) -> None:
        StoreWriter(path, ["a", "b"], 4, 2).pending()

    return [
        Case("store", root, read, below(root), _sealed),
        Case("writer", root, go_on, below(root), _sealed),
    ]


def lists(folder: Path) -> list[Case]:
    """Lists that people write: classes, labels, files, prompts, templates, concepts."""
    for name, content in {
        "classes.json": json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "b_c"]}),
        "classes.txt": "n01440764 tench\nn01443537 goldfish, carp\n",
        "names.txt": "a cat\na dog\n",
        "map.json": json.dumps({"0": 1, "1": -1}),
        "groups.json": json.dumps({"x": [0, 2], "y": [1]}),
        "templates.txt": "a photo of a {}.\nart of the {}\n",
        "prompts.txt": "a red ball\na dog\n",
        "prompts.jsonl": json.dumps({"prompt": "a cat", "negative_prompt": "x", "seed": 4}) + "\n",
        "concepts.txt": "a red hat\nsunglasses # over the eyes\n",
        "concepts.json": json.dumps(
            {
                "concepts": [
                    {
                        "prompt": "a red hat",
                        "family": "artistic",
                        "paraphrases": ["x"],
                        "edits": [{"operation": "tint", "colour": "red"}],
                    }
                ]
            }
        ),
    }.items():
        (folder / name).write_text(content)
    flat = folder / "flat"
    flat.mkdir()
    for number in range(3):
        _picture(number).save(flat / f"{number}.png")
    (folder / "flat.csv").write_text("ImageId,Prediction\n0.png,a\n1.png,b\n2.png,a\n")
    (folder / "flat.txt").write_text("a\nb\na\n")
    (folder / "files.txt").write_text("0.png 1\n2.png -1\n")
    cifar = folder / "test_batch.bin"
    cifar.write_bytes(bytes(3073 * 2))
    space = LabelSpace(("a", "b"), ("a", "b"))

    def requests(path: Path) -> None:
        read_requests(path, negative_prompt="", seed=0)

    return [
        Case("label space", folder / "classes.json", read_label_space),
        Case("label space of words", folder / "classes.txt", read_label_space),
        Case("label space of names", folder / "names.txt", read_label_space),
        Case("class map", folder / "map.json", lambda p: read_class_map(p, ["x", "y"])),
        Case("class groups", folder / "groups.json", lambda p: read_class_map(p, ["x", "y"])),
        Case("templates", folder / "templates.txt", lambda p: read_templates(str(p))),
        Case("prompts", folder / "prompts.txt", requests),
        Case("requests", folder / "prompts.jsonl", requests),
        Case("concepts of text", folder / "concepts.txt", lambda p: read_concepts(p, "artistic")),
        Case("concepts", folder / "concepts.json", lambda p: read_concepts(p, "artistic")),
        Case("labels of images", folder / "flat.csv", lambda p: read_flat(flat, p, space)),
        Case("labels in order", folder / "flat.txt", lambda p: read_flat(flat, p, space)),
        Case("files", folder / "files.txt", lambda p: read_images(flat, files=p)),
        Case("cifar10", cifar, lambda p: read_cifar10(p.parent)),
    ]
