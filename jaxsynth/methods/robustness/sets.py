"""The sets of a robustness run: drawn here, or published ones from folders and TFDS.

With a drawn clean set every other set is drawn too. With a real one, the others are those that are
named: shifted sets (ImageNet-R and the like), sets of no class, bias sets, and sets that come
corrupted. All labels are places among the model's classes, which a file lists (`classes`), or which
are the clean set's own.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import numpy as np

from jaxsynth.core.limits import Natural, OneOf, check_limits
from jaxsynth.core.places import MaybeFile, MaybeFolder
from jaxsynth.data import robustness_sets as published
from jaxsynth.data.dataset import DataConfig, ImageSource, SourceError
from jaxsynth.data.load import load_dataset
from jaxsynth.data.procedural.shapes import SHAPES
from jaxsynth.data.robustness_sets import LabelSpace
from jaxsynth.data.sources.tfds import load_split
from jaxsynth.data.views import Subset
from jaxsynth.robustness import bias_sets
from jaxsynth.robustness.suite import Sets

SOURCES = ("", "drawn", "folder", "tfds", "cifar10")
# ImageNet's, of which FOCUS's groups are made.
_IMAGENET = 1000


@dataclass(frozen=True)
class SetConfig:
    """One set. source: "folder", "tfds", "cifar10" (its binary version; corrupted: CIFAR-10-C), or
    "drawn"; "" is drawn where the clean set is, and left out elsewhere.

    path: its folder; TFDS's data directory. name, split: of TFDS. labels: for class folders "",
    for images side by side the file of their classes. files: a list of those to take of images of
    no class. depth: a folder of depth maps of the clean images (grey, white is near), for 3D
    corruptions. class_map: JSON of the model's classes that are each of a bias set's. kinds: of a
    set that comes corrupted the corruptions to take; () takes all there are. count: so many images,
    evenly spread; 0 takes all.
    """

    source: Annotated[str, OneOf(*SOURCES)] = ""
    path: str = ""
    name: str = ""
    split: str = "test"
    labels: MaybeFile = ""
    files: MaybeFile = ""
    depth: MaybeFolder = ""
    class_map: MaybeFile = ""
    kinds: tuple[str, ...] = ()
    count: Natural = 0

    def __post_init__(self):
        check_limits(self)
        if self.path and not self.source:
            raise ValueError("source: there is a path; expected folder, tfds or cifar10")
        if self.source in ("", "drawn"):
            for field_ in fields(self):
                if field_.name != "source" and getattr(self, field_.name) != field_.default:
                    kind = "a drawn set" if self.source else "a set without a source"
                    raise ValueError(f"{field_.name}: of a set in files, but this is {kind}")

    @property
    def folder(self) -> Path:
        if not self.path:
            raise SourceError(f"sets: a set of source {self.source!r} needs its path")
        return _path(self.path)


@dataclass(frozen=True)
class SetsConfig:
    """Every set of a run. `classes`: a file of the model's classes in their order; "" takes the
    clean set's class folders in sorted order."""

    clean: SetConfig = field(default_factory=lambda: SetConfig("drawn"))
    shifted: dict[str, SetConfig] = field(default_factory=dict)
    ood: dict[str, SetConfig] = field(default_factory=dict)
    context: SetConfig = field(default_factory=SetConfig)
    conflict: SetConfig = field(default_factory=SetConfig)
    background: SetConfig = field(default_factory=SetConfig)
    corrupted: dict[str, SetConfig] = field(default_factory=dict)
    classes: MaybeFile = ""

    def __post_init__(self):
        if not self.clean.source:
            raise ValueError("clean: expected a source")
        if self.drawn:
            for name in ("shifted", "ood", "corrupted", "classes"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}: of sets in files, but the clean set is drawn, and so are the "
                        "others, of its classes"
                    )
            for name in ("context", "conflict", "background"):
                one = getattr(self, name)
                if one.source not in ("", "drawn"):
                    raise ValueError(
                        f"{name}: from {one.source}, but the clean set is drawn, of other classes"
                    )

    @property
    def drawn(self) -> bool:
        return self.clean.source == "drawn"


@dataclass(frozen=True)
class Loaded:
    """The sets, and the model's classes in words, for prompts."""

    sets: Sets
    words: tuple[str, ...]


