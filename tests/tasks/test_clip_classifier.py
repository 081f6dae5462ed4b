"""The CLIP classifier: its loss, its modes, its choice of a step, its scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
import torch
import transformers
from flax import nnx

from jaxsynth.adapters.inject import Trainable
from jaxsynth.data.pipeline.augment import RECIPES, EvalTransform
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.tasks import clip_classifier
from jaxsynth.tasks.clip_classifier import ClassifyConfig, train_classifier
from jaxsynth.tasks.clip_predictions import of_pixels, predict, scores
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.metrics import read_metrics
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.hf import load_clip
from tests.models.torch_parity import nchw, relative_error

PROMPTS = ("a photo of the digit one", "a photo of the digit two", "a photo of the digit three")
CONFIG = ClassifyConfig(
    rank=2,
    targets=("q_proj",),
    learning_rate=1e-2,
    batch_size=8,
    epochs=2,
    warmup_epochs=0,
    augment=RECIPES["none"],
    mix_probability=0.0,
)


@pytest.fixture(scope="module")
def clip(base_folder):
    return load_clip(base_folder / "clip")


def source(seed, per_class=4, size=16):
    """Classes of one colour each, with noise."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class).astype(np.int32)
    images = rng.integers(0, 90, (len(labels), size, size, 3))
    images[np.arange(len(labels)), :, :, labels] += 150
    ids = [f"{seed}-{i}" for i in range(len(labels))]
    return ArraySource(images.astype(np.uint8), labels, ids)


REAL, SYNTHETIC = source(0), source(1, 8)


def trained(clip, folder, config=CONFIG, steps=4, **sources):
    config = dataclasses.replace(config, steps=steps)
    return train_classifier(clip, PROMPTS, config, folder, images=24, seed=0, **sources)


def factors(model) -> dict:
    state = nnx.to_flat_state(nnx.state(model, Trainable))
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in state}


def same(found, expected, tolerance=0.0) -> None:
    found, expected = factors(found), factors(expected)
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance, err_msg=name)


def differs(found, expected) -> bool:
    found, expected = factors(found), factors(expected)
    return max(np.abs(found[k] - expected[k]).max() for k in expected) > 1e-4


def test_zero_shot_logits_are_those_of_transformers(clip, base_folder):
    test = source(5, size=20)
    found = predict(clip, clip.model, PROMPTS, test, batch_size=5)
    peer = transformers.CLIPModel.from_pretrained(base_folder / "clip").eval()
    transform = EvalTransform(clip.image_size, clip.mean, clip.std)
    pixels = np.stack([transform(record.image) for record in test])
    with torch.no_grad():
        output = peer(
            input_ids=torch.tensor(np.array(clip.tokenizer(list(PROMPTS)), np.int64)),
            pixel_values=nchw(pixels),
        )
    assert relative_error(found, output.logits_per_image.numpy()) < 1e-4
    on_eight = predict(clip, clip.model, PROMPTS, test, batch_size=5, mesh=make_mesh())
    assert relative_error(on_eight, found) < 1e-5


def test_a_text_is_the_mean_over_templates(clip, base_folder):
    """Each template's embedding is normalised, and their mean again."""
    names, templates = ("one", "two", "three"), ("a photo of a {}", "{} drawn badly")
    images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    found = of_pixels(clip, clip.model, names, templates)(images)
    peer = transformers.CLIPModel.from_pretrained(base_folder / "clip").eval()
    pixels = nchw((images - np.float32(clip.mean)) / np.float32(clip.std))
    with torch.no_grad():
        texts = []
        for template in templates:
            ids = clip.tokenizer([template.format(name) for name in names])
            output = peer(input_ids=torch.tensor(np.array(ids, np.int64)), pixel_values=pixels)
            texts.append(output.text_embeds)
        text = torch.stack(texts).mean(0)
        text = text / text.norm(dim=-1, keepdim=True)
        expected = peer.logit_scale.exp() * output.image_embeds @ text.T
    assert relative_error(found, expected.numpy()) < 1e-4
    one = of_pixels(clip, clip.model, [templates[0].format(name) for name in names])(images)
    assert relative_error(one, found) > 1e-3
    with pytest.raises(ValueError, match=r"expected exactly one \{\} for the class name"):
        of_pixels(clip, clip.model, names, ("a photo",))


@pytest.fixture(scope="module")
def modes(clip, tmp_path_factory):
    """Each mode's trained model and folder."""
    found = {}
    for name, sources in {
        "real": {"real": REAL},
        "synthetic": {"synthetic": SYNTHETIC},
        "both": {"real": REAL, "synthetic": SYNTHETIC},
    }.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = trained(clip, folder, **sources), folder
    return found


def test_every_mode_trains_as_many_steps(modes, clip):
    models = {name: model for name, (model, _) in modes.items()}
    for name, (_, folder) in modes.items():
        (line,) = read_metrics(folder / "metrics.jsonl")
        assert line["step"] == 4 and np.isfinite(line["loss"]), name
        assert Checkpoints(folder / "checkpoints", every=1).latest == 4
    assert differs(models["real"], models["synthetic"])
    assert differs(models["real"], models["both"])
    assert differs(models["both"], models["synthetic"])


