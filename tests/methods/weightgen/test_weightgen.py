"""Generated weights end to end in a few steps: what the run leaves, restarts and refuses."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsynth.cli import main as cli
from jaxsynth.core.config import load_config, to_dataclass
from jaxsynth.core.errors import UserError
from jaxsynth.methods.weightgen import run
from jaxsynth.methods.weightgen.collection import read_collection
from jaxsynth.methods.weightgen.editors import Editors
from jaxsynth.methods.weightgen.edits import Edits
from jaxsynth.methods.weightgen.generator import Baselines, TextReader
from jaxsynth.methods.weightgen.plan import fitting_group
from jaxsynth.methods.weightgen.report import sentences
from jaxsynth.methods.weightgen.scores import INITS, described, trained, unexplained
from jaxsynth.methods.weightgen.stages import COLLECTION, in_canonical
from jaxsynth.runs.stage import MANIFEST, load_artifact
from jaxsynth.training.sharding import make_mesh

pytestmark = pytest.mark.slow

FILE = Path(__file__).parents[3] / "configs" / "weightgen.py"
STAGES = ("base", "collection", "generators/x0 on ridge", "ablation", "comparison")


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
    assert result["ablation"]["chosen"] in result["ablation"]["variants"]
    assert set(result["costs"]) == {"base", "collection", "generator"}
    # Seconds, which differ from run to run, are in no file that the artifact's digest is of.
    comparison = load_artifact(finished / "seed0" / "comparison")
    assert set(comparison.manifest["files"]) == {"comparison.json", "samples.png"}
    kept = json.loads((comparison.path / "comparison.json").read_text())
    assert not {"prepare", "step"} & kept["inits"]["mean"].keys() and "costs" not in kept
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
    assert code and "concepts" in err and str(finished / "seed0" / "comparison") in err
    code, _, err = call(capfd, finished, "--config.held_out=3")
    assert code and "held_out" in err and str(finished / "seed0" / "base") in err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.concepts.families=sculpture", "concept family 'sculpture': expected one of"),
        ("--config.concepts.train=5000", "concepts: 5000 to train on"),
        ("--config.photos=500", "photos: 500 asked for, the data set has"),
        ("--config.generators={}", "generators"),
        ("--config.edits.kind=diffusion", "edits.model is ''"),
        ("--config.concepts.url=http://x", "concepts.url is 'http://x', but source is 'builtin'"),
    ],
)
def test_bad_input_is_one_line(settings, capfd, tmp_path, argument, message):
    code, _, err = call(capfd, tmp_path / "run", argument)
    assert code and message in err and "Traceback" not in err


@pytest.fixture(scope="module")
def seed(finished):
    """The run's first seed, whose stages are all made."""
    config = to_dataclass(run.Config, load_config(f"{FILE}:smoke"))
    return run._Seed(config, finished / "seed0", 0, run._Sources(config))


@pytest.fixture(scope="module")
def read(seed) -> TextReader:
    pipeline = seed.sources.text.value
    return TextReader(pipeline.text_encoder, pipeline.tokenizer)


@pytest.fixture(scope="module")
def editors(seed, read) -> Editors:
    config = seed.config
    edits = Edits(seed.scene("train"), seed.sources.data.value)
    return Editors(config.networks, read, edits, base=seed.folder / "base", adapter=config.adapter)


@pytest.fixture(scope="module")
def collection(seed, editors):
    layout = editors.adapter.layout(editors.networks)
    base = load_artifact(seed.folder / "base").digest
    return read_collection(seed.folder / "collection" / COLLECTION, layout, base)


def test_unseen_concepts_are_not_trained_on(seed, collection):
    parts = {name: set(seed.scene(name).prompts) for name in run.PARTS}
    assert [len(own) for own in parts.values()] == [6, 2, 2]
    assert len(set().union(*parts.values())) == 10
    assert [texts[0] for texts in collection.texts] == seed.scene("train").prompts
    assert list(seed.scene("unseen").rows) == [8, 9]
    assert list(seed.scene("validation").rows) == [6, 7]


def test_canonical_factors_do_the_same(editors, collection):
    turned = in_canonical(collection, "aligned")
    assert np.abs(collection.blocks - turned.blocks).max() > 1e-3
    layout = collection.layout
    states = [[layout.from_blocks(jnp.asarray(own.blocks[2, 1]))] for own in (collection, turned)]
    first, second = (editors.draw([0], state).astype(float) for state in states)
    assert np.abs(first - second).max() <= 1


def test_what_is_described_is_relative_to_the_collection(seed, collection, read):
    baselines = Baselines(collection, read)
    own = described(baselines.blocks, baselines)
    assert own["nearest_train"] == pytest.approx(0, abs=1e-6)
    assert 0 < own["norm_low"] <= 1 <= own["norm_high"]
    mean = described(baselines.mean[None], baselines)
    assert 0 < mean["nearest_train"] <= 1
    assert trained(baselines)["nearest_train"] > 0
    every = np.repeat(baselines.mean[None], len(baselines.blocks), axis=0)
    assert unexplained(every, baselines) == pytest.approx(1, abs=1e-4)
    counts = load_artifact(seed.folder / "generators" / "x0 on ridge").counts
    turned = Baselines(in_canonical(collection, "aligned"), read)
    assert counts["ridge_left_out"] == pytest.approx(unexplained(turned.left_out("ridge"), turned))


@pytest.fixture(scope="module")
def planned():
    config = to_dataclass(run.Config, load_config(f"{FILE}:smoke"))
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    return config, mesh, [one.compile() for one in run.plan(config, mesh)]


def test_programs_are_planned_from_shapes(planned):
    plans = planned[2]
    assert [(one.name, one.devices) for one in plans] == [
        ("base", 4), ("6 LoRAs", 4), ("generator x0 on ridge", 4), ("one fine-tuning", 1),
        ("weights of one concept, x0 on ridge", 1),
    ]  # fmt: skip
    assert all(one.flops > 0 and one.bytes > 0 for one in plans)
    base, together, _, tuned, _ = plans
    assert together.flops > 3 * tuned.flops and base.frozen < together.frozen


def test_loras_train_in_groups_that_fit(planned):
    config, mesh, plans = planned
    config = dataclasses.replace(
        config, editor=dataclasses.replace(config.editor, share="none", group=0)
    )
    all_together = plans[1].bytes / 2**30
    assert fitting_group(dataclasses.replace(config, memory=4 * all_together), mesh) == 6
    with pytest.raises(UserError, match="memory: 2 LoRAs need"):
        fitting_group(dataclasses.replace(config, memory=1e-9), mesh)
    shared = dataclasses.replace(config, editor=dataclasses.replace(config.editor, share="words"))
    with pytest.raises(UserError, match="all train together"):
        fitting_group(dataclasses.replace(shared, memory=1e-9), mesh)
