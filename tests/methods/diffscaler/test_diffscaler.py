"""DiffScaler end to end in its smallest size: what a run leaves, restarts, refusals, its plan."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsynth.adapters.inject import extract
from jaxsynth.adapters.kinds.lokr import LoKrConfig
from jaxsynth.cli import main as cli
from jaxsynth.core.config import load_config, override, to_dataclass
from jaxsynth.core.errors import UserError
from jaxsynth.data.store import ImageStore
from jaxsynth.methods.diffscaler import run
from jaxsynth.methods.diffscaler.config import Config
from jaxsynth.methods.diffscaler.stages import known_latents
from jaxsynth.runs.stage import MANIFEST, load_artifact
from jaxsynth.tasks.latents import Latents
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.networks.dit import load_dit
from tests.words import last_of_each

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[3] / "configs" / "diffscaler.py"
SMALL = (
    "--config.recipes=full,affiner_zero",
    "--config.data.digits.class_names=1,4,7",
    "--config.train.steps=4",
    "--config.train.batch_size=8",
    "--config.pretrain.train.batch_size=8",
    "--config.train.steps_per_call=2",
    "--config.pretrain.train.steps=4",
    "--config.pretrain.train.steps_per_call=2",
    "--config.generate.images_per_class=3",
    "--config.quality.repeats=1",
    "--config.conditions.digits=",  # test_conditions.py
)


def arguments(workdir, *more) -> list[str]:
    words = ["run", f"--config={CONFIG}:smoke", f"--workdir={workdir}", *SMALL, *more]
    return last_of_each(words)


@pytest.fixture(scope="module")
def settings():
    """Compiled programs stay in the tests' own cache, and an error stays on one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSYNTH_CACHE", "off")
        patch.setenv("COLUMNS", "400")
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, settings) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "w"
    assert cli.main(arguments(workdir)) == 0
    return workdir


def test_every_stage_is_made_and_reported(finished):
    results = json.loads((finished / "results.json").read_text())
    assert [(r["data"], r["recipe"], r["seed"]) for r in results] == [
        ("digits", "affiner_zero", 0),
        ("digits", "full", 0),
    ]
    adapter, full = results
    assert adapter["trainable"] < full["trainable"]
    # Switched off, the adapter leaves what the base makes of its classes, to the bit.
    assert adapter["old_off"] == adapter["old_before"] == full["old_before"]
    assert "old_off" not in full and adapter["old"] != adapter["old_before"]
    assert all(0 < r["test"] < 3 and 0 < r["validation"] < 3 for r in results)
    page = (finished / "report.html").read_text()
    assert "Affiner, zero W_up (all)" in page
    assert "| full fine-tuning" in (finished / "table-digits.md").read_text()
    assert "real against real" in (finished / "table-quality.md").read_text()


def test_one_store_holds_all_sets(finished):
    store = ImageStore(finished / "images")
    # Three digits and two photos' patches, three of each.
    assert len(store) == 15 and len(store.class_names) == 5
    assert (store.datasets[0], store.class_names[0]) == ("digits", "one")
    assert (store.datasets[-1], store.class_names[-1]) == ("patches", "dahlia")
    assert np.std(store[0].image) > 0


def test_routing_is_exact(finished):
    found = json.loads((finished / "routing" / "routing.json").read_text())
    assert found["off"] == 0.0
    assert found["mixed"] < 1e-5 * found["scale"] and found["merged"] < 1e-4 * found["scale"]


def test_a_finished_run_is_skipped_and_a_changed_one_refused(finished, capfd):
    times = {path: path.stat().st_mtime_ns for path in finished.rglob(MANIFEST)}
    assert len(times) > 12
    assert cli.main(arguments(finished)) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob(MANIFEST)} == times
    capfd.readouterr()
    assert cli.main(arguments(finished, "--config.rank=2")) == 1
    assert "rank" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob(MANIFEST)} == times


def configured(*more: str) -> Config:
    values = load_config(f"{CONFIG}:smoke")
    assignments = [x.removeprefix("--config.").split("=", 1) for x in (*SMALL, *more)]
    return to_dataclass(Config, override(values, [(name, value) for name, value in assignments]))


def test_any_kind_of_adapter_is_a_recipe_and_that_of_the_sets(finished):
    chosen = ("--config.adapter=lokr", "--config.adapter.factor=2", "--config.lora_rank=3")
    config = configured(f"--config.base={finished / 'base'}", *chosen)
    assert config.recipes == ("full", "affiner_zero", "adapter")
    assert config.sets_recipe == "adapter" and config.rates_of("adapter") == (1e-2,)
    base = load_dit(finished / "base").transformer
    state = extract(config.adaptation("adapter", 0).apply(base, 3))
    assert type(state.config) is LoKrConfig and (state.config.rank, state.config.factor) == (3, 2)
    assert {name.split(".")[-1] for name in state.arrays} >= {"lokr_w1", "rows"}
    with pytest.raises(ValueError, match="'adapter' is what `adapter` chooses"):
        configured("--config.recipes=adapter")