def test_both_learn_their_images(clip, tmp_path):
    config = dataclasses.replace(CONFIG, learning_rate=3e-2, epochs=1)
    model = trained(clip, tmp_path, config, steps=80, real=REAL, synthetic=SYNTHETIC)
    before, after = (
        scores(predict(clip, m, PROMPTS, source(7)), source(7).labels, "abc")["top1"]
        for m in (clip.model, model)
    )
    assert after > max(before, 0.6), (before, after)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_weight_is_that_of_the_real_part(clip, tmp_path, weight):
    """At 1 the synthetic images do not matter, at 0 the real ones do not."""
    config = dataclasses.replace(CONFIG, real_weight=weight, dropout=0.0)
    other = {"real": source(11), "synthetic": source(12, 8)}
    given = {"real": REAL, "synthetic": SYNTHETIC}
    used = trained(clip, tmp_path / "used", config, steps=2, **given)
    kept, swapped = ("real", "synthetic") if weight else ("synthetic", "real")
    again = trained(
        clip, tmp_path / "again", config, steps=2, **{kept: given[kept], swapped: other[swapped]}
    )
    same(again, used)
    changed = trained(
        clip, tmp_path / "changed", config, steps=2, **{kept: other[kept], swapped: given[swapped]}
    )
    assert differs(changed, used)


def test_the_loss_is_the_weighted_sum_of_both_parts(clip, tmp_path):
    """The first step's loss against the formula, on the untrained network (B is zero)."""
    config = dataclasses.replace(CONFIG, dropout=0.0, real_fraction=0.25, real_weight=0.7)
    black = ArraySource(np.zeros((3, 16, 16, 3), np.uint8), np.full(3, 1, np.int32), list("abc"))
    white = ArraySource(np.full((3, 16, 16, 3), 255, np.uint8), np.zeros(3, np.int32), list("def"))
    trained(clip, tmp_path, config, steps=1, real=black, synthetic=white)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    log_p = [jax.nn.log_softmax(predict(clip, clip.model, PROMPTS, s)[0]) for s in (black, white)]
    expected = float(-0.7 * log_p[0][1] - 0.3 * log_p[1][0])
    assert line["loss"] == pytest.approx(expected, rel=1e-4)


def test_devices_train_what_one_does(clip, tmp_path, modes):
    config = dataclasses.replace(CONFIG, dropout=0.0)
    given = {"real": REAL, "synthetic": SYNTHETIC}
    one = trained(clip, tmp_path / "one", config, steps=1, **given)
    many = trained(clip, tmp_path / "many", config, steps=1, mesh=make_mesh(), **given)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "many")]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-5)
    # Adam's first step is the sign of the gradient: only values near zero may differ.
    found, expected = factors(many), factors(one)
    off = [np.abs(found[k] - expected[k]) > 1e-5 for k in expected]
    assert sum(x.sum() for x in off) <= 0.01 * sum(x.size for x in off)


def test_steps_follow_the_synthetic_set():
    assert ClassifyConfig(epochs=3, batch_size=8).num_steps(20) == 9
    assert ClassifyConfig(epochs=3, batch_size=8, steps=5).num_steps(20) == 5


class Killed(Exception):
    pass


def test_the_best_step_is_kept_through_a_restart(clip, tmp_path, monkeypatch):
    """Two looks at the validation set, the first one better; then a kill before the end."""
    config = dataclasses.replace(CONFIG, epochs=2, checkpoint_every=1)
    seen = []
    real_predict = predict

    def scripted(clip, model, prompts, images):
        """The true logits, worse on every look after the first."""
        seen.append(model)
        logits = real_predict(clip, model, prompts, images)
        right = np.eye(3)[images.labels] * 100
        return logits + right if len(seen) == 1 else logits - right

    monkeypatch.setattr(clip_classifier, "predict", scripted)
    save = Checkpoints.save

    def save_and_die(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        if step == 3:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        trained(clip, tmp_path, config, real=REAL, validation=source(9))
    monkeypatch.setattr(Checkpoints, "save", save)
    model = trained(clip, tmp_path, config, real=REAL, validation=source(9))
    same(model, seen[0])
    assert len(seen) == 2 and differs(seen[0], seen[1])
    text = (tmp_path / "best" / "best.json").read_text()
    assert '"step": 2' in text and '"accuracy": 1.0' in text


def test_a_resumed_training_is_bit_identical(clip, tmp_path, monkeypatch, modes):
    config = dataclasses.replace(CONFIG, checkpoint_every=2)
    save = Checkpoints.save

    def save_and_die(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        trained(clip, tmp_path, config, real=REAL, synthetic=SYNTHETIC)
    monkeypatch.setattr(Checkpoints, "save", save)
    same(trained(clip, tmp_path, config, real=REAL, synthetic=SYNTHETIC), modes["both"][0])


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    labels[labels == 2] = 3  # a class without test images
    logits = rng.standard_normal((200, 4)).astype(np.float32) + 2 * np.eye(4)[labels]
    found = scores(logits, labels, ["a", "b", "c", "d"])
    guessed = logits.argmax(-1)
    assert found["top1"] == pytest.approx(sklearn.metrics.accuracy_score(labels, guessed))
    recalls = sklearn.metrics.recall_score(
        labels, guessed, average=None, labels=[0, 1, 3], zero_division=0
    )
    assert found["macro"] == pytest.approx(recalls.mean())
    per_class = found["per_class"]
    assert per_class.pop("c") is None and found["images"] == 200
    np.testing.assert_allclose(list(per_class.values()), recalls)


def test_nothing_to_train_on_is_refused(clip, tmp_path):
    with pytest.raises(ValueError, match="neither real nor synthetic"):
        trained(clip, tmp_path)
    assert jnp.isfinite(clip.model.logit_scale[...])
