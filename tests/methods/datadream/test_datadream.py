"""The main job end to end on networks of random weights: what it leaves, restarts, refusals."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxsynth.adapters.inject import AdapterState
from jaxsynth.adapters.kinds.lokr import LoKrConfig
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.adapters.registry import AdapterChoice
from jaxsynth.cli import main as cli
from jaxsynth.core.config import load_config, override, to_dataclass, to_dict
from jaxsynth.core.errors import UserError
from jaxsynth.data.splits import load_shots
from jaxsynth.data.store import ImageStore
from jaxsynth.methods.datadream.config import Config, LoftConfig, Recipe, SetConfig, StudentConfig
from jaxsynth.methods.datadream.plan import plan
from jaxsynth.quality.filters import FilterConfig
from jaxsynth.runs.run import read_config
from jaxsynth.runs.stage import MANIFEST, load_artifact
from jaxsynth.training.metrics import read_metrics
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.adapters.diffusers import read_diffusers, write_diffusers
from tests.methods.small_base import write_classifier
from tests.words import last_of_each

REPOSITORY = Path(__file__).parents[3]
WORKER = Path(__file__).parents[1] / "worker.py"
SMALL = (
    "--config.finetune.rank=2",
    "--config.finetune.unet_targets=to_q,to_out.0",
    "--config.finetune.text_targets=q_proj",
    "--config.classify.rank=2",
)


def arguments(base, workdir, *more):
    words = (
        "run",
        f"--config={REPOSITORY / 'configs' / 'datadream.py'}:smoke",
        f"--workdir={workdir}",
        f"--config.base={base}",
        f"--config.clip={base / 'clip'}",
        *more,
    )
    return last_of_each(words)


# Of kinds that the file does not name; the default is LoRA (below, and in test_text_to_image).
DIGITS = (
    *SMALL[1:],
    "--config.data.class_names=1,4,7",
    "--config.adapter=lokr",
    "--config.adapter.rank=1",
    "--config.adapter.factor=2",
    "--config.classify.adapter=dora",
    "--config.modes=dset,cls,stacked,loft,chimera",
    "--config.loft.steps=2",
    "--config.loft.unet_targets=to_q",
    "--config.chimera.steps=2",
    "--config.chimera.rank=2",
    "--config.chimera.unet_targets=to_q",
    "--config.chimera.text_targets=",
    "--config.measure_sets=true",
    "--config.sets.names.prompts.weights.name=1",
    "--config.sets.edited.kind=edited",
    "--config.sets.edited.strength=0.5",
    "--config.sets.edited.by=cls",
    "--config.recipes.photos.sets.edited=1",
    "--config.sets.rest.kind=retrieved",
    "--config.sets.rest.query=shots",
    "--config.recipes.mixed.sets.dset=2",
    "--config.recipes.mixed.sets.names=1",
    "--config.recipes.mixed.keep.judge=shots",
    "--config.recipes.mixed.keep.most=1",
    "--config.recipes.photos.sets.rest=1",
    "--config.recipes.names.sets.names=1",
    "--config.recipes.names.real=false",
    "--config.recipes.stages.classify.adapter=lora",
    "--config.recipes.stages.classify.rank=None",
    "--config.recipes.stages.classify.learns=norms",
    "--config.recipes.stages.classify.head_share=0.5",
    "--config.students.net.train.steps=2",
    "--config.students.net.train.batch_size=8",
    "--config.recipes.taught.student=net",
    "--config.recipes.taught.sets.dset=1",
)


@pytest.fixture(scope="module")
def settings():
    """Compiled programs stay in the tests' own cache, and an error stays on one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSYNTH_CACHE", "off")
        patch.setenv("COLUMNS", "400")
        yield


@pytest.fixture
def command(settings, capfd):
    def call(*argv):
        capfd.readouterr()
        code = cli.main([str(a) for a in argv])
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[str, ...]:
    student = write_classifier(tmp_path_factory.mktemp("student"))
    return (*DIGITS, f"--config.students.net.checkpoint={student}")