def test_a_base_that_knows_more_finds_its_classes_by_name(finished, tmp_path):
    base = tmp_path / "base"
    (base / "transformer").mkdir(parents=True)
    for name in ("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"):
        (base / name).symlink_to(finished / "base" / name)
    (base / "scheduler").symlink_to(finished / "base" / "scheduler")
    index = json.loads((finished / "base" / "model_index.json").read_text()) | {"vae": [None] * 2}
    (base / "model_index.json").write_text(json.dumps(index))
    known = load_dit(base).id2label
    assert known[0] == "printed zero" and len(known) == 18
    names = "--config.base_data.printed.class_names=circle,three"
    made = run._Run(configured(f"--config.base={base}", names), tmp_path / "run")
    latents = made.latents("base")
    found = known_latents(made.base.value, latents, "test").labels
    assert [known[label] for label in sorted(set(found))] == ["printed three", "printed circle"]
    stored = Latents.load(latents.path / "test.npz").labels
    np.testing.assert_array_equal(found, np.array([10, 3])[stored])
    index["id2label"].pop("3")
    (base / "model_index.json").write_text(json.dumps(index))
    made = run._Run(configured(f"--config.base={base}", names), tmp_path / "other")
    with pytest.raises(UserError, match="class 'printed three' is none of the 17"):
        known_latents(made.base.value, latents, "test")


def test_without_new_data_the_run_ends_with_its_base(finished, tmp_path):
    config = configured()
    only = Config(
        base_data=config.base_data, pretrain=config.pretrain, seeds=config.seeds, data={}, study=()
    )
    (tmp_path / "latents").symlink_to(finished / "latents")
    folder = run.run(only, tmp_path)
    assert folder == tmp_path / "base"
    # Of the same seed and data it is the same base.
    one, two = (load_artifact(path / "base") for path in (tmp_path, finished))
    assert one.digest == two.digest


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("recipes=full,afiner", "recipes: 'afiner', expected some of"),
        ("sets_recipe=full", "sets_recipe: 'full' changes the base's own weights"),
        ("sets_recipe=lora", "sets_recipe: 'lora', expected some of full, affiner_zero"),
        ("study=letters", "study: 'letters', expected some of digits"),
        (
            "seeds=",
            "config.seeds='': expected a list, each an integer, 0 to 4294967295, at least one",
        ),
        ("pretrain.width=30", "width 30 is not divisible by heads 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, capfd, field, message):
    assert cli.main(arguments(tmp_path / "w", f"--config.{field}")) in (1, 2)
    assert message in capfd.readouterr().err
    assert not list(tmp_path.rglob(MANIFEST))


def test_sets_are_planned_as_they_are_trained():
    """Side by side in one program, or from the disk in turn, where each has the whole mesh."""

    def planned(streamed: bool):
        values = load_config(f"{CONFIG}:smoke")
        values["train"]["streamed"] = streamed
        programs = run.plan(to_dataclass(Config, values), make_mesh(-1, 1, 1))
        (found,) = (program for program in programs if program.name == "2 sets")
        return found.unit, found.updates(8)

    (stacked, once), (apart, twice) = planned(False), planned(True)
    assert (stacked, apart) == (1, 8) and twice == 2 * once > 0


def test_the_largest_network_compiles_for_eight_devices_without_being_there():
    """DiT-XL/2 in 16 bits, its weights cut four ways."""
    config = to_dataclass(Config, load_config(f"{CONFIG}:xl2"))
    before = sum(x.nbytes for x in jax.live_arrays())
    program, drawing = run.plan(config, make_mesh(-1, 4, 1))
    plan = program.compile()
    assert drawing.name == "draw set of target"
    assert sum(x.nbytes for x in jax.live_arrays()) < before + 2**20
    base = 675_129_632 - 256 * 1152  # the positions are computed
    assert base * 2 / 4 <= plan.frozen < 1.02 * base * 2 / 4
    assert plan.frozen < plan.arguments < plan.bytes < 4 * 2**30
    # Forward 119 GFLOP of multiply-adds an image as published; forward, recomputation, backward
    # to activations: at least three times that, twice for operations, and little for the Affiners.
    assert 3 < plan.flops / (2 * 119e9 * config.train.batch_size) < 3.3
    assert plan.devices == 8 and "100 classes and 10000 images are assumed" in plan.note