def load_sets(config: SetsConfig, *, size: int, per_class: int, seed: int) -> Loaded:
    """The sets of a run. `size`, `per_class` and `seed` are for drawn ones.

    Real ones are read lazily, at the size their files have.
    """
    if config.drawn:
        return Loaded(_drawn(size, per_class, seed), SHAPES)
    space = published.read_label_space(_path(config.classes)) if config.classes else None
    clean, space, _ = _labelled(config.clean, space, "clean")
    shifted, subsets = {}, {}
    for name, one in config.shifted.items():
        shifted[name], _, classes = _labelled(one, space, f"shifted.{name}")
        if len(classes) < len(space.names):
            subsets[name] = classes.tolist()
    context = _bias(config.context, "context", bias_sets.read_focus)
    conflict = _bias(config.conflict, "conflict", bias_sets.read_conflicts)
    background = _bias(config.background, "background", bias_sets.read_backgrounds)
    maps = {
        name: _class_map(name, getattr(config, name), found.names, space)
        for name, found in (
            ("context", context), ("conflict", conflict), ("background", background)
        )
        if found is not None
    }  # fmt: skip
    sets = Sets(
        clean=clean,
        shifted=shifted,
        ood={name: _unlabelled(one, f"ood.{name}") for name, one in config.ood.items()},
        context=context,
        conflict=conflict,
        background=background,
        class_maps=maps,
        subsets=subsets,
        depth_folder=_path(config.clean.depth) if config.clean.depth else None,
        corrupted=_corrupted(config.corrupted, clean, space),
    )
    return Loaded(sets, space.words)


def _drawn(size: int, per_class: int, seed: int) -> Sets:
    background = bias_sets.drawn_backgrounds(per_class, size, seed)
    # An eighth of the ways to be uncommon, and of the pairs of shape and texture.
    few = max(1, per_class // 8)
    strange = load_dataset(
        DataConfig(
            source="builtin", name="textures", image_size=size, split_seed=seed,
            images_per_class=2 * per_class,
        )
    )  # fmt: skip
    return Sets(
        clean=background.original,
        shifted={"mixed_rand": background.mixed_rand},
        ood={"textures": strange.train},
        context=bias_sets.drawn_contexts(few, size, seed),
        conflict=bias_sets.drawn_conflicts(few, size, seed),
        background=background,
    )


def _labelled(
    one: SetConfig, space: LabelSpace | None, what: str
) -> tuple[ImageSource, LabelSpace, np.ndarray]:
    """A source whose labels are places in the space, the space, and the places that it has."""
    if one.source == "tfds":
        source, names = load_split(_of_tfds(one), one.split)
        if space is None:
            space = LabelSpace(names, names)
        used = np.unique(source.labels)
        places = np.full(len(names), -1, np.int32)
        places[used] = space.places([names[i] for i in used], f"{what}: {one.name}")
        source = Subset(source, np.arange(len(source)), places[source.labels])
    elif one.source == "cifar10":
        source, own = published.read_cifar10(one.folder)
        if space is not None:
            places = space.places(own.names, f"{what}: {one.path}")
            source = Subset(source, np.arange(len(source)), places[source.labels])
        space = space or own
    elif one.source == "folder":
        labels = _path(one.labels) if one.labels else None
        source, space = published.read_labelled(one.folder, space, labels=labels)
    else:
        raise SourceError(f"sets.{what}: expected a source: folder, tfds or cifar10")
    classes = np.unique(source.labels)
    return published.evenly(source, one.count), space, classes


def _unlabelled(one: SetConfig, what: str) -> ImageSource:
    if one.source == "tfds":
        source, _ = load_split(_of_tfds(one), one.split)
    elif one.source == "folder":
        files = _path(one.files) if one.files else None
        source = published.read_images(one.folder, files=files)
    else:
        raise SourceError(f"sets.{what}: expected a source: folder or tfds")
    return published.evenly(source, one.count)


def _bias(one: SetConfig, what: str, read):
    if not one.source:
        return None
    if one.source != "folder":
        raise SourceError(f"sets.{what}: source {one.source!r}, expected folder")
    return read(one.folder)


def _class_map(name: str, one: SetConfig, names, space: LabelSpace):
    """Which of the model's classes are each of a bias set's."""
    if one.class_map:
        return bias_sets.read_class_map(_path(one.class_map), names)
    if name == "context" and len(space.names) == _IMAGENET:
        return bias_sets.FOCUS_CLASSES
    if set(names) <= set(space.names):
        return {k: (int(p),) for k, p in zip(names, space.places(names, name), strict=True)}
    raise SourceError(
        f"sets.{name}.class_map: missing: the set's classes {list(names[:3])}, ... are none of the "
        f"model's {len(space.names)}; give JSON of those that are each"
    )


def _corrupted(
    sets: dict[str, SetConfig], clean: ImageSource, space: LabelSpace
) -> dict[str, list[ImageSource]]:
    found = {}
    for name, one in sets.items():
        if one.source == "cifar10":
            read = published.read_cifar10_c(one.folder, clean, space, one.kinds)
        elif one.source == "folder":
            read = published.read_imagenet_c(one.folder, clean, space, one.kinds)
        else:
            raise SourceError(
                f"sets.corrupted.{name}: source {one.source!r}, expected folder (as ImageNet-C) or "
                "cifar10"
            )
        twice = sorted(set(found) & set(read))
        if twice:
            raise SourceError(f"sets.corrupted.{name}: {twice} are in a set before it too")
        found |= read
    return found


def _of_tfds(one: SetConfig) -> DataConfig:
    return DataConfig(source="tfds", name=one.name, path=one.path)


def _path(text: str) -> Path:
    return Path(text).expanduser()