@pytest.fixture(scope="module")
def finished(base_folder, tmp_path_factory, settings, digits):
    """The workdir of a run on eight devices."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    assert cli.main(list(arguments(base_folder, workdir, *digits))) == 0
    return workdir


MODES_RUN = ("dset", "cls", "stacked", "loft", "chimera")
STAGES = (
    "zero-shot",
    "prompt-seed0/images",
    "prompt-seed0/synthetic",
    "shots2-seed0/shots",
    "shots2-seed0/real",
    *(
        f"shots2-seed0/{mode}/{stage}"
        for mode in MODES_RUN
        for stage in ("adapter", "images", "synthetic", "both")
    ),
    "prompt-seed0/sets/names/images",
    "shots2-seed0/sets/rest/images",
    "shots2-seed0/sets/edited/images",
    "shots2-seed0/recipes/mixed/dset/kept",
    "shots2-seed0/recipes/mixed/names/kept",
    "prompt-seed0/recipes/names/classifier",
    *(
        f"shots2-seed0/recipes/{name}/classifier"
        for name in ("mixed", "photos", "stages", "taught")
    ),
    "prompt-seed0/alignment",
    "prompt-seed0/sets/names/alignment",
    *(f"shots2-seed0/{name}/alignment" for name in MODES_RUN),
    *(f"shots2-seed0/sets/{name}/alignment" for name in ("rest", "edited")),
)


@pytest.mark.slow
def test_a_plan_counts_what_the_run_did(finished):
    """Updates of every training, and batches of images: a store has a shard for each."""
    config = read_config(finished, Config)
    planned = plan(config, make_mesh(devices=jax.devices()[:1]))
    counts = {one.name: one.updates(one.batch) for one in planned}
    done = dict.fromkeys(counts, 0)
    for path in finished.rglob("metrics.jsonl"):
        what = next(folder.parent for folder in path.parents if folder.name == ".training")
        mode = "dset" if "dset" in what.parts else f"{config.classes_at_once or 3} classes"
        mode += "".join(f", {one}" for one in MODES_RUN[2:] if one in what.parts)
        name = f"fine-tune {mode}" if what.name == "adapter" else "classify"
        name = f"recipe {what.parent.name}" if what.name == "classifier" else name
        done[name] += read_metrics(path)[-1]["step"]
    for mode in MODES_RUN:
        images = [finished / "shots2-seed0" / mode / "images"]
        images += [finished / "prompt-seed0" / "images"] if mode == "dset" else []
        shards = sum(len(list(folder.glob("*.jsonl"))) for folder in images)
        done[f"generate, {mode}"] = shards * config.generate.batches_per_shard
    names = finished / "prompt-seed0/sets/names/images"
    done["generate, set names"] = len(list(names.glob("*.jsonl")))
    edited = finished / "shots2-seed0/sets/edited/images"
    done["generate, set edited"] = len(list(edited.glob("*.jsonl")))
    assert done == counts and all(done.values())


@pytest.mark.slow
def test_every_stage_is_made_and_reported(finished):
    found = {p.parent.relative_to(finished).as_posix() for p in finished.rglob(MANIFEST)}
    assert found == set(STAGES)
    for stage in STAGES:
        load_artifact(finished / stage).verify()
    results = json.loads((finished / "results.json").read_text())
    rows = {r["row"]: r for r in results}
    assert len(results) == len(rows) == 18
    for row in rows.values():
        assert 0 <= row["top1"] <= 1 and set(row["per_class"]) == {"1", "4", "7"}
        logits = np.load(finished / row["artifact"] / "logits.npy")
        assert logits.shape == (row["images"], 3) and np.isfinite(logits).all()
    table = (finished / "table.md").read_text()
    assert all(row in table for row in rows)
    page = (finished / "report.html").read_text()
    assert "data:image/png;base64" in page and "Real shots only" in page
    for title in (
        "How near the sets are to real images", "Which classes are confused", "What it cost",
        "What the recipes are", "Points more than: Real shots only", "Points more than: stages",
    ):  # fmt: skip
        assert title in page, title


@pytest.mark.slow
def test_sets_are_measured_and_filtered(finished):
    """Photos of the training set are nearer to the test images than drawings of random weights."""
    found = {
        name: json.loads((finished / name / "alignment/figures.json").read_text())
        for name in ("prompt-seed0", "shots2-seed0/dset", "shots2-seed0/sets/rest")
    }
    fids = {name: one["matched"]["fid"]["mean"] for name, one in found.items()}
    assert fids["shots2-seed0/sets/rest"] < min(fids["prompt-seed0"], fids["shots2-seed0/dset"])
    assert "nearest" not in found["prompt-seed0"]
    drawn = load_shots(finished / "shots2-seed0/shots/shots.json")
    shots = {id_ for ids in drawn.train for id_ in ids}
    pairs = found["shots2-seed0/dset"]["nearest"]["pairs"]
    assert len(pairs) == 6 and {pair["shot"] for pair in pairs} <= shots
    assert [x["cosine"] for x in pairs] == sorted((x["cosine"] for x in pairs), reverse=True)
    rest = ImageStore(finished / "shots2-seed0/sets/rest/images")
    assert not shots & {entry.prompt for entry in rest.entries}
    names = ImageStore(finished / "prompt-seed0/sets/names/images")
    assert {entry.prompt for entry in names.entries} == {"one", "four", "seven"}
    for one, place in (("dset", "shots2-seed0/dset"), ("names", "prompt-seed0/sets/names")):
        path = finished / "shots2-seed0/recipes/mixed" / one / "kept"
        kept = json.loads((path / "kept.json").read_text())
        store = ImageStore(finished / place / "images")
        assert np.bincount(store.labels[kept]).tolist() == [1, 1, 1]
        assert load_artifact(path).counts["most"] == 3


@pytest.mark.slow
def test_the_generated_sets(finished):
    sets = {
        name: ImageStore(finished / name / "images")
        for name in (
            "prompt-seed0",
            "shots2-seed0/dset",
            "shots2-seed0/cls",
            "shots2-seed0/stacked",
            "shots2-seed0/loft",
            "shots2-seed0/chimera",
        )
    }
    pixels = {}
    for name, store in sets.items():
        assert np.bincount(store.labels).tolist() == [2, 2, 2]
        assert store.entries[1].prompt == "a photo of the digit four"
        pixels[name] = np.stack([store[i].image for i in range(6)]).astype(int)
        assert len(np.unique(pixels[name].reshape(6, -1), axis=0)) == 6
    assert {e.adapter for e in sets["prompt-seed0"].entries} == {""}
    assert len({e.adapter for e in sets["shots2-seed0/dset"].entries}) == 1
    assert len({e.adapter for e in sets["shots2-seed0/cls"].entries}) == 3
    for mode in ("loft", "chimera"):
        own = sorted((finished / "shots2-seed0" / mode / "adapter").rglob("*.safetensors"))
        assert [file.parent.name for file in own] == ["0000", "0001"] * 3
        assert [file.parent.parent.name for file in own] == ["1", "1", "4", "4", "7", "7"]
        assert len({e.adapter for e in sets[f"shots2-seed0/{mode}"].entries}) == 3
    files = adapter_io.find(finished / "shots2-seed0/cls/adapter", ("1", "4", "7"))
    assert [file.relative_to(finished).as_posix() for file in files] == [
        f"shots2-seed0/cls/adapter/{name}/adapter.safetensors" for name in "147"
    ]
    first, second, _ = map(adapter_io.load, files)
    assert type(first.config) is LoKrConfig and (first.config.rank, first.config.factor) == (1, 2)
    assert set(first.config.targets) == {"to_q", "to_out.0", "q_proj"}
    assert {name.split(".")[0] for name in first.arrays} == {"unet", "text_encoder"}
    learnt = [name for name in first.arrays if name.endswith(("lokr_w2", "lokr_w2_b"))]
    assert learnt and all(np.any(first.arrays[name] != 0) for name in learnt)
    assert all(np.any(first.arrays[name] != second.arrays[name]) for name in learnt)


@pytest.mark.slow
def test_the_same_command_again_skips_every_stage(finished, base_folder, command, digits):
    before = {p: p.read_bytes() for p in finished.rglob("*.safetensors")}
    code, out, err = command(*arguments(base_folder, finished, *digits))
    assert (code, err) == (0, "")
    assert out.count("unchanged, skipped") == len(STAGES)
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("finetune.learning_rate=0.5", "config.finetune.learning_rate: 0.002 -> 0.5"),
        ("generate.guidance_scale=3", "config.generate.guidance_scale: 2.0 -> 3.0"),
        ("classify.real_weight=0.5", "config.classify.real_weight: 0.8 -> 0.5"),
        ("data.template=a {}", "data: changed template"),
    ],
)
def test_a_changed_field_is_refused_by_name(finished, base_folder, command, digits, field, message):
    code, _, err = command(*arguments(base_folder, finished, *digits, f"--config.{field}"))
    assert code == 1 and message in err, err


@pytest.mark.slow
def test_the_page_of_a_run_under_way(finished, tmp_path, command):
    partial = tmp_path / "partial"
    shutil.copytree(finished, partial)
    for stage in ("cls/both", "cls/synthetic", "cls/images", "dset/both"):
        shutil.rmtree(partial / "shots2-seed0" / stage)
    (partial / "report.html").unlink()
    code, out, err = command("report", partial)
    assert (code, err) == (0, "") and "report.html" in out
    assert len(json.loads((partial / "results.json").read_text())) == 15
    # Another seed of which the shots alone are drawn, and one with a single row.
    for seed in (1, 2):
        other = partial / f"shots2-seed{seed}"
        shutil.copytree(partial / "shots2-seed0/shots", other / "shots")
    shutil.copytree(partial / "shots2-seed0/real", other / "real")
    code, out, err = command("report", partial)
    assert (code, err) == (0, "") and "of 2 seeds" in out
    page = (partial / "report.html").read_text()
    assert "over seeds 0, 2. Rows of fewer seeds: " in page and "DataDream dset (1)" in page
    code, out, err = command("report", partial, finished)
    assert (code, err) == (0, "") and f"side by side: {partial / 'comparison.html'}" in out
    page = (partial / "comparison.html").read_text()
    assert "DataDream stacked + real shots" in page and "Top-1 accuracy in %, 2 shots" in page
    code, _, err = command("report", partial, partial)
    assert code == 1 and "the same run is given twice" in err


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes with awkward names, four train and two test images each, none square."""
    root = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in ("F%2FA-18", "naïve", "sea otter"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def run_process(place, base, workdir, cache, *more):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, WORKER, place, *arguments(base, workdir, *SMALL, *more)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


LONGER = (
    "--config.data.source=folder",
    "--config.modes=cls",
    "--config.finetune.steps=6",
    "--config.finetune.checkpoint_every=2",
    "--config.classify.steps=6",
    "--config.classify.checkpoint_every=2",
    "--config.generate.batch_size=2",
    "--config.validation_fraction=0.5",
)


@pytest.mark.slow
def test_killed_anywhere_the_run_ends_the_same(base_folder, photos, tmp_path, compilation_cache):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    rest = (compilation_cache, *LONGER, f"--config.data.path={photos}")
    done = run_process("nowhere", base_folder, whole, *rest)
    assert done.returncode == 0, done.stderr
    # Prompt-only images, then the adapters, then their images, then the last classifier.
    for place in ("generate", "fine-tune", "generate", "classify"):
        killed = run_process(place, base_folder, cut, *rest)
        assert killed.returncode == -signal.SIGKILL, (place, killed.stdout, killed.stderr)
    done = run_process("nowhere", base_folder, cut, *rest)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stdout
    compared = 0
    for path in sorted(whole.rglob("*")):
        name = path.relative_to(whole)
        if path.suffix in (".safetensors", ".array_record", ".npy", ".seal"):
            assert path.read_bytes() == (cut / name).read_bytes(), name
            compared += 1
    assert compared > 20
    for name in ("results.json", "table.md"):
        assert (whole / name).read_text() == (cut / name).read_text()
    own = whole / "shots2-seed0" / "cls"
    names = {p.parent.name for p in (own / "adapter").glob("*/*.safetensors")}
    assert names == {"F%2FA-18", "naïve", "sea otter"}
    assert ImageStore(own / "images").class_names == ("F/A-18", "naïve", "sea otter")


def copy(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "copy"))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def missing_weights(base, photos, tmp_path):
    return {"base": tmp_path / "nowhere" / "sd"}, "nowhere"


