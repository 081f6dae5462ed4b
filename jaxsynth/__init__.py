"""Make, adapt and judge synthetic training data in JAX.

    import jaxsynth as js

    pipeline = js.load_pipeline("tiny")
    draw = js.Generator(pipeline, ["a photo of a dog"], js.GenerateConfig(batch_size=4), seed=0)

The names below are loaded when they are first used: `import jaxsynth` does not wait for JAX.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_NAMES = {
    "AdapterChoice": "jaxsynth.adapters.registry",
    "GenerateConfig": "jaxsynth.generation.generate",
    "Generator": "jaxsynth.generation.generate",
    "ImageStore": "jaxsynth.data.store",
    "Task": "jaxsynth.training.trainer",
    "TrainingConfig": "jaxsynth.training.config",
    "add_adapter": "jaxsynth.adapters.registry:add",
    "evaluate": "jaxsynth.robustness.facade",
    "inject": "jaxsynth.adapters.inject",
    "load_classifier": "jaxsynth.weights.networks.classifiers",
    "load_clip": "jaxsynth.weights.hf",
    "load_dataset": "jaxsynth.data.load",
    "load_pipeline": "jaxsynth.weights.hf",
    "merge": "jaxsynth.adapters.inject",
    "save_classifier": "jaxsynth.weights.networks.classifiers",
    "save_clip": "jaxsynth.weights.hf",
    "save_pipeline": "jaxsynth.weights.hf",
    "train": "jaxsynth.training.trainer",
    "train_stacked": "jaxsynth.training.trainer",
    "unmerge": "jaxsynth.adapters.inject",
}
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    """The name, loaded from the room that it lives in."""
    if name not in _NAMES:
        raise AttributeError(f"module 'jaxsynth' has no attribute {name!r}")
    module, _, given = _NAMES[name].partition(":")
    return getattr(importlib.import_module(module), given or name)


def __dir__() -> list[str]:
    return sorted(__all__)
