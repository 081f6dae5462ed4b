"""A condition task's stages on a base of random weights, and its part of the page."""

import json

import numpy as np
import pytest

from jaxsynth.adapters.inject import extract
from jaxsynth.core.errors import UserError
from jaxsynth.data.conditions import as_bytes, source_condition
from jaxsynth.data.dataset import DataConfig
from jaxsynth.data.store import ImageStore
from jaxsynth.generation.generate import GenerateConfig, fill_store
from jaxsynth.methods.diffscaler import conditions, run
from jaxsynth.methods.diffscaler.conditions import others, ranks, rows_of
from jaxsynth.methods.diffscaler.config import Config
from jaxsynth.methods.diffscaler.report import _conditions
from jaxsynth.methods.diffscaler.stages import new_latents, parts_of
from jaxsynth.models.diffusion.dit import DiT, DiTConfig
from jaxsynth.report.page import write_page
from jaxsynth.runs.stage import load_artifact, run_stage
from jaxsynth.tasks.class_conditional import AdaptConfig
from jaxsynth.weights.adapters.native import read_state, write_state
from jaxsynth.weights.hf import load_pipeline
from jaxsynth.weights.networks.dit import DDIM_SCHEDULER, DiTPipeline, save_dit
from tests.methods.small_base import random_network

pytestmark = pytest.mark.slow

DIT = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    out_channels=8,
    sample_size=4,
    num_embeds_ada_norm=3,
)
SHAPES = ("circle", "square")


def config_of(base: str = "", **more) -> Config:
    scenes = DataConfig(
        "builtin", "scenes", image_size=8, images_per_class=12, test_fraction=0.5,
        class_names=SHAPES,
    )  # fmt: skip
    values = {
        "base": base,
        "base_data": {"digits": DataConfig()},
        "data": {"scenes": scenes},
        "study": ("scenes",),
        "recipes": ("affiner_all",),
        "draw": (),
        "rates": {"adapter": (1e-2,)},
        "rank": 2,
        "train": AdaptConfig(steps=4, batch_size=8, steps_per_call=2),
        "seeds": (0,),
        "error_repeats": 1,
        "generate": GenerateConfig(
            images_per_class=3, guidance_scale=1.0, num_inference_steps=2, batch_size=8,
            batches_per_shard=1,
        ),
        "conditions": {"scenes": ("depth",)},
    }  # fmt: skip
    return Config(**values | more)


@pytest.fixture(scope="module")
def work(base_folder, tmp_path_factory) -> run._Run:
    folder = tmp_path_factory.mktemp("conditions")
    base, vae = random_network(DiT, DIT, 0), load_pipeline(base_folder).vae
    names = dict(enumerate("abc"))
    save_dit(DiTPipeline(base, vae, DDIM_SCHEDULER, names), folder / "base")
    return run._Run(config_of(str(folder / "base")), folder / "run")


@pytest.fixture(scope="module")
def plain(work):
    """The data set's parameters without a condition, untrained, and images that are noise."""

    def write(path):
        adaptation = work.config.adaptation("affiner_all", 0)
        model = adaptation.apply(work.base.value.transformer, 2)
        write_state(path / "scenes.safetensors", extract(model))

    def draw(path):
        def noise(labels, indices):
            shape = (len(labels), 8, 8, 3)
            return np.random.default_rng(len(labels)).integers(0, 256, shape, np.uint8)

        fill_store(
            noise, path, SHAPES, SHAPES, work.config.generate, seed=0, datasets=["scenes"] * 2
        )

    folder = work.folder
    return (
        run_stage("sets", folder / "sets" / "together", {}, {}, write),
        run_stage("images", folder / "images", {}, {}, draw),
    )


@pytest.fixture(scope="module")
def following(work, plain):
    maps = work.maps("scenes", "depth")
    work.condition("scenes", "depth", 1e-2, maps, *plain)
    return load_artifact(work.folder / "conditions" / "scenes" / "depth" / "following")


