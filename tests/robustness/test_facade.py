"""One call of any kind of function, and the README's snippets."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxsynth.robustness
from jaxsynth.robustness import evaluate, from_torch, pgd
from jaxsynth.robustness.metrics.details import FEATURE_SCORES, LOGIT_SCORES

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 4)).astype(np.float32) * 20
IMAGES = RNG.random((24, 16, 16, 3)).astype(np.float32)
LABELS = ((IMAGES.mean((1, 2)) - 0.5) @ KERNEL).argmax(1)
LABELS[:3] = (LABELS[:3] + 1) % 4
STRANGE = RNG.random((8, 16, 16, 3)).astype(np.float32)
SETTINGS = {"resamples": 100, "batch_size": 8}
FOG = {"corruptions": ("fog",)}


def in_jax(pixels):
    return (pixels.mean((1, 2)) - 0.5) @ jnp.asarray(KERNEL)


def in_numpy(pixels):
    assert isinstance(pixels, np.ndarray) and pixels.dtype == np.float32
    return (pixels.mean((1, 2)) - 0.5) @ KERNEL


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.tensor(KERNEL))

    def forward(self, pixels):
        return (pixels.mean((2, 3)) - 0.5) @ self.kernel


def in_torch(pixels):
    with torch.no_grad():
        return Net()(torch.from_numpy(pixels).permute(0, 3, 1, 2))


@pytest.mark.heavy
def test_functions_of_every_library_get_the_same_metrics():
    given = {
        "ood": {"noise": STRANGE}, "shifted": {"half": (IMAGES[:8] / 2, LABELS[:8])},
        "corruptions": ("contrast",), "severities": (5,),
    }  # fmt: skip
    found = {
        predict.__name__: evaluate(predict, IMAGES, LABELS, **given, **SETTINGS)
        for predict in (in_jax, in_numpy, in_torch)
    }
    first = found["in_jax"]
    assert first["accuracy"].value == pytest.approx(21 / 24)
    assert {"ECE", "accuracy half", "AUROC noise", "FPR95 noise", "R_cc"} <= first.keys()
    assert all(f"AUROC noise by {score}" in first for score in LOGIT_SCORES)
    for other in found.values():
        assert other.keys() == first.keys()
        for name, interval in first.items():
            assert interval.low < interval.high, name
            assert other[name].value == pytest.approx(interval.value, abs=1e-5), name


def test_attacks_take_jax_and_torch_modules_and_refuse_the_rest_by_name():
    predict = from_torch(Net().eval())
    moved = [pgd(f, IMAGES, LABELS, jax.random.key(0), eps=0.02) for f in (in_jax, predict)]
    np.testing.assert_allclose(*moved, atol=1e-5)
    assert np.abs(moved[1] - IMAGES).max() > 0.01
    images, labels = IMAGES[:8], LABELS[:8]
    one, other = (
        evaluate(f, images, labels, attacks=("FGSM",), eps=0.02, **SETTINGS)["R_adv FGSM"]
        for f in (in_jax, predict)
    )
    assert one == other
    # A function of tensors, and a model whose output holds logits, as those of transformers.
    for model in (lambda x: Net()(x), lambda x: SimpleNamespace(logits=Net()(x))):
        np.testing.assert_array_equal(from_torch(model)(images), predict(images))
    with pytest.raises(ValueError, match="the model gives dict, expected logits"):
        evaluate(from_torch(lambda x: {"a": Net()(x)}), images, labels, **SETTINGS)
    with pytest.raises(ValueError, match=r"predict: JAX cannot trace it .* by .*from_torch"):
        evaluate(in_numpy, images, labels, attacks=("FGSM",), **SETTINGS)


def test_feature_scores_need_features_of_training_images():
    given = {"ood": {"noise": STRANGE}, **SETTINGS}
    features = {"features": lambda x: x.mean((1, 2)), "training": (IMAGES, LABELS)}
    found = evaluate(in_numpy, IMAGES, LABELS, **given, **features)
    for score in FEATURE_SCORES:
        # ViM needs the last layer too, which a function does not tell.
        assert (f"FPR95 noise by {score}" in found) == (score != "ViM")
    with pytest.raises(ValueError, match="features and training: expected both"):
        evaluate(in_numpy, IMAGES, LABELS, **given, features=features["features"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES * 255}, r"images: values from .* expected \[0, 1\]"),
        ({"images": IMAGES[..., :1]}, r"images: expected \(images, height, width, 3\)"),
        ({"labels": LABELS[:-1]}, r"images: labels: expected shape \(24,\)"),
        ({"labels": LABELS + 4}, "labels of clean: 24 of 24 outside 0 to 3"),
        ({"predict": 3}, "predict: expected a function, found int"),
        ({"predict": lambda x: x}, r"predict: expected logits \(8, classes\)"),
        ({"predict": Net()}, r"predict: Net is a torch module, which .*from_torch"),
        ({"attacks": "PGD"}, "attacks: expected several in a tuple, found 'PGD' alone"),
        ({"corruptions": "fog"}, "corruptions: expected several in a tuple, found 'fog' alone"),
        ({**FOG, "severities": 3}, "severities: expected several in a tuple, found 3 alone"),
        ({"ood": IMAGES}, "ood: expected sets by name, found ndarray"),
        ({"eps": 8 / 255}, "eps: not used without attacks; leave it out, or give attacks"),
        ({"severities": (2,)}, "severities: not used without corruptions"),
        ({"seed": 2**64}, "seed: expected a whole number, 0 to 9223372036854775807"),
        ({"attacks": ("DeepFool",)}, "attacks: 'DeepFool': expected some of FGSM, PGD"),
        ({"corruptions": ("hail",)}, "names: 'hail': expected all"),
        ({**FOG, "severities": (1.5,)}, "severities: expected a whole number, 1 to 5, found 1.5"),
        ({"seed": 0.5}, "seed: expected a whole number"),
        ({"shifted": {"A": IMAGES}}, r"shifted: 'A': expected \(images, labels\)"),
        ({"attacks": ("PGD",), "eps": 8}, "eps: 8 is more than images"),
        ({"attacks": ("PGD",), "eps": np.ones(2)}, r"eps: expected one number, .* shape \(2,\)"),
        ({"attacks": ("PGD",), "eps": "8/255"}, "eps: expected one number, 0 or more, found 8/255"),
        ({"attacks": {"mine": 3}}, "attacks: 'mine': expected a function, found int"),
        ({"ood": {"A": 3}}, r"ood A: expected \(images, .*, found shape \(\)"),
        ({"ood": {"": STRANGE}}, "ood: '': expected a name"),
        ({"shifted": {3: (IMAGES, LABELS)}}, "shifted: 3: expected a name"),
        ({"training": IMAGES, "features": in_numpy}, r"training: expected \(images, labels\)"),
        ({"training": (IMAGES, LABELS), "features": 3}, "features: expected a function, found"),
        (
            {"training": (IMAGES, LABELS), "features": lambda x: "x", "ood": {"A": STRANGE}},
            r"features: expected features \(8, dimensions\) .*, found \(\)",
        ),
        ({"predict": lambda x: in_numpy(x) > 0}, "predict: expected numbers, found bool"),
        ({"predict": lambda x: in_numpy(x) + 0j}, "predict: expected numbers, found complex"),
    ],
)
def test_mistakes_are_named(change, message):
    given = {"predict": in_jax, "images": IMAGES, "labels": LABELS, **SETTINGS}
    with pytest.raises(ValueError, match=message):
        evaluate(**given | change)


def test_every_name_is_there_and_none_is_loaded_before_it_is_used():
    for name in jaxsynth.robustness.__all__:
        assert getattr(jaxsynth.robustness, name) is not None
    assert {"evaluate", "pgd"} <= set(dir(jaxsynth.robustness))
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        _ = jaxsynth.robustness.evalute
    code = "import sys, jaxsynth.robustness; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.heavy
def test_the_readme_does_what_it_says(capsys):
    path = Path(jaxsynth.robustness.__file__).with_name("README.md")
    snippets = re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.S)
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, str(path), "exec"), names)
    assert len(snippets) == 4 and capsys.readouterr().out.count("\n") == 5
