"""The CLIP classifier beyond the published recipe: each option alone, and all at once."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from jaxsynth.adapters.inject import trainable_variables, with_attributes
from jaxsynth.core.errors import UserError
from jaxsynth.data.pipeline.augment import EvalTransform
from jaxsynth.tasks.clip_classifier import ClassifyConfig, batch_shapes, classifier_task
from jaxsynth.tasks.clip_predictions import (
    SHARES,
    class_features,
    embed,
    head_logits,
    predict,
    with_best_share,
    with_share,
)
from jaxsynth.tasks.regions import RegionConfig, find_regions, pixel_rows, region_terms
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.metrics import read_metrics
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.hf import load_clip
from tests.tasks.test_clip_classifier import (
    CONFIG,
    PROMPTS,
    REAL,
    SYNTHETIC,
    Killed,
    differs,
    factors,
    same,
    source,
    trained,
)

REGIONS = {"discrepancy": 20.0, "robustness": 50.0}
# Each option alone, as changes of the published recipe; "all" has every one of them.
OPTIONS = {
    "label smoothing": {"label_smoothing": 0.1},
    "moving weight": {"real_weight_start": 0.2},
    "visual head": {"visual_head": True},
    "discrepancy": {"regions": RegionConfig(discrepancy=20.0)},
    "robustness in features": {"regions": RegionConfig(robustness=50.0, space="features")},
    "two stages": {"learns": "norms", "targets": ("q_proj", "v_proj"), "head_share": 0.5},
}
PLAIN = dataclasses.replace(CONFIG, rank=None, targets=("q_proj", "v_proj"), dropout=None)
ALL = {k: v for changes in OPTIONS.values() for k, v in changes.items()} | {
    "regions": RegionConfig(**REGIONS, clusters=4)
}


@pytest.fixture(scope="module")
def clip(base_folder):
    return load_clip(base_folder / "clip")


def terms(logits, regions, num_real, total):
    """The formulas of `tasks.regions`, pair by pair in float64."""
    discrepancy = robustness = 0.0
    logits = logits.astype(np.float64)
    for region in set(regions):
        members = np.flatnonzero(regions == region)
        real, synthetic = members[members < num_real], members[members >= num_real]
        for place, u in enumerate(synthetic):
            for v in real:
                discrepancy += np.mean((logits[u] - logits[v]) ** 2) / len(real)
            for w in synthetic[:place]:
                robustness += np.mean((logits[u] - logits[w]) ** 2) / len(synthetic)
    return discrepancy / total, robustness / total


@pytest.mark.parametrize("num_real", [0, 5, 12])
def test_the_terms_are_their_formulas(num_real):
    rng = np.random.default_rng(num_real)
    logits = rng.normal(20, 30, (12, 4)).astype(np.float32)
    regions = rng.integers(0, 4, 12)
    found = region_terms(jnp.asarray(logits), jnp.asarray(regions), num_real, jnp.float32(50))
    expected = terms(logits, regions, num_real, 50)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-5)
    assert [x > 0 for x in expected] == [0 < num_real < 12, num_real < 12]


def loss_of(clip, changes):
    """An option's loss on a batch of both kinds, and the formula's, from logits by head."""
    config = dataclasses.replace(PLAIN, **{"steps": 11, **changes})
    rng = np.random.default_rng(3)
    num_real, count = 4, 8
    regions = {"real": rng.integers(0, 2, 12), "synthetic": rng.integers(0, 2, 24)}
    task = classifier_task(
        clip, PROMPTS, config, seed=0, both=True, regions=regions if config.regions else None
    )
    index = np.concatenate([rng.choice(12, num_real, False), rng.choice(24, num_real, False)])
    batch = {
        "image": np.concatenate(
            [REAL.images[index[:num_real]], SYNTHETIC.images[index[num_real:]]]
        ),
        "label": np.concatenate(
            [REAL.labels[index[:num_real]], SYNTHETIC.labels[index[num_real:]]]
        ),
        "is_real": np.arange(count) < num_real,
        "index": index,
        "step": np.full(count, 6),
    }
    model = task.model
    if config.visual_head:
        head = model.visual_head
        kernel = type(head.kernel)(jnp.asarray(rng.normal(0, 1, head.kernel.shape), jnp.float32))
        model = with_attributes(model, visual_head=with_attributes(head, kernel=kernel))
    # Processes put their parts of a batch one after the other: the loss sorts its rows.
    order = rng.permutation(count)
    mixed = {key: jnp.asarray(values[order]) for key, values in batch.items()}
    value, _ = task.loss(model, task.constants, mixed, jax.random.key(1))
    pixels = np.stack([EvalTransform(16, clip.mean, clip.std)(x) for x in batch["image"]])
    text = class_features(model, jnp.asarray(clip.tokenizer(list(PROMPTS))))
    weight = config.real_weight
    if config.real_weight_start is not None:
        weight = 0.2 + 0.6 * (weight - 0.2)
    expected = 0.0
    for logits in map(np.asarray, head_logits(model, text, jnp.asarray(pixels))):
        smooth = config.label_smoothing
        targets = np.eye(3)[batch["label"]] * (1 - smooth) + smooth / 3
        each = -(targets * log_softmax(logits.astype(np.float64), axis=1)).sum(1)
        expected += weight * each[:num_real].mean() + (1 - weight) * each[num_real:].mean()
        if config.regions:
            own = np.concatenate(
                [regions["real"][index[:num_real]], regions["synthetic"][index[num_real:]]]
            )
            found = terms(logits, own, num_real, 24)
            expected += config.regions.discrepancy * found[0]
            expected += config.regions.robustness * found[1]
    return float(value), expected


@pytest.mark.heavy
def test_each_options_loss_is_its_formula(clip):
    found = {name: loss_of(clip, changes) for name, changes in OPTIONS.items()}
    found["all"] = loss_of(clip, ALL)
    found["plain"] = loss_of(clip, {})
    for name, (value, expected) in found.items():
        assert value == pytest.approx(expected, rel=1e-5), name
    # What learns is no matter of the loss; everything else changes it.
    values = [value for name, (value, _) in found.items() if name != "two stages"]
    assert len(set(values)) == len(values)


@pytest.fixture(scope="module")
def runs(clip, tmp_path_factory):
    """Trained classifiers and their folders: the published recipe, options with parts of a training
    or of a network of their own, and all options."""
    found = {}
    alone = ("moving weight", "visual head", "two stages")
    for name, changes in {"plain": {}, **{x: OPTIONS[x] for x in alone}, "all": ALL}.items():
        folder = tmp_path_factory.mktemp("run")
        config = dataclasses.replace(PLAIN, **changes)
        validation = source(9) if name == "all" else None
        model = trained(clip, folder, config, real=REAL, synthetic=SYNTHETIC, validation=validation)
        found[name] = model, folder
    return found


@pytest.mark.heavy
def test_each_option_trains_and_answers(runs, clip):
    answers = {name: predict(clip, model, PROMPTS, source(5)) for name, (model, _) in runs.items()}
    for name, logits in answers.items():
        assert np.isfinite(logits).all(), name
        if name != "plain":
            assert np.abs(logits - answers["plain"]).max() > 1e-6, name
    for name in ("visual head", "all"):
        np.testing.assert_allclose(logsumexp(answers[name], axis=1), 0, atol=1e-5)
    _, folder = runs["all"]
    line = read_metrics(folder / "metrics.jsonl")[-1]
    assert line["discrepancy"] > 0 and line["robustness"] > 0


def test_two_stages_train_the_norms_and_then_the_head(runs, clip):
    (whole, _), (model, folder) = runs["plain"], runs["two stages"]
    assert set(factors(model)) == {"class_head.rows"}
    assert Checkpoints(folder / "checkpoints", every=1).latest == 2
    assert Checkpoints(folder / "head" / "checkpoints", every=1).latest == 2
    first = classifier_task(
        clip, PROMPTS, dataclasses.replace(PLAIN, learns="norms"), seed=0, both=True
    ).model
    names = set(trainable_variables(first))
    layers = [f"{tower}_model.encoder.layers.0" for tower in ("text", "vision")]
    blocks = {f"{layer}.layer_norm{i}" for layer in layers for i in (1, 2)}
    ends = {"text_model.final_layer_norm"} | {
        f"vision_model.{name}" for name in ("pre_layrnorm", "post_layernorm")
    }
    assert names == {f"{x}.{part}" for x in blocks | ends for part in ("scale", "bias")}
    # The head began as the texts of the tuned tower, and has moved.
    rows = np.asarray(model.class_head.rows[...])
    norms = np.linalg.norm(rows, axis=1)
    assert 0 < np.abs(norms - 1).max() < 0.2
    assert "lora" in "".join(factors(whole))


def test_validation_chooses_the_share_of_the_visual_head(runs, clip):
    model, folder = runs["all"]
    chosen = json.loads((folder / "head" / "best" / "best.json").read_text())
    assert chosen["share"] in SHARES
    assert float(model.visual_head.share[...]) == pytest.approx(chosen["share"])
    logits = predict(clip, model, PROMPTS, source(9))
    assert (logits.argmax(-1) == source(9).labels).mean() == pytest.approx(chosen["accuracy"])
    best = with_best_share(clip, model, PROMPTS, source(9))
    right = [
        (predict(clip, with_share(model, x), PROMPTS, source(9)).argmax(-1) == source(9).labels)
        for x in (*SHARES, float(best.visual_head.share[...]))
    ]
    assert np.mean(right[-1]) == max(map(np.mean, right))
    assert float(runs["visual head"][0].visual_head.share[...]) == 0.5


@pytest.mark.heavy
def test_all_options_on_devices_and_after_a_kill(runs, clip, tmp_path, monkeypatch):
    """Eight devices begin with one's loss; a killed training ends with the same bits."""
    config = dataclasses.replace(PLAIN, **ALL, checkpoint_every=1)
    given = {"real": REAL, "synthetic": SYNTHETIC, "validation": source(9)}
    trained(clip, tmp_path / "many", config, mesh=make_mesh(), **given)
    _, folder = runs["all"]
    for part in ("", "head"):
        lines = [
            read_metrics(x / part / "metrics.jsonl")[0]["loss"] for x in (folder, tmp_path / "many")
        ]
        assert lines[0] == pytest.approx(lines[1], rel=1e-3), part
    save, killed = Checkpoints.save, set()

    def save_and_die(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        if (part := self.folder.parent.name) not in killed:
            killed.add(part)
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    for _ in range(2):
        with pytest.raises(Killed):
            trained(clip, tmp_path / "cut", config, **given)
    again = trained(clip, tmp_path / "cut", config, **given)
    same(again, runs["all"][0])
    assert not differs(again, runs["all"][0])


def test_regions_are_found_once(clip, tmp_path):
    rows = [pixel_rows(x, 16) for x in (REAL, SYNTHETIC)]
    config = RegionConfig(discrepancy=1.0)
    found = find_regions(rows, config, num_classes=3, seed=0, folder=tmp_path)
    assert [len(x) for x in found] == [12, 24] and len(np.unique(np.concatenate(found))) == 6
    kept = find_regions(rows, config, num_classes=3, seed=1, folder=tmp_path)
    assert all((a == b).all() for a, b in zip(found, kept, strict=True))
    # Images of one colour each: three regions are the classes, in pixels and in features.
    three = dataclasses.replace(config, clusters=3)
    for name, own in (("pixels", rows), ("features", [embed(clip, clip.model, REAL)])):
        found = find_regions(own, three, num_classes=3, seed=0, folder=tmp_path / name)
        assert len(np.unique(found[0])) == 3
    (pixels, _) = find_regions(rows, three, num_classes=3, seed=0, folder=tmp_path / "pixels")
    assert len({(int(a), int(b)) for a, b in zip(pixels, REAL.labels, strict=True)}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": 0.3}, "fusion: 0.3, but visual_head is false"),
        ({"regions": RegionConfig(discrepancy=1.0), "accumulate": 2}, "accumulate: 2 parts"),
        ({"learns": "norms", "rank": 4}, "rank: 4, but learns is 'norms'"),
        ({"learns": "norms", "targets": ("q_proj",)}, "targets: .*learns is 'norms'"),
        ({"learns": "all"}, "learns: 'all', expected one of adapter, norms"),
        ({"head_share": 1.0}, "head_share: 1.0"),
    ],
)
def test_options_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        ClassifyConfig(**changes)
    with pytest.raises(ValueError, match="clusters: 3, but discrepancy and robustness are 0"):
        RegionConfig(clusters=3)


def test_a_head_needs_a_step_and_a_pattern_a_parameter(clip, tmp_path):
    config = dataclasses.replace(PLAIN, learns="norms", head_share=0.1)
    with pytest.raises(UserError, match=r"head_share: 0\.1 of 4 steps is 0"):
        trained(clip, tmp_path, config, real=REAL)
    config = dataclasses.replace(config, head_share=0.5, rates=(("lora_B", 2.0),))
    with pytest.raises(UserError, match="rates: 'lora_B' matches no parameter that learns"):
        trained(clip, tmp_path, config, real=REAL)
    shapes = batch_shapes(16, 8, both=True, numbered=True)
    assert set(shapes) == {"image", "label", "is_real", "index", "step"}