def truncated_weights(base, photos, tmp_path):
    base = copy(base, tmp_path)
    truncate(base / "unet" / "diffusion_pytorch_model.safetensors")
    return {"base": base}, "unet/diffusion_pytorch_model.safetensors"


def offline_hub_id(base, photos, tmp_path):
    return {"base": "someone/some-model"}, "someone/some-model"


def empty_class(base, photos, tmp_path):
    photos = copy(photos, tmp_path)
    shutil.rmtree(photos / "train" / "sea otter")
    (photos / "train" / "sea otter").mkdir()
    return {"data.path": photos}, "class 'sea otter' has no images"


def corrupt_image(base, photos, tmp_path):
    photos = copy(photos, tmp_path)
    for i in range(4):
        truncate(photos / "train" / "sea otter" / f"{i}.png")
    return {"data.path": photos}, "cannot be decoded"


def corrupt_test_image(base, photos, tmp_path):
    photos = copy(photos, tmp_path)
    truncate(photos / "test" / "sea otter" / "1.png")
    return {"data.path": photos}, "test/sea otter/1.png"


def too_few_images(base, photos, tmp_path):
    return {"shots": "2,5"}, "5 shots asked for, but 'F/A-18' has 4"


def misspelt_field(base, photos, tmp_path):
    return {"finetune.learning_rat": 1}, "finetune.learning_rat"


