"""How far a classifier can be trusted: accuracy under shift, corruption and attack, calibration,
out-of-distribution detection and biases, every metric with its interval.

    from jaxsynth.robustness import evaluate

    found = evaluate(predict, images, labels, corruptions=("imagenet_c",))
    print(found["R_cc"].text())

README.md in this folder has the rest. Names are loaded when they are first used.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "facade": ("evaluate", "from_torch", "ATTACKS"),
    "attacks.gradient": ("fgsm", "pgd"),
    "attacks.apgd": ("apgd",),
    "attacks.fab": ("fab",),
    "attacks.square": ("square",),
    "attacks.autoattack": ("autoattack",),
    "attacks.evaluate": ("attacked", "eps_sweep"),
    "attacks.masking": ("check_model", "check_results"),
    "corruptions.registry": (
        "CORRUPTIONS", "CORRUPTIONS_3D", "SEVERITIES", "corrupt", "corrupt_3d",
    ),
    "metrics.bias": ("background_bias", "context_bias", "shape_bias"),
    "metrics.bootstrap": ("Interval", "interval", "mean", "ratio", "difference", "quotient"),
    "metrics.calibration": (
        "adaptive_calibration_error", "brier_score", "classwise_calibration_error",
        "debiased_calibration_error", "expected_calibration_error", "fit_temperature",
        "negative_log_likelihood", "reliability", "restrict", "summary",
    ),
    "metrics.detection": ("detection",),
    "metrics.ood": (
        "energy", "fit_knn", "fit_mahalanobis", "fit_vim", "gen", "knn", "mahalanobis",
        "max_logit", "max_softmax", "negative_entropy", "relative_mahalanobis", "vim",
    ),
    "metrics.table": ("compare", "measure"),
    "suite": ("Sets", "answer"),
}  # fmt: skip
_PLACES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
