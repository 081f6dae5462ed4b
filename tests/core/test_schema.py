"""The fields and checks of every config from source: the classes' own, and told without JAX."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from jaxsynth.cli.main import METHODS, method_module, named_values
from jaxsynth.core import schema
from jaxsynth.core.config import ConfigError, to_dataclass, to_dict
from jaxsynth.core.places import place_of
from jaxsynth.core.source import is_part
from tests.test_configs import FILES, VARIANTS

ROOT = Path(__file__).parents[2]


def leaves(config, where=""):
    """Dotted name and type of every field, with whether it has a default."""
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        name, hint = where + field.name, hints[field.name]
        required = field.default is field.default_factory is dataclasses.MISSING
        if is_part(hint):
            yield from leaves(hint, f"{name}.")
        elif field.init:
            yield name, hint, required
            for part in typing.get_args(hint):
                if is_part(part):
                    named = "NAME." if typing.get_origin(hint) is dict else ""
                    yield from leaves(part, f"{name}.{named}")


def as_text(hint):
    """A type by its names: classes and those made of their source are others, of the same name."""
    args = typing.get_args(hint)
    return f"{getattr(hint, '__name__', hint) if not args else typing.get_origin(hint)}" + (
        f"[{', '.join(map(as_text, args))}]" if args else ""
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_source_shows_the_class(method):
    real = [(name, as_text(hint), rest) for name, hint, rest in leaves(config_class(method))]
    shown = leaves(schema.config_of(METHODS[method]))
    assert [(name, as_text(hint), rest) for name, hint, rest in shown] == real
    described = schema.describe(METHODS[method], {"method": method})
    names = [name for name, *_ in real]
    assert [one.name.replace(".NAME", "") for one in described] == [
        name.replace(".NAME", "") for name in names
    ]
    assert all(one.type and one.default and one.doc for one in described)


def config_class(method):
    return method_module(method).Config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_source_gives_what_the_class_gives(path):
    for variant in VARIANTS[path.stem]:
        name, values = named_values(f"{path}:{variant}" if variant else str(path), ())
        shown = schema.check(METHODS[name], values)
        if "method" not in config_class(name).__dataclass_fields__:
            del values["method"]
        assert to_dict(shown) == to_dict(to_dataclass(config_class(name), values))


# What only the checks of the classes refuse: fields against each other, and names of parts.
CROSSED = (
    ("controlled", "ways=magic", "ways: 'magic', expected some of controlnet"),
    ("controlled", "adapter=lora2", "config.adapter: adapter 'lora2': expected one of lora, dora"),
    ("customize", "technique=svd", "technique: 'svd' is not implemented, expected one of"),
    ("customize", "generate.sampler=heun", "generate: sampler: 'heun', expected one of ddim"),
    (
        "customize", "textual_inversion.buckets.step=64",
        "textual_inversion.buckets: step: 64, but images are cut to squares; set enabled=true",
    ),
    ("datadream", "finetune.accumulate=3", "config.finetune: batch_size: 8 is not divisible by"),
    ("datadream", "classify.adapter.heads=2", "classify.adapter.heads: no such field of lora"),
    ("datadream", "finetune.rates=((,1)", "config.finetune.rates"),
    ("diffscaler", "recipes=all", "config: recipes: 'all', expected some of"),
    ("diffscaler", "pretrain.heads=7", "is not divisible by heads 7"),
    ("robustness", "corruptions.names=haze", "config.corruptions: names: 'haze': expected all"),
    ("robustness", "baseline=vgg", "baseline: expected alexnet or one of"),
    ("scaling", "generate.images_per_class=1", "images_per_class: 1, but `sizes` asks for"),
    ("tiny_base", "unet.steps_per_call=7", "is not divisible by steps_per_call = 7"),
    ("weightgen", "photos=1", "of 1 photos"),
)  # fmt: skip


@pytest.mark.parametrize(("method", "field", "words"), CROSSED)
def test_the_source_refuses_what_the_class_refuses(method, field, words):
    spec, assigned = str(ROOT / "configs" / f"{method}.py"), [tuple(field.split("=", 1))]
    told = []
    for build in (schema.check, lambda name, v: to_dataclass(config_class(method), v)):
        _, values = named_values(spec, assigned)
        if "method" not in config_class(method).__dataclass_fields__:
            del values["method"]
        with pytest.raises(ConfigError) as error:
            build(METHODS[method], values)
        told.append(str(error.value))
    assert words in told[0] and told[0] == told[1]


CONFIG = f"{ROOT / 'configs' / 'datadream.py'}:tiny"
MISTAKES = (
    ("--config.shot=4", "config.shot: no such field; did you mean shots?"),
    ("--config.finetune.epochs=1.5", "config.finetune.epochs='1.5': expected an integer"),
    ("--config.classify.augment.flip=1", "config.classify.augment.flip: no such field"),
    ("--config.seeds=4294967296", "[0]='4294967296': expected an integer, 0 to 4294967295"),
    ("--config.seeds=0,-1", "config.seeds[1]='-1': expected an integer, 0 to 4294967295"),
    (
        "--config.seeds=",
        "config.seeds='': expected a list, each an integer, 0 to 4294967295, at least",
    ),
    ("--config.seeds=0,0", "config.seeds='0,0': expected a list, each an integer, 0 to"),
    ("--config.shots=2,4,2", "each an integer, 1 or more, at least one value, none twice"),
    ("--config.modes=dest", "config.modes[0]='dest': expected one of dset, cls"),
    ("--config.generate.batch_size=0", "batch_size='0': expected an integer, 1 or more"),
    ("--config.finetune.learning_rate=nan", "learning_rate='nan': expected a number, 0 or more"),
    (
        "--config.finetune.remat=all",
        "config.finetune.remat='all': expected one of None, block, dots",
    ),
    ("--config.classify.dropout=1", "expected a number, 0 or more and below 1"),
    ("--config.data.test_fraction=20", "expected a number, above 0 and below 1"),
    ("--config.data.source=folders", "data.source='folders': expected one of nothing, digits"),
    ("--config.data.source=captions", "config.data.path: source 'captions' needs the folder of"),
    ("--config.data.path=LICENSE", "data.path: LICENSE: a file, expected the folder of the images"),
    ("--config.data.path=nowhere", "config.data.path: nowhere: no such folder"),
    ("--config.data.display_names=cat", "by --config.data.display_names.NAME=VALUE, or all by"),
    ("--config.data.display_names={'a':1}", "config.data.display_names.a=1 (int): expected a str"),
    ("--config.data.labels.a=1", "config.data.labels=a value of type dict: expected a string"),
    ("--config.data=photos", "config.data: holds several fields, set one of them"),
)
# Every field of a method that names a model, a file or a folder.
PLACES = {
    "controlled": ("base", "condition_folder"),
    "customize": (
        "base", "clip", "domain_adapter", "faces", "image_encoder", "mask_folder", "motion",
        "textual_inversion.templates",
    ),
    "datadream": ("base", "captions", "clip"),
    "diffscaler": ("base", "features", "vae"),
    "robustness": ("sets.classes", *(f"sets.{part}.{name}" for part in (
        "background", "clean", "conflict", "context"
    ) for name in ("class_map", "depth", "files", "labels"))),
    "scaling": ("backbone", "base", "clip"),
    "tiny_base": (),
    "weightgen": ("concepts.path", "edits.model", "text"),
}  # fmt: skip
# Those of parts that have names, and what else a field needs to be read.
NAMED_PLACES = (
    ("controlled", "base"),
    ("controlled", "condition_folder"),
    ("customize", "base"),
    ("customize", "clip"),
    ("customize", "textual_inversion.templates"),
    ("datadream", "base"),
    ("datadream", "clip"),
    ("datadream", "captions"),
    ("datadream", "students.mine.checkpoint", "recipes.mine.student=mine"),
    ("datadream", "sets.mine.pool", "sets.mine.kind=retrieved"),
    ("datadream", "sets.mine.prompts.templates"),
    ("datadream", "sets.mine.prompts.captions", "sets.mine.prompts.weights.caption=1"),
    ("diffscaler", "base"),
    ("diffscaler", "vae"),
    ("diffscaler", "features"),
    ("diffscaler", "condition_folders.depth"),
    ("robustness", "models.mine.clip"),
    ("robustness", "models.mine.checkpoint"),
    ("robustness", "models.mine.head", "models.mine.checkpoint=tiny/clip"),
    ("robustness", "models.mine.preprocessing", "models.mine.checkpoint=tiny/clip"),
    ("robustness", "models.mine.templates"),
    ("robustness", "models.mine.adapter"),
    ("scaling", "base"),
    ("scaling", "clip"),
    ("scaling", "backbone"),
    ("weightgen", "text"),
    ("weightgen", "concepts.path", "concepts.source=file"),
    ("weightgen", "edits.model", "edits.kind=diffusion"),
)


@pytest.mark.parametrize("method", METHODS)
def test_fields_that_name_models_and_files(method):
    shown = schema.config_of(METHODS[method])
    found = [name for name, hint, _ in leaves(shown) if place_of(hint) and ".NAME" not in name]
    own = [name for name in found if "NAME." not in name]
    assert sorted(own) == sorted(PLACES[method])
    for name in found:
        ending = name.rpartition("NAME.")[2]
        assert own.count(name) or any(
            one == method and field.endswith(ending) for one, field, *_ in NAMED_PLACES
        ), name


@pytest.mark.heavy
def test_fields_and_mistakes_are_told_without_jax(tmp_path):
    commands = [
        ["fields", CONFIG, "--config.generate.sampler=ddim"],
        ["run", "--help", f"--config={CONFIG}"],
        ["plan", "-h", "--config", CONFIG],
    ]
    mistakes = [(CONFIG, field, words) for field, words in MISTAKES]
    mistakes += [
        (str(ROOT / "configs" / f"{method}.py"), f"--config.{field}", words)
        for method, field, words in CROSSED
    ]
    mistakes += [
        (
            str(ROOT / "configs" / f"{method}.py"),
            [f"--config.{field}=tinny", *(f"--config.{one}" for one in others)],
            f"config.{field}: ",
        )
        for method, field, *others in NAMED_PLACES
    ]
    commands += [
        ["run", f"--config={spec}", f"--workdir={tmp_path / 'w'}"]
        + (given if isinstance(given, list) else [given])
        for spec, given, _ in mistakes
    ]
    code = (
        "import sys; sys.modules['jax'] = None; from jaxsynth.cli.main import main\n"
        + "\n".join(f"main({command!r})" for command in commands)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.count("shots: tuple[int 1 or more, ...] = (16,)\n    ") == len(commands[:3])
    assert done.stdout.count("finetune.adapter: registry.AdapterChoice | None = ") == 3
    assert done.stdout.count("generate.sampler: str = ddim\n") == 1
    told = done.stderr.strip().splitlines()
    assert len(told) == len(mistakes)
    for line, (_, _, words) in zip(told, mistakes, strict=True):
        assert words in line
        assert "tinny" not in line or "no such f" in line, line
    assert not (tmp_path / "w").exists()
