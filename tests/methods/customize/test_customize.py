"""Customisation, end to end in the smallest size: what techniques leave, restarts, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxsynth.adapters import registry
from jaxsynth.adapters.inject import extract
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.cli import main as cli
from jaxsynth.core.config import load_config, override, to_dataclass
from jaxsynth.core.errors import UserError
from jaxsynth.data.dataset import DataConfig
from jaxsynth.data.faces import Faces, keypoints_of, write_faces
from jaxsynth.data.load import load_dataset
from jaxsynth.data.procedural.faces import PAPERS
from jaxsynth.data.store import ImageStore
from jaxsynth.methods.customize.config import TECHNIQUES, Config
from jaxsynth.methods.customize.run import plan, run
from jaxsynth.models.diffusion.motion import MotionConfig, MotionModules
from jaxsynth.runs.stage import MANIFEST, load_artifact
from jaxsynth.training.metrics import read_metrics
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.adapters.diffusers import write_diffusers
from jaxsynth.weights.adapters.identities import read_identity
from jaxsynth.weights.adapters.motion import write_motion
from jaxsynth.weights.hf import load_pipeline
from tests.adapters.nets import randomised
from tests.methods.small_base import random_network
from tests.words import last_of_each

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[3] / "configs" / "customize.py"
# The random base knows the words of digits alone.
OWN = {
    "textual_inversion": ("textual_inversion.initializer=three",),
    "dreambooth": ("dreambooth.adapter=full",),
    "lora": ("data.class_names=0,1", "lora.evaluate_every=4"),
    "ip_adapter": (
        "data.source=digits", "data.name=", "data.images_per_class=500", "data.class_names=0,1",
        "ip_adapter.evaluate_every=4",
        "ip_adapter.sample_every=4", "prompts=zero",
    ),
    "instantid": (
        "instantid.evaluate_every=4", "instantid.sample_every=4", "prompts=zero",
        *(
            f"data.display_names.face on a {paper} background={name}"
            for paper, name in zip(PAPERS, ("one", "two", "three", "four"), strict=True)
        ),
    ),
    "animatediff": (
        "prompts=two", "animatediff.evaluate_every=4", "animatediff.sample_every=4",
        "animatediff.version=v1",
    ),
    "motion_lora": ("prompts=two", "motion_lora.rank=2"),
}  # fmt: skip
MOTION = ("animatediff", "motion_lora")
FIRST = {"instantid": ["faces"]}
PROGRAMS = {"dreambooth": ["draw, class"]}
FILES = {
    "textual_inversion": "learned_embeds.safetensors",
    "dreambooth": "adapter.safetensors",
    "lora": "pytorch_lora_weights.safetensors",
    "ip_adapter": "ip-adapter.safetensors",
    "instantid": "ip-adapter.bin",
}


def arguments(base, workdir, technique, *more) -> list[str]:
    fields = (
        f"base={base}", f"clip={base / 'clip'}", "data.image_size=8", "shots=2",
        f"{technique}.batch_size=8", "generate.images_per_class=3", *OWN[technique], *more,
    )  # fmt: skip
    words = [
        "run", f"--config={CONFIG}:smoke,technique={technique}", f"--workdir={workdir}",
        *(f"--config.{field}" for field in fields),
    ]  # fmt: skip
    return last_of_each(words)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Compiled programs stay in the tests' own cache, and an error stays on one line."""
    monkeypatch.setenv("JAXSYNTH_CACHE", "off")
    monkeypatch.setenv("COLUMNS", "400")


