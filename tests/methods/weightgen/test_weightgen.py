"""Generated weights end to end in a few steps: what the run leaves, restarts and refuses."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsynth.cli import main as cli
from jaxsynth.core.config import load_config, to_dataclass
from jaxsynth.methods.weightgen import stages
from jaxsynth.methods.weightgen.report import sentences
from jaxsynth.methods.weightgen.scores import INITS, described, trained, unexplained
from jaxsynth.methods.weightgen.stages import _Seed
from jaxsynth.runs.stage import MANIFEST, load_artifact
from jaxsynth.training.sharding import make_mesh

pytestmark = pytest.mark.slow

FILE = Path(__file__).parents[3] / "configs" / "weightgen.py"
STAGES = ("base", "collection", "generators/x0 on ridge", "levers", "comparison")


@pytest.fixture(scope="module")
def settings():
    """Compiled programs stay in the tests' own cache, and an error stays on one line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSYNTH_CACHE", "off")
        patch.setenv("COLUMNS", "400")
        yield


def call(capfd, workdir, *more) -> tuple[int, str, str]:
    capfd.readouterr()
    code = cli.main(["run", f"--config={FILE}:smoke", f"--workdir={workdir}", *more])
    return code, *capfd.readouterr()


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("weightgen")
    assert cli.main(["run", f"--config={FILE}:smoke", f"--workdir={workdir}"]) == 0
    return workdir


def test_a_run_leaves_a_page_and_its_figures(finished):
    for stage in STAGES:
        load_artifact(finished / "seed0" / stage).verify()
    (result,) = json.loads((finished / "results.json").read_text())
    assert set(result["inits"]) == set(INITS)
    for name, one in result["inits"].items():
        steps = [0, 4] if name == "scratch" else [0, 2, 4]
        assert one["steps"] == steps and np.shape(one["l1"]) == (2, len(steps))
        assert np.isfinite(one["l1"]).all() and one["step"] > 0
        assert np.shape(one["fd"]) == (2, len(steps)) and np.min(one["fd"]) >= 0
        assert (one["prepare"] > 0) == (name not in ("default", "scratch"))
    assert result["levers"]["chosen"] in result["levers"]["variants"]
    assert set(result["costs"]) == {"base", "collection", "generator"}
    # The nearest concept's weights are those of the collection, and no two of that are the same.
    assert result["weights"]["nearest"]["nearest_train"] == pytest.approx(0, abs=1e-6)
    assert result["weights"]["trained"]["nearest_train"] > 0
    page = (finished / "report.html").read_text()
    for line in sentences([result], list(INITS)):
        assert line.split("**")[0].strip() in page
    for words in ("Unseen concepts", "Who wins", "What was tried", "never", "nearest LoRA"):
        assert words in page


def test_a_finished_run_is_left_alone(finished, settings, capfd):
    before = (finished / "seed0" / "comparison" / MANIFEST).read_bytes()
    code, out, _ = call(capfd, finished)
    assert code == 0 and out.count("unchanged, skipped") >= len(STAGES) - 1
    assert (finished / "seed0" / "comparison" / MANIFEST).read_bytes() == before
    assert cli.main(["report", str(finished)]) == 0


def test_other_settings_are_refused(finished, settings, capfd):
    code, _, err = call(capfd, finished, "--config.concepts.unseen=3")
    assert code and "was made with other settings" in err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.concepts.families=sculpture", "concept family 'sculpture': expected one of"),
        ("--config.concepts.train=5000", "concepts: 5000 to train on"),
        ("--config.photos=500", "photos: 500 asked for, the data set has"),
        ("--config.generators={}", "generators"),
        ("--config.edits.kind=diffusion", "edits.model is ''"),
    ],
)
def test_bad_input_is_one_line(settings, capfd, tmp_path, argument, message):
    code, _, err = call(capfd, tmp_path / "run", argument)
    assert code and message in err and "Traceback" not in err


@pytest.fixture
def work(finished, tmp_path) -> _Seed:
    """The run's first seed, on a copy of its folder."""
    shutil.copytree(finished / "seed0", tmp_path / "seed0")
    config = to_dataclass(stages.Config, load_config(f"{FILE}:smoke"))
    return _Seed(config, tmp_path / "seed0", 0)


def test_unseen_concepts_are_not_trained_on(work):
    parts = {name: {c.prompt for c in own} for name, own in work.concepts.items()}
    assert [len(own) for own in parts.values()] == [6, 2, 2]
    assert len(set().union(*parts.values())) == 10
    assert [texts[0] for texts in work.rivals("none").collection.texts] == [
        concept.prompt for concept in work.concepts["train"]
    ]
    assert list(work.rows("unseen")) == [8, 9] and list(work.rows("validation")) == [6, 7]


def test_canonical_factors_do_the_same(work):
    plain, turned = (work.rivals(kind).collection for kind in ("none", "aligned"))
    assert np.abs(plain.blocks - turned.blocks).max() > 1e-3
    states = [[work.layout.from_blocks(own.blocks[2, 1])] for own in (plain, turned)]
    first, second = (
        work.editors.draw(work.base.path, [0], state).astype(float) for state in states
    )
    assert np.abs(first - second).max() <= 1


def test_what_is_described_is_relative_to_the_collection(work):
    rivals = work.rivals("none")
    own = described(rivals.blocks, rivals)
    assert own["nearest_train"] == pytest.approx(0, abs=1e-6)
    assert 0 < own["norm_low"] <= 1 <= own["norm_high"]
    mean = described(rivals.mean[None], rivals)
    assert 0 < mean["nearest_train"] <= 1
    assert trained(rivals)["nearest_train"] > 0
    every = np.repeat(rivals.mean[None], len(rivals.blocks), axis=0)
    assert unexplained(every, rivals) == pytest.approx(1, abs=1e-4)
    counts = work.generator("x0 on ridge").counts
    turned = work.rivals("aligned")
    assert counts["ridge_left_out"] == pytest.approx(unexplained(turned.left_out("ridge"), turned))


def test_programs_are_planned_from_shapes():
    config = to_dataclass(stages.Config, load_config(f"{FILE}:smoke"))
    plans = stages.plan(config, make_mesh(data=2, fsdp=2, devices=jax.devices()[:4]))
    names = [one.name for one in plans]
    assert names == [
        "base", "6 LoRAs", "one fine-tuning", "generator x0 on ridge",
        "weights of one concept, x0 on ridge",
    ]  # fmt: skip
    assert all(one.devices == 4 and one.flops > 0 and one.bytes > 0 for one in plans)
    base, together, tuned = plans[:3]
    # Six LoRAs of batches of two see three times as many photos as one of four would.
    assert together.flops > 3 * tuned.flops and base.frozen < together.frozen