def unknown_source(base, photos, tmp_path):
    return {"data.source": "floder"}, "floder"


def missing_photos(base, photos, tmp_path):
    return {"data.path": tmp_path / "no-photos"}, "no-photos"


def indivisible_batch(base, photos, tmp_path):
    return {"classify.batch_size": 6}, "classify.batch_size 6"


def indivisible_size(base, photos, tmp_path):
    return {"image_size": 9}, "image_size: 9: size: 9x9 pixels (width x height), expected multiples"


@pytest.mark.parametrize(
    "mistake",
    [
        missing_weights,
        truncated_weights,
        offline_hub_id,
        empty_class,
        corrupt_image,
        corrupt_test_image,
        too_few_images,
        misspelt_field,
        unknown_source,
        missing_photos,
        indivisible_batch,
        indivisible_size,
    ],
)
def test_bad_input_is_one_clear_line(mistake, base_folder, photos, tmp_path, command):
    fields, expected = mistake(base_folder, photos, tmp_path)
    fields = {"data.source": "folder", "data.path": photos, **fields}
    more = [f"--config.{name}={value}" for name, value in fields.items()]
    code, _, err = command(*arguments(base_folder, tmp_path / "w", *SMALL, *more))
    assert code in (1, 2) and expected in err, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    heavy = [p for p in (tmp_path / "w").rglob(MANIFEST) if p.parent.name != "shots"]
    assert heavy == []