@pytest.mark.parametrize("technique", [x for x in TECHNIQUES if x not in MOTION])
def test_a_technique_learns_draws_and_is_measured(base_folder, tmp_path, capfd, technique):
    workdir = tmp_path / "w"
    given = arguments(base_folder, workdir, technique)
    assert cli.main(given) == 0
    learned = load_artifact(workdir / "learned-seed0")
    assert learned.counts["file"] == FILES[technique] and learned.counts["steps"] == 4
    stores = {name: ImageStore(workdir / f"{name}-seed0") for name in ("base", "images")}
    prompts = 3 if technique == "lora" else 2
    assert {len(store) for store in stores.values()} == {3 * prompts}
    names = {"textual_inversion": "<subject>", "dreambooth": "sks three", "lora": "seven"}
    name = names.get(technique, "zero")
    assert all(name in entry.prompt for entry in stores["images"].entries[::prompts])
    changed = [
        not np.array_equal(base.image, drawn.image)
        for base, drawn in zip(stores["base"], stores["images"], strict=True)
    ]
    assert all(changed)
    if technique == "dreambooth":
        (prompt,) = ImageStore(workdir / "class-seed0").class_names
        assert prompt == "a photo of the digit three"
    if technique in ("ip_adapter", "instantid"):
        assert "like" in stores["images"].class_names[1]
        assert "custom_others" in json.loads((workdir / "results.json").read_text())["seeds"][0]
    if technique in ("lora", "ip_adapter", "instantid"):
        lines = read_metrics(workdir / "learned-seed0" / ".training" / "metrics.jsonl")
        assert any("eval/held_out_error" in line for line in lines)
    found = json.loads((workdir / "results.json").read_text())
    (result,) = found["seeds"]
    assert all(-1 <= result[key] <= 1 for key in ("photos", "base", "custom", "custom_prompt"))
    assert "[" in found["gains"]["similarity"]
    page = (workdir / "report.html").read_text()
    assert "untouched base" in page and "data:image/png" in page
    times = {path: path.stat().st_mtime_ns for path in workdir.rglob(MANIFEST)}
    assert cli.main(given) == 0
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob(MANIFEST)} == times
    capfd.readouterr()
    assert cli.main(last_of_each([*given, f"--config.{technique}.learning_rate=1"])) == 1
    assert "learning_rate" in capfd.readouterr().err


def test_motion_is_learned_drawn_and_measured(base_folder, tmp_path, capfd):
    """Motion modules, a LoRA on them, and an animation of both by `jaxsynth generate`."""
    folders = {name: tmp_path / name for name in MOTION}
    modules = folders["animatediff"] / "learned-seed0"
    unet = load_pipeline(base_folder).unet
    config = LoRAConfig(rank=2, alpha=3.0, targets=("to_q", "to_v"))
    state = randomised(extract(registry.add(unet, config, rngs=jax.random.key(0))), 1)
    write_diffusers(tmp_path / "domain.safetensors", {"unet": state})
    ways = {
        "animatediff": (f"domain_adapter={tmp_path / 'domain.safetensors'}",),
        "motion_lora": (f"motion={modules}",),
    }
    files = {
        "animatediff": ("diffusion_pytorch_model.safetensors", "motion_modules.safetensors"),
        "motion_lora": ("pytorch_lora_weights.safetensors", "motion_lora.safetensors"),
    }
    for technique, more in ways.items():
        workdir = folders[technique]
        assert cli.main(arguments(base_folder, workdir, technique, *more)) == 0
        learned = load_artifact(workdir / "learned-seed0")
        assert learned.counts["file"] == files[technique][0] and learned.counts["steps"] == 4
        assert all((learned.path / name).is_file() for name in files[technique])
        stores = [ImageStore(workdir / f"{name}-seed0") for name in ("base", "images")]
        # Strips of three frames.
        assert all(len(store) == 3 and store[0].image.shape == (8, 24, 3) for store in stores)
        assert any(not np.array_equal(a.image, b.image) for a, b in zip(*stores, strict=True))
        found = json.loads((workdir / "results.json").read_text())
        (result,) = found["seeds"]
        assert 0.5 < result["clips_along" if technique == "motion_lora" else "clips_speed"] < 4
        assert ("along" in found["gains"]) == (technique == "motion_lora")
        page = (workdir / "report.html").read_text()
        assert "held-out clips" in page and "data:image/png" in page
    lines = read_metrics(modules / ".training" / "metrics.jsonl")
    assert any("eval/held_out_error" in line for line in lines)
    assert list((modules / ".training").rglob("*.png"))
    out = tmp_path / "out"
    argv = [
        "generate", f"--base={base_folder}", "--prompt=two", "--count=1", "--steps=2",
        f"--motion={modules}", f"--motion-lora={folders['motion_lora'] / 'learned-seed0'}:0.7",
        "--frames=3", f"--out={out}",
    ]  # fmt: skip
    assert cli.main(argv) == 0
    assert (out / "00000-000.gif").is_file()
    assert cli.main(arguments(base_folder, tmp_path / "x", "motion_lora", "motion=nowhere")) == 2
    assert "nowhere" in capfd.readouterr().err


