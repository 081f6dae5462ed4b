"""Every field of every method's config decides some stage's identity, or says why it does not.

Stages are recorded and not built. A field is changed to another valid value, and the identities of
all stages (config slice, inputs' digests) are compared with those of the unchanged run.
"""

import dataclasses
import hashlib
import importlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from jaxsynth.cli.main import METHODS
from jaxsynth.core.config import load_config, override, to_dataclass, to_dict
from jaxsynth.core.errors import UserError
from jaxsynth.core.records import is_identity, to_json
from jaxsynth.methods.customize.config import TECHNIQUES
from jaxsynth.models.diffusion.motion import MotionModules
from jaxsynth.runs import sources
from jaxsynth.runs import stage as stages
from jaxsynth.runs.stage import Artifact
from jaxsynth.tasks.motion import AnimateDiffConfig
from jaxsynth.weights.adapters.motion import write_motion
from jaxsynth.weights.hf import describe_pipeline
from tests.methods.small_base import random_network, write_classifier

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"

# What a smoke config leaves out, so that its fields can be changed.
GIVEN = {
    "tiny_base": ("corpus.photos.source=digits", "corpus.photos.class_names=()"),
    "datadream": (
        "modes=dset,cls,loft,chimera", "validation_fraction=0.5", "shots=2",
        "sets.words.kind=prompts",
        "sets.photos.kind=retrieved", "sets.edited.kind=edited", "recipes.all.sets.edited=1",
        "recipes.all.sets.words=1", "recipes.all.sets.photos=1",
        "recipes.all.keep.agreement=true", "students.own.checkpoint={classifier}",
        "recipes.taught.student=own", "recipes.taught.sets.dset=1",
    ),
}  # fmt: skip
# Other values of fields whose neighbors on the number line are no valid ones.
OTHERS: dict[str, tuple[Any, ...]] = {
    "optimizer": ("adam", "sgd"),
    "schedule": ("linear", "constant", "cosine"),
    "decay_on": ("matrices", "all"),
    "remat": ("block",),
    "precision": ("highest",),
    "dtype": ("bfloat16",),
    "sampler": ("ddim", "euler"),
    "rates": ((("lora_B", 2.0),), (("kernel", 2.0),), {"adapter": (1e-3,), "whole": (1e-4,)}),
    "decays": ((("lora_B", 2.0),),),
    "ema_decay": (0.9, 0.5),
    "accumulate": (2,),
    "modes": (("cls",),),
    "mode": ("paper",),
    "beta_schedule": ("scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "loss": ("vanilla", "lsgan"),
    "per": ("array", "value", "group"),
    "residual": ("none", "mean", "ridge"),
    "canonical": ("svd", "none"),
    "share": ("none", "words"),
    "baseline": ("original", ""),
    "negative_prompt": ("blurred",),
    "template": ("a drawing of a {}",),
    "train_on": ("mixed_rand", "original"),
    "retention": ({"images": 8},),
    "test_fraction": (0.5,),
    "class_names": (("1", "7"), ("A", "B")),
    "display_names": ({"1": "uno", "A": "letter"},),
    "train_split": ("other",),
    "test_split": ("other",),
    "test_path": ("elsewhere",),
    "labels": ("labels.csv",),
    "files": ("files.txt",),
    "depth": ("depth",),
    "student": ("own", ""),
    "class_map": ("map.json",),
    "classes": ("classes.json",),
    "kinds": (("fog",),),
    "split": ("train",),
    "kind": ("edges", "segmentation"),
    "image_size": (64,),
    "condition_folder": ("maps",),
    "templates": ("imagenet7",),
    "preprocessing": ("imagenet",),
    "adapter": ("dora", "lokr"),
    "technique": ("lora", "dreambooth"),
    "projection": ("resampler",),
    "prompts": (("a drawing",),),
    "word": ("plant",),
    "token": ("<other>",),
    "initializer": ("red",),
    "identifier": ("zwx",),
    "unet_targets": (("to_q",),),
    "text_targets": (("q_proj",),),
    "shifted": ({"x": {"source": "drawn"}},),
    "ood": ({"x": {"source": "drawn"}},),
    "corrupted": ({"x": {"source": "drawn"}},),
    "weights": ({"name": 1.0},),
    "clone_source": ("prompts",),
    "attacks": (("PGD",),),
    "learns": ("norms",),
    "judge": ("shots",),
    "query": ("shots",),
    "by": ("dset",),
    "sets": ({"words": 1.0},),
    "classify": ({"label_smoothing": 0.5},),
    "space": ("features",),
    "practice": (("adapted",),),
    "family": ("resnet",),
    "version": ("v1",),
    "norm": ("all",),
    "depths": ((1,),),
}
# Fields that no stage of these runs reads, and why that is right.
EXEMPT = {
    "method": "the config file decides it",
    "name": "of a data set: decides nothing but its title and default template",
    "path": "data and weights are identified by content",
    "base": "weights are identified by content",
    "clip": "weights are identified by content",
    "image_encoder": "weights are identified by content",
    "motion": "motion modules are identified by content",
    "domain_adapter": "an adapter is identified by content",
    "vae": "weights are identified by content",
    "text": "weights are identified by content",
    "pool": "photos are identified by content",
    "features": "weights are identified by content",
    "backbone": "weights are identified by content",
    "checkpoint": "weights are identified by content",
    "head": "weights are identified by content",
    "source": "which data: identified by content",
    "url": "a server",
    "model": "a server's model, or weights by content",
    "raw_names": "only where a class's name is not what it is called in prompts",
}
# The same for single fields.
EXEMPT_HERE = {
    ("controlled", "train.learning_rate"): "`rates` says which are tried",
    ("diffscaler", "train.learning_rate"): "`rates` says which are tried",
    ("diffscaler", "base_data.printed.template"): "a class-conditional network reads no text",
}

PROMPT_FILES = ("templates", "hypernyms", "places", "captions", "contexts")
# Fields that these small runs leave empty, or whose other values need files.
UNTRIED = {
    "datadream": {
        # Files of prompts, and prompts of a set that has none.
        *(
            f"sets.{name}.prompts.{field}"
            for name in ("photos", "edited")
            for field in ("weights", *PROMPT_FILES)
        ),
        *(f"sets.words.prompts.{name}" for name in PROMPT_FILES),
        "captions",
    },
    "controlled": {"condition_folder"},  # maps on disk
    "customize": {"mask_folder", "faces"},
    "diffscaler": {
        "mirror", "study", "recipes", "sets_recipe", "sets_steps", "draw", "conditions",
        "condition_folders",
    },
    "scaling": {
        # Files of prompts; and colors, which want a jitter without hue beside them.
        *(
            f"sources.{name}.prompts.{file}"
            for name in ("prompts", "adapted")
            for file in PROMPT_FILES
        ),
        "train.augment.jitter_p", "clones.synclr.augment.jitter_p",
    },
    "weightgen": {
        "edits.how.guidance_scale", "edits.how.image_guidance_scale",
        "edits.how.num_inference_steps", "edits.how.sampler", "edits.how.negative_prompt",
        "edits.how.batch_size", "editor.discriminator.norm", "editor.pix2pix.norm",
    },
}  # fmt: skip


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The dotted paths of a config's values."""
    found = []
    for field in dataclasses.fields(value):
        inner, own = getattr(value, field.name), (*path, field.name)
        if dataclasses.is_dataclass(inner) and not hasattr(inner, "schema"):
            found += leaves(inner, own)
        elif isinstance(inner, dict) and any(map(dataclasses.is_dataclass, inner.values())):
            for key, item in inner.items():
                found += leaves(item, (*own, key))
        else:
            found.append(own)
    return found


def field_of(value: Any, path: tuple[str, ...]) -> dataclasses.Field | None:
    """The field at a path, None below a dict's key."""
    for name in path[:-1]:
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    if isinstance(value, dict):
        return None
    return next(f for f in dataclasses.fields(value) if f.name == path[-1])


def get(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def changed(config: Any, path: tuple[str, ...], new: Any) -> Any:
    """The config with another value at a path; ConfigError where it has no such value."""
    values = inner = to_dict(config)
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to_dict(new)
    return to_dataclass(type(config), values)


def others(name: str, old: Any) -> list[Any]:
    """Other values to try for a field."""
    found = [other for other in OTHERS.get(name, ()) if other != old]
    if isinstance(old, bool):
        return [*found, not old]
    if isinstance(old, int):
        return [*found, old + 1, old * 2, old - 1]
    if isinstance(old, float):
        return [*found, old * 0.5 + 0.07, old + 1.0, old * 0.5]
    if isinstance(old, str):
        return found
    if isinstance(old, tuple) and old:
        shorter = [old[:-1]] if len(old) > 1 else []
        same = [(*old[:-1], x) for x in others(name, old[-1])] if name not in OTHERS else []
        return [*found, *shorter, *same]
    if old is None:
        return [*found, 1.0, 1]
    return found


class Recorded(dict):
    """Counts of a stage that was not built: any score is the same."""

    def __missing__(self, key: str) -> float:
        return 1.0


@pytest.fixture
def identities(monkeypatch, tmp_path):
    """`identities(module, config)`: each stage's identity, by its folder."""
    found: dict[str, Any] = {}

    def record(name, folder, config, inputs, build, *, stage="", format=1, **_):
        wanted = {
            "stage": stage,
            "format": format,
            "config": to_json(config, identity=True),
            "inputs": {key: given.digest for key, given in inputs.items()},
        }
        text = json.dumps(wanted, sort_keys=True)
        found[str(folder)] = text
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Artifact(Path(folder), {"digest": digest, "counts": Recorded(), "files": {}})

    monkeypatch.setattr(stages, "run_stage", record)

    def call(module, config) -> dict[str, Any]:
        found.clear()
        module.run(config, tmp_path)
        return dict(found)

    return call


def loaded_once(monkeypatch, module) -> None:
    """Networks are loaded once for all runs of the test, and no page is made."""
    seen = [
        module,
        sources,
        *(getattr(module, x) for x in ("stages", "inputs", "runs") if hasattr(module, x)),
    ]
    for one in seen:
        for name in dir(one):
            if name.startswith(("load_", "read_motion")) and callable(getattr(one, name)):
                monkeypatch.setattr(one, name, cached_by_arguments(getattr(one, name)))
    if hasattr(module, "report"):
        monkeypatch.setattr(module, "report", lambda folder: folder)


def cached_by_arguments(function):
    kept: dict[str, Any] = {}

    def call(*args, **kwargs):
        key = repr((args, sorted(kwargs.items())))
        if key not in kept:
            kept[key] = function(*args, **kwargs)
        return kept[key]

    return call


@cache
def motion_modules(base: str) -> str:
    """A folder of motion modules for a base, random ones."""
    shape = describe_pipeline(base).unet.config
    config = AnimateDiffConfig(frames=2).modules_config(shape)
    folder = tempfile.mkdtemp()
    return str(write_motion(folder, random_network(MotionModules, config, 0)))


@cache
def smoke(method: str, variant: str = "") -> Any:
    module = importlib.import_module(METHODS[method])
    values = load_config(f"{CONFIGS / method}.py:smoke{variant}")
    given = [tuple(text.split("=", 1)) for text in GIVEN.get(method, ())]
    given = [(name, value.format(classifier=classifier())) for name, value in given]
    values = override(values, given)
    if "motion" in values:
        values["motion"] = motion_modules(values["base"])
    if "method" not in module.Config.__dataclass_fields__:
        values.pop("method", None)
    return to_dataclass(module.Config, values)


@cache
def classifier() -> Path:
    return write_classifier(Path(tempfile.mkdtemp()))


# Methods whose config has other fields in each variant.
VARIANTS = {"customize": tuple(f",technique={x}" for x in TECHNIQUES)}


@pytest.mark.parametrize(
    ("method", "variant"),
    [(name, variant) for name in sorted(METHODS) for variant in VARIANTS.get(name, ("",))],
)
def test_every_field_decides_a_stage_or_says_why_not(method, variant, identities, monkeypatch):
    module = importlib.import_module(METHODS[method])
    loaded_once(monkeypatch, module)
    config = smoke(method, variant)
    before = identities(module, config)
    assert before, "no stage was recorded"
    forgotten, untried = [], {}
    for path in leaves(config):
        name, field = path[-1], field_of(config, path)
        if (method, ".".join(path)) in EXEMPT_HERE:
            continue
        if name in EXEMPT or (field is not None and not is_identity(field)):
            continue
        refusals = []
        for other in others(name, get(config, path)):
            if other == get(config, path):
                continue
            try:
                after = identities(module, changed(config, path, other))
            except (ValueError, UserError) as error:
                refusals.append(str(error))
                continue
            if after == before:
                forgotten.append(".".join(path))
            break
        else:  # refused by name, or not tried
            if not any(name in refusal for refusal in refusals):
                untried[".".join(path)] = refusals
    assert not forgotten, f"no stage depends on {forgotten}"
    unknown = {path: why for path, why in untried.items() if path not in UNTRIED.get(method, ())}
    assert not unknown, f"no other value was valid: {unknown}"
