"""Customisation, end to end in the smallest size: what techniques leave, restarts, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxsynth.cli import main as cli
from jaxsynth.core.config import load_config, override, to_dataclass
from jaxsynth.data.store import ImageStore
from jaxsynth.methods.customize.config import TECHNIQUES, Config
from jaxsynth.methods.customize.run import plan
from jaxsynth.runs.stage import MANIFEST, load_artifact
from jaxsynth.training.metrics import read_metrics
from jaxsynth.training.sharding import make_mesh
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
}  # fmt: skip
PROGRAMS = {"dreambooth": ["draw, class"]}
FILES = {
    "textual_inversion": "learned_embeds.safetensors",
    "dreambooth": "adapter.safetensors",
    "lora": "pytorch_lora_weights.safetensors",
    "ip_adapter": "ip-adapter.safetensors",
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


@pytest.mark.parametrize("technique", TECHNIQUES)
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
    if technique == "ip_adapter":
        assert "like" in stores["images"].class_names[1]
        assert "custom_others" in json.loads((workdir / "results.json").read_text())["seeds"][0]
    if technique in ("lora", "ip_adapter"):
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


REFUSED = {
    "technique": ("lora", "technique=instantid", "(InstantID needs an encoder of faces)"),
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


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_each_technique_is_planned(base_folder, technique):
    values = load_config(f"{CONFIG}:smoke,technique={technique}")
    values = override(
        values, [(f"{technique}.batch_size", "8"), *(x.split("=", 1) for x in OWN[technique])]
    )
    clip = str(base_folder / "clip")
    config = to_dataclass(Config, {**values, "base": str(base_folder), "clip": clip})
    plans = [one.compile() for one in plan(config, make_mesh(data=2, fsdp=4))]
    names = [technique, *PROGRAMS.get(technique, []), "draw, base", "draw, customised"]
    assert [one.name for one in plans] == names and all(one.flops > 0 for one in plans)