REFUSED = {
    "technique": ("lora", "technique=controlnet", "(ControlNet is the method controlled"),
    "faces of none": ("lora", "faces=x.npz", "faces: lora sees no faces"),
    "an image encoder of faces": ("instantid", "image_encoder=x", "instantid sees no images"),
    "both faces": ("instantid", "faces=x.npz", "`faces` has embeddings already"),
    "a width of heads": ("instantid", "face_encoder.width=20", "width: 20, expected a multiple"),
    "a resampler of heads": ("instantid", "instantid.hidden=70", "hidden: 70, expected a multiple"),
    "no motion modules": ("motion_lora", "motion=", "motion: '', but motion_lora adapts motion"),
    "modules of none": ("lora", "motion=x", "motion: 'x', but lora adapts none"),
    "images for clips": ("animatediff", "data.name=printed", "clips are needed"),
    "a domain of images": ("lora", "domain_adapter=x", "domain_adapter: 'x' is for animatediff"),
    "short clips": ("animatediff", "animatediff.stride=9", "clips shorter than the 19 frames"),
    "frames": ("animatediff", "animatediff.frames=25", "modules v1 have positions for 24"),
    "no references": ("ip_adapter", "references=0", "references: 0, but ip_adapter draws like"),
    "too many references": ("ip_adapter", "references=99999", "references: 99999, but only"),
    "references of none": ("lora", "references=2", "references: 2, but lora draws like no image"),
    "an encoder of none": ("lora", "image_encoder=x", "image_encoder: lora sees no images"),
    "a resampler's": ("ip_adapter", "ip_adapter.depth=4", "depth: 4 is of projection=resampler"),
    "masks of none": ("lora", "mask_folder=x", "mask_folder: masks are for lora.unmasked_weight"),
    "drops": ("ip_adapter", "ip_adapter.drop_text=0.95", "expected at most 1 in all"),
    "another's settings": ("lora", "technique=dreambooth", "lora: settings of another technique"),
    "several classes": ("dreambooth", "data.class_names=3,4", "data: 2 classes"),
    "no word": ("dreambooth", "word=", "word: '', but dreambooth needs the class"),
    "a prompt without it": ("dreambooth", "prompts=a photo", "prompts: 'a photo', expected one {}"),
    "a known token": ("textual_inversion", "textual_inversion.token=photo", "token 'photo' is in"),
    "an initializer of parts": (
        "textual_inversion", "textual_inversion.initializer=flower", "initializer 'flower': is ",
    ),
    "no class images": ("dreambooth", "dreambooth.class_images=0", "class_images: 0, expected"),
    "captions": ("lora", "data.source=captions", "path"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_told_before_anything_is_made(base_folder, tmp_path, capfd, name):
    technique, field, message = REFUSED[name]
    assert cli.main(arguments(base_folder, tmp_path / "w", technique, field)) in (1, 2)
    error = capfd.readouterr().err
    assert message in error and not list(tmp_path.rglob(MANIFEST))


BUCKETS = ("data.image_size=0", "lora.buckets.enabled=true")
UNSUITED = {
    "data.image_size=8": "data.image_size: 8 cuts images to squares before they come to lora",
    "lora.buckets.step=6": "buckets.step: 6, expected a multiple of 4 for this base, such as 8",
    "lora.buckets.min_side=12": "buckets.min_side: 12, expected at most image_size = 8",
    "lora.crops_per_image=2": "crops_per_image: 2, but an image in a bucket is cut once",
}


@pytest.mark.parametrize("field", UNSUITED)
def test_buckets_that_do_not_suit_are_told_beforehand(deeper_folder, tmp_path, capfd, field):
    assert cli.main(arguments(deeper_folder, tmp_path / "w", "lora", *BUCKETS, field)) in (1, 2)
    assert UNSUITED[field] in capfd.readouterr().err and not list(tmp_path.rglob(MANIFEST))


def test_captioned_images_are_learned_in_buckets_with_their_masks(deeper_folder, tmp_path, capfd):
    """On eight devices, of which most have no image of the rarer shape; others are held out."""
    folder, masks = tmp_path / "photos", tmp_path / "masks"
    rng = np.random.default_rng(0)
    for place in (folder, masks):
        place.mkdir()
    for i in range(10):
        height, width = (9, 9) if i % 5 else (8, 32)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        Image.fromarray(pixels[..., 0]).save(masks / f"{i}.png")
        (folder / f"{i}.txt").write_text(("zero", "one")[i % 2])
    given = arguments(
        deeper_folder, tmp_path / "w", "lora", *BUCKETS, "data.source=captions",
        f"data.path={folder}", "data.class_names=", "shots=0", "lora.unmasked_weight=0.5",
        f"mask_folder={masks}",
    )  # fmt: skip
    assert cli.main(given) == 0
    learned = load_artifact(tmp_path / "w" / "learned-seed0")
    buckets = learned.counts["buckets"]
    assert list(buckets) == ["8x8", "16x4"] and sum(buckets.values()) == learned.counts["images"]
    assert "2 buckets, each a program to compile: 8x8: " in capfd.readouterr().out
    lines = read_metrics(learned.path / ".training" / "metrics.jsonl")
    assert any(np.isfinite(line.get("eval/held_out_error", np.nan)) for line in lines)


def test_the_largest_bucket_is_planned(deeper_folder):
    values = load_config(f"{CONFIG}:smoke,technique=lora")
    values |= {"base": str(deeper_folder), "clip": str(deeper_folder / "clip")}
    plans = []
    for fields in ((), BUCKETS):
        given = [("lora.batch_size", "8"), *(x.split("=", 1) for x in (*OWN["lora"], *fields))]
        config = to_dataclass(Config, override(values, given))
        plans.append(plan(config, make_mesh(data=2, fsdp=4))[0].compile())
    told = "of 5 buckets at the most, the largest, 8x8, with all images"
    assert plans[1].note.endswith(told)
    assert replace(plans[1], note="") == replace(plans[0], note="")


def test_people_must_be_known_or_given():
    config = to_dataclass(Config, load_config(f"{CONFIG}:smoke,technique=instantid"))
    printed = DataConfig(source="builtin", name="printed", images_per_class=2)
    with pytest.raises(UserError, match="not known whose face each image shows; give embeddings"):
        config.check(load_dataset(printed))
    config.check(load_dataset(config.data))


def test_faces_of_a_file_are_learned_from(base_folder, tmp_path):
    """Embeddings that were made elsewhere; the file must hold a face of each image."""
    data = load_dataset(
        DataConfig(source="builtin", name="faces", images_per_class=10, image_size=8)
    )
    ids = (*data.train.ids, *data.test.ids)
    points = np.concatenate([keypoints_of(data.train), keypoints_of(data.test)])
    rows = np.random.default_rng(0).standard_normal((len(ids), 7)).astype(np.float32)
    file = write_faces(tmp_path / "faces.npz", Faces(ids, rows, points))
    fields = (
        "data.image_size=8", "shots=2", "generate.images_per_class=2", f"faces={file}",
        # The tests have eight devices.
        "instantid.batch_size=8", *OWN["instantid"],
    )  # fmt: skip
    values = load_config(f"{CONFIG}:smoke,technique=instantid")
    values |= {"base": str(base_folder), "clip": str(base_folder / "clip"), "face_encoder": None}
    config = to_dataclass(Config, override(values, [tuple(x.split("=", 1)) for x in fields]))
    folder = tmp_path / "w"
    page = run(config, folder)
    assert not (folder / "faces").exists() and not (folder / "judge").exists()
    identity = read_identity(folder / "learned-seed0", load_pipeline(base_folder).unet)
    assert identity.width == 7
    assert "CLIP takes the place of the face encoder" in page.read_text()
    write_faces(file, Faces(ids[1:], rows[1:], points[1:]))
    with pytest.raises(UserError, match=r"faces\.npz: no face of 1 image, the first is"):
        run(config, tmp_path / "other")
    assert not list((tmp_path / "other").rglob(MANIFEST))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_each_technique_is_planned(base_folder, technique, tmp_path):
    values = load_config(f"{CONFIG}:smoke,technique={technique}")
    values = override(
        values, [(f"{technique}.batch_size", "8"), *(x.split("=", 1) for x in OWN[technique])]
    )
    clip = str(base_folder / "clip")
    values |= {"base": str(base_folder), "clip": clip}
    if technique == "motion_lora":
        modules = random_network(MotionModules, MotionConfig((8,), 1, 8, 4), 1)
        values["motion"] = str(write_motion(tmp_path, modules))
    config = to_dataclass(Config, values)
    plans = [one.compile() for one in plan(config, make_mesh(data=2, fsdp=4))]
    names = [
        *FIRST.get(technique, []), technique, *PROGRAMS.get(technique, []), "draw, base",
        "draw, customised",
    ]  # fmt: skip
    assert [one.name for one in plans] == names and all(one.flops > 0 for one in plans)
