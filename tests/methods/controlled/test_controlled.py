"""Following conditions, end to end in the smallest size: what a run leaves, restarts, refusals."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jaxsynth.adapters.inject import AdapterLayer, layers
from jaxsynth.adapters.kinds.affiner import Affiner
from jaxsynth.adapters.registry import AdapterChoice
from jaxsynth.cli import main as cli
from jaxsynth.core.config import load_config, to_dataclass
from jaxsynth.core.errors import UserError
from jaxsynth.methods.controlled.config import Config
from jaxsynth.methods.controlled.report import best, compared
from jaxsynth.methods.controlled.run import plan
from jaxsynth.methods.controlled.ways import WAYS
from jaxsynth.runs.stage import MANIFEST
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.adapters.native import read_state
from jaxsynth.weights.hf import load_pipeline
from tests.words import last_of_each

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[3] / "configs" / "controlled.py"


def arguments(base, workdir, *more) -> list[str]:
    words = [
        "run",
        f"--config={CONFIG}:smoke",
        f"--workdir={workdir}",
        f"--config.base={base}",
        "--config.data.image_size=8",
        "--config.train.batch_size=8",
        "--config.ways=controlnet",
        "--config.adapter=ia3",
        "--config.adapter.targets=to_k,to_v",
        *more,
    ]
    return last_of_each(words)


@pytest.fixture(scope="module")
def settings():
    """Compiled programs stay in the tests' own cache, and an error stays on one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSYNTH_CACHE", "off")
        patch.setenv("COLUMNS", "400")
        yield


@pytest.fixture(scope="module")
def finished(deeper_folder, tmp_path_factory, settings) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "w"
    assert cli.main(arguments(deeper_folder, workdir)) == 0
    return workdir


def test_every_way_is_trained_drawn_and_reported(finished):
    results = json.loads((finished / "results.json").read_text())
    assert [result["way"] for result in results] == ["adapter", "controlnet"]
    adapters, net = results
    assert 0 < adapters["trainable"] < net["trainable"] < net["whole"] == adapters["whole"]
    for result in results:
        assert all(0 < result[key] < 3 for key in ("validation", "own", "another", "none"))
        assert all(0 <= result[key] <= 1 for key in ("follows", "follows_another"))
        learnt = read_state(finished / result["artifact"] / "learnt.safetensors")
        assert sum(np.size(value) for value in learnt.arrays.values()) == result["trainable"]
        with Image.open(finished / result["artifact"] / "samples.png") as sheet:
            assert sheet.width > 50
    # Another image's condition is another input, which even four steps have made to matter.
    assert adapters["own"] != adapters["another"] and adapters["own"] != adapters["none"]
    page = (finished / "report.html").read_text()
    assert "Ways to follow segmentation" in page and "chosen adapter" in page
    assert "| ControlNet" in (finished / "table.md").read_text()


def test_a_finished_run_is_skipped_and_a_changed_one_refused(deeper_folder, finished, capfd):
    times = {path: path.stat().st_mtime_ns for path in finished.rglob(MANIFEST)}
    assert len(times) == 3
    assert cli.main(arguments(deeper_folder, finished)) == 0
    capfd.readouterr()
    assert cli.main(arguments(deeper_folder, finished, "--config.images=5")) == 1
    assert "images" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob(MANIFEST)} == times


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("kind=edge", "config.kind='edge': expected one of"),
        ("ways=controlnet,afiner", "ways: 'afiner', expected some of controlnet"),
        ("rates.controlnet=", "rates: none for 'controlnet'"),
        ("images=0", "config.images='0': expected an integer, 1 or more"),
        ("condition_folder=gone", "gone"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    deeper_folder, tmp_path, settings, capfd, field, message
):
    assert cli.main(arguments(deeper_folder, tmp_path / "w", f"--config.{field}")) in (1, 2)
    assert message in capfd.readouterr().err
    assert not list(tmp_path.rglob(MANIFEST))


def test_adapters_go_into_every_layer(deeper_folder):
    pipeline = load_pipeline(deeper_folder)
    ways = {
        "affiner": Affiner,
        "lora": AdapterLayer,
        "adapter": AdapterLayer,
        "input": AdapterLayer,
    }
    choice = AdapterChoice("lokr", {"factor": 2})
    for way, wrapped in ways.items():
        model = nnx.eval_shape(
            lambda way=way: WAYS[way][1](pipeline.unet, 2, 3, 1, choice, jax.random.key(0))
        )
        kinds = {path: type(layer) for path, layer in layers(model.unet).items()}
        own = {path for path, kind in kinds.items() if issubclass(kind, AdapterLayer)}
        if way == "input":
            assert own == {"conv_in"}
            continue
        plain = {path for path, kind in kinds.items() if kind in (nnx.Linear, nnx.Conv)}
        # What is left is what the adapters wrap.
        assert not {path for path in plain if not path.endswith(".base")} - own
        assert all(issubclass(kinds[path], wrapped) for path in own - {"conv_in"})


def test_every_way_is_planned_from_config_files_alone(deeper_folder, tmp_path):
    values = load_config(f"{CONFIG}:smoke")
    values["train"]["batch_size"] = 8
    for name in ("unet", "vae", "text_encoder", "scheduler"):
        (tmp_path / name).mkdir()
        for file in (deeper_folder / name).glob("*config.json"):
            (tmp_path / name / file.name).symlink_to(file)
    (tmp_path / "tokenizer").symlink_to(deeper_folder / "tokenizer")
    config = to_dataclass(Config, values | {"base": str(tmp_path)})
    plans = [one.compile() for one in plan(config, make_mesh(data=4, fsdp=2))]
    names = ["controlnet", "draw, controlnet", "affiner", "draw, affiner"]
    assert [one.name for one in plans] == names and [one.devices for one in plans] == [8, 1, 8, 1]
    net, drawn, affiner, _ = plans
    assert drawn.images == config.generate.batch_size and drawn.flops > 0
    # A ControlNet's moments are cut as the base is, but there are many more of them.
    assert net.arguments - net.frozen > affiner.arguments - affiner.frozen > 0
    assert net.flops > affiner.flops > 0
    with pytest.raises(UserError, match="base: 'owner/name' is no folder or file here"):
        plan(to_dataclass(Config, values | {"base": "owner/name"}), make_mesh())


def test_the_rate_of_the_least_validation_error_counts():
    def result(rate: float, seed: int, validation: float, own: float) -> dict:
        errors = {"own": own, "another": 1.0, "none": 1.0, "validation": validation}
        return {"way": "lora", "rate": rate, "seed": seed, "trainable": 5, "whole": 50, **errors}

    results = [result(0.1, 0, 0.3, 0.2), result(0.2, 0, 0.2, 0.3), result(0.2, 1, 0.9, 0.5)]
    assert best(results, "lora") == results[1:] and best(results, "input") == []
    (row,) = compared(results, "edges").rows
    assert row[:4] == ["LoRA (all layers)", "5", "10.0%", "0.2"] and row[4].mean == 0.4