def test_one_class_is_told(base_folder, photos, tmp_path, command):
    """On one class every classifier is right."""
    alone = tmp_path / "alone"
    for split in ("train", "test"):
        shutil.copytree(photos / split / "sea otter", alone / split / "sea otter")
    fields = {"data.path": alone, "classify.batch_size": 6}
    more = [f"--config.{field}={value}" for field, value in fields.items()]
    _, out, err = command(*arguments(base_folder, tmp_path / "w", *SMALL, *more))
    assert "one class, 'sea otter': every classifier is right" in out, err


def test_a_recipes_settings_are_typed_by_their_fields_and_kept():
    """From the command line, part by part, and again from the run's record."""
    values = override(
        load_config(f"{REPOSITORY}/configs/datadream.py:tiny"),
        [
            ("recipes.a.sets.dset", "2"),
            ("recipes.a.classify.visual_head", "true"),
            ("recipes.a.classify.rank", "none"),
            ("recipes.a.classify.augment.flip_p", "0.25"),
            ("recipes.a.classify.regions.space", "features"),
            ("recipes.a.classify.regions.robustness", "3"),
            ("recipes.a.classify.adapter.kind", "lokr"),
            ("recipes.a.classify.adapter.factor", "2"),
        ],
    )
    config = to_dataclass(Config, values)
    found = config.classify_of("a")
    assert found.visual_head is True and found.rank is None and found.augment.flip_p == 0.25
    assert (found.regions.space, found.regions.robustness) == ("features", 3.0)
    assert (found.adapter.kind, found.adapter.settings) == ("lokr", {"factor": 2})
    # What the recipe leaves out is the run's.
    assert found.augment.crop_scale == (0.6, 1.0) and found.learning_rate == 5e-3
    assert to_dataclass(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_adapters_of_different_settings_keep_them(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"{path}.lora_{end}": rng.standard_normal(shape, np.float32)
        for path in ("unet.mid_block.to_q", "text_encoder.text_model.q_proj")
        for end, shape in (("A", (4, 2)), ("B", (2, 6)))
    }
    state = AdapterState(arrays, LoRAConfig(rank=2, alpha=3.0, targets=("to_q", "q_proj")))
    adapter_io.save(state, tmp_path)
    (path,) = adapter_io.find(tmp_path, ("1", "4"))
    assert path.name == "pytorch_lora_weights.safetensors"
    again = adapter_io.load(path)
    assert again.config == state.config and again.arrays.keys() == arrays.keys()
    adapter_io.save(again, tmp_path / "again")
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    states = read_diffusers(path)
    other = dataclasses.replace(states["unet"].config, alpha=99.0)
    states["unet"] = dataclasses.replace(states["unet"], config=other)
    write_diffusers(tmp_path / "other.safetensors", states)
    mixed = adapter_io.load(tmp_path / "other.safetensors").config
    assert mixed.scaling_at("unet.mid_block.to_q") == 99 / 2
    assert mixed.scaling_at("text_encoder.text_model.q_proj") == 3 / 2
    (tmp_path / "again" / path.name).unlink()
    with pytest.raises(UserError, match="0 adapters, expected 1 or 2"):
        adapter_io.find(tmp_path / "again", ("1", "4"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modes": ("dsett",)}, "modes: .*dsett"),
        ({"shots": ()}, r"shots: \(\), expected at least one"),
        ({"dtype": "float16"}, "dtype: 'float16'"),
        ({"loft": LoftConfig(steps=1)}, "loft: given, but 'loft' is none of the modes"),
        (
            {"modes": ("loft",), "adapter": AdapterChoice("lora", {})},
            "adapter: given, but loft learn by an adapter of their own: loft.adapter",
        ),
        ({"modes": ("cls", "stacked")}, "modes: cls, stacked; 'stacked' learns on top of 'dset'"),
        ({"recipes": {"a": Recipe({"dset": 1.0, "x": 1.0})}}, "recipes.a.sets: 'x', expected"),
        ({"recipes": {"a": Recipe(classify={"lr": 1.0})}}, "recipes.a.classify.lr: no such field"),
        ({"sets": {"x": SetConfig(by="cls", kind="edited")}}, "sets.x.by: 'cls', expected one of"),
        ({"sets": {"cls": SetConfig()}}, "sets: 'cls', expected another name"),
        ({"recipes": {"a": Recipe(student="b")}}, "recipes.a.student: 'b', expected one of"),
        ({"students": {"b": StudentConfig("x")}}, "students: 'b' is the student of none of"),
    ],
)
def test_a_config_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_issynths_strength_falls_with_the_shots():
    found = [SetConfig(kind="edited").strength_of(shots) for shots in (1, 2, 3, 4, 8, 16, 20)]
    assert found == [0.5, 0.4, 0.4, 0.35, 0.2, 0.15, 0.15]
    assert SetConfig(kind="edited", strength=0.7).strength_of(4) == 0.7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LoftConfig(adapter=AdapterChoice("lokr", {"factor": 2})),
            "its sum is no adapter of its kind; take lora",
        ),
        (
            lambda: SetConfig(kind="drawn"),
            "kind: 'drawn', expected one of prompts, retrieved",
        ),
        (lambda: SetConfig(kind="retrieved", by="dset"), "by: given, but a set of kind 'retr"),
        (lambda: SetConfig(by="cls"), "by: 'cls' has an adapter for each class"),
        (lambda: SetConfig(pool="photos"), "pool: given, but a set of kind 'prompts' has none"),
        (lambda: SetConfig(kind="retrieved", guidance_scale=1.0), "guidance_scale: given"),
        (lambda: Recipe(real=False), "sets: none, and real is false"),
        (lambda: Recipe(keep=FilterConfig(agreement=True)), "keep: .* but sets is empty"),
        (lambda: Recipe({"dset": 0.0}), "sets: .*expected above 0"),
    ],
)
def test_a_set_or_recipe_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_sdxl_learns_and_draws_at_a_size_of_one_s_own(sdxl_folder, base_folder, tmp_path, settings):
    """Every stage, and what is kept is of both text encoders; the plan is from configs alone."""
    more = (
        "--config.data.class_names=1,4",
        "--config.image_size=16",
        f"--config.clip={base_folder / 'clip'}",
        "--config.generate.batch_size=8",
    )
    workdir = tmp_path / "w"
    assert cli.main([str(a) for a in arguments(sdxl_folder, workdir, *SMALL, *more)]) == 0
    for mode in ("dset", "cls"):
        own = workdir / "shots2-seed0" / mode
        assert ImageStore(own / "images")[0].image.shape == (16, 16, 3)
        for file in (own / "adapter").rglob("pytorch_lora_weights.safetensors"):
            assert set(read_diffusers(file)) == {"unet", "text_encoder", "text_encoder_2"}
    bare = tmp_path / "configs"
    shutil.copytree(sdxl_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    config = dataclasses.replace(read_config(workdir, Config), base=str(bare))
    planned = plan(config, make_mesh(devices=jax.devices()[:1]))
    assert all(one.compile().flops > 0 for one in planned)