def test_a_task_learns_draws_and_measures(work, plain, following):
    folder = work.folder / "conditions" / "scenes" / "depth"
    adapter = load_artifact(folder / "adapter").counts
    assert {"own", "another", "none", "plain", "trainable", "trainable_plain"} == set(adapter)
    assert all(0 < adapter[key] < 50 for key in ("own", "another", "none", "plain"))
    assert adapter["own"] != adapter["another"] != adapter["none"]
    state = read_state(folder / "adapter" / "adapter.safetensors")
    # A gate and a kernel for the four pixels below a latent; no Affiner on that layer.
    assert state.arrays["pos_embed.proj.side.kernel"].shape == (2, 2, 4, 16)
    assert float(state.arrays["pos_embed.proj.gate"]) != 0
    assert not {"pos_embed.proj.scale", "pos_embed.proj.up"} & state.arrays.keys()
    assert "transformer_blocks.attn1.to_q.up" in state.arrays
    assert adapter["trainable"] == sum(value.size for value in state.arrays.values())
    assert len(ImageStore(folder / "images")) == 6
    assert following.counts.keys() == {"own", "another", "plain", "autoencoder"}
    assert all(0 <= value <= 1 for value in following.counts.values())
    written = json.loads((following.path / "following.json").read_text("utf-8"))
    assert written == following.counts | {"images": 6}
    before = following.path.stat().st_mtime_ns
    work.condition("scenes", "depth", 1e-2, work.maps("scenes", "depth"), *plain)
    assert following.path.stat().st_mtime_ns == before


def test_conditions_are_those_of_the_held_out_images(work, following):
    """In the order of the latents, a pixel of the condition above each pixel of the image."""
    maps, latents = work.maps("scenes", "depth"), work.latents("scenes")
    test = conditions._conditioned(work.base.value, latents, maps, "test")
    source = parts_of(work._data["scenes"].value)["test"]
    np.testing.assert_array_equal(np.asarray(source.labels) + 4, test.labels)
    np.testing.assert_array_equal(test.mean, new_latents(work.base.value, latents, "test").mean)
    for index in (0, len(source) - 1):
        expected = as_bytes(source_condition(source, index, "depth", 8))
        np.testing.assert_array_equal(conditions._pixels(maps, "test")[index], expected)
        np.testing.assert_array_equal(test.condition[index, 0, 1, 1], expected[2:4, 2:4].ravel())


def test_numbers_of_images_are_rows_of_the_held_out_ones():
    labels = np.array([1, 0, 1, 1])
    found = rows_of(labels, np.array([1, 1, 0, 1]), np.array([2, 3, 5, 0]))
    np.testing.assert_array_equal(found, [3, 0, 1, 0])
    np.testing.assert_array_equal(ranks(labels), [0, 0, 1, 2])
    # The only one of its class has another class's.
    np.testing.assert_array_equal(others(labels), [2, 2, 3, 0])
    with pytest.raises(ValueError, match="no held-out image of class 2"):
        rows_of(labels, np.array([2]), np.array([0]))


def test_the_page_has_a_section_of_conditions(work, following, tmp_path):
    section = _conditions(work.folder)
    errors, agreements = section.tables
    assert errors.rows[0][0] == agreements.rows[0][0] == "depth of scenes"
    assert (
        agreements.rows[0][1] == "region IoU" and agreements.rows[0][3] == following.counts["own"]
    )
    assert len(section.images) == 1
    page = write_page(tmp_path / "page.html", "Conditions", [section]).read_text("utf-8")
    assert "depth of scenes" in page and page.count("<img") == 1
    assert "region IoU" in (work.folder / "table-conditions.md").read_text("utf-8")
    assert _conditions(tmp_path) is None


def test_conditions_that_cannot_be_are_refused_before_anything_is_trained(work, tmp_path):
    with pytest.raises(ValueError, match="conditions: 'canny', expected some of"):
        config_of(conditions={"scenes": ("canny",)})
    with pytest.raises(ValueError, match="conditions: 'photos', expected some of scenes"):
        config_of(conditions={"photos": ("edges",)})
    with pytest.raises(ValueError, match="condition_folders: 'edges', expected some of"):
        config_of(condition_folders={"edges": "edges"})
    digits = config_of(
        data={"digits": DataConfig(image_size=8)},
        study=("digits",),
        conditions={"digits": ("depth",)},
    )
    with pytest.raises(UserError, match="'depth' needs the folder of its files"):
        run.run(digits, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"conditions"}
