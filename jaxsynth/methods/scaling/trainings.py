"""A study's trainings: the points of a setting together, their answers and their robustness."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxsynth.adapters.inject import (
    AdapterState,
    extract,
    load_state,
    mark_trainable,
    stack,
    unstack,
)
from jaxsynth.core.arrays import read_array, read_arrays
from jaxsynth.core.console import console
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import DataConfig, Dataset, ImageSource, SourceError
from jaxsynth.data.decode import square, squares
from jaxsynth.data.load import load_dataset
from jaxsynth.data.splits import load_shots
from jaxsynth.data.store import ImageStore
from jaxsynth.data.views import Subset
from jaxsynth.methods.image_sets import KEPT_FILE, SHOTS_FILE
from jaxsynth.methods.scaling.config import JudgeConfig
from jaxsynth.methods.scaling.points import (
    Point,
    Views,
    ids_of,
    pooled,
    streamed,
    views_of,
)
from jaxsynth.robustness import suite
from jaxsynth.robustness.metrics import table
from jaxsynth.robustness.metrics.bootstrap import evaluate
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.networks import (
    NetworkConfig,
    logits_of,
    of_pixels,
    statistics_of,
    with_statistics,
)
from jaxsynth.tasks.supervised import (
    SupervisedConfig,
    planned_task,
    streamed_tasks,
    supervised_tasks,
    train_tasks,
)
from jaxsynth.training.config import aside
from jaxsynth.training.loop import NonFiniteError
from jaxsynth.training.space import training_bytes
from jaxsynth.weights.networks.classifiers import Classifier

VIEWS_FILE, MODELS_FILE = "views.json", "models.npz"
LOGITS_FILE, LABELS_FILE, FIGURES_FILE = "logits.npy", "labels.npy", "figures.json"
FAILED_FILE = "failed.json"


def devices_of(work: Work) -> int:
    """How many devices a stage's time counts for."""
    return work.mesh.size if work.mesh is not None else 1


def opened(images: Artifact, kept: Artifact | None) -> ImageSource:
    """A store, or those of its images that were kept."""
    store = ImageStore(images.path)
    return store if kept is None else Subset(store, read_json(kept.path / KEPT_FILE, list[int]))


@dataclass(frozen=True)
class Training:
    """The points of one setting, and how each is trained."""

    points: tuple[Point, ...]
    network: NetworkConfig
    train: SupervisedConfig
    real_weight: float
    at_once: int = aside(0)


def _points_bytes(
    config: Training, *, data: Dataset, backbone: Classifier | None = None, **_: Artifact
) -> int:
    classes, points = data.num_classes, len(config.points)
    task = planned_task(config.network, config.train, images=1, longest=1, num_classes=classes)
    logits = 4 * len(data.test) * classes
    count = 0 if config.train.streamed else points
    return training_bytes(task.model, config.train, count=count) + points * logits


@stage(processes="all", space=_points_bytes)
def train_points(
    work: Work,
    config: Training,
    *,
    data: Dataset,
    backbone: Classifier | None = None,
    **inputs: Artifact,
) -> dict:
    """Every point of a setting trained, in one program, and its answers to the test images.

    Inputs: "shots<seed>", "images<seed>" and "kept<seed>" of images that were filtered or chosen. A
    point that a class has too few images for, or whose training is not finite, is written down.
    """
    views, failed = _views(config.points, data, inputs)
    if not views:
        raise SourceError(next(iter(failed.values())))
    points = list(views)
    sized = config.train.sized(max(_images(view) for view in views.values()))
    given = {
        "seeds": [point.seed for point in points],
        "num_classes": data.num_classes,
        "backbone": backbone,
    }
    if config.train.streamed:
        sources = [streamed(view, config.real_weight) for view in views.values()]
        tasks = streamed_tasks(sources, config.network, config.train, **given)
    else:
        pool, rows = pooled([*views.values()], config.network.image_size, config.real_weight)
        tasks = supervised_tasks(pool, rows, config.network, config.train, **given)
    trained = train_tasks(
        tasks, sized, work.training, at_once=config.at_once, mesh=work.mesh,
        description=f"train {counted(len(tasks), 'point')}",
    )  # fmt: skip
    failed |= {points[i]: why for i, why in trained.failed.items()}
    for point, why in failed.items():
        console.print(f"{point.setting}: {point.name}: failed: {why}", markup=False)
    if not trained.models:
        raise NonFiniteError(next(iter(trained.failed.values())))
    if not work.writes:
        return {}
    done = [points[i] for i in sorted(trained.models)]
    models = [trained.models[i] for i in sorted(trained.models)]
    _save_models(work.folder, models)
    test = squares(data.test, config.network.image_size)
    labels = np.asarray(data.test.labels)
    logits = np.stack([logits_of(model, config.network, test) for model in models])
    np.save(work.folder / LOGITS_FILE, logits)
    np.save(work.folder / LABELS_FILE, labels)
    write_json(work.folder / VIEWS_FILE, [asdict(point) | ids_of(views[point]) for point in done])
    write_json(work.folder / FAILED_FILE, {point.name: why for point, why in failed.items()})
    right = (logits.argmax(-1) == labels).mean(1)
    return {
        "points": len(done),
        "failed": len(failed),
        "steps": sized.steps,
        "top1": float(right.mean()),
        "devices": devices_of(work),
    }


def _images(view: Views) -> int:
    return sum(len(own) for own in view if own is not None)


def _views(
    points: Sequence[Point], data: Dataset, inputs: Mapping[str, Artifact]
) -> tuple[dict[Point, Views], dict[Point, str]]:
    shots = {
        int(name.removeprefix("shots")): load_shots(given.path / SHOTS_FILE)
        for name, given in inputs.items()
        if name.startswith("shots")
    }
    stores: dict[int, ImageSource] = {}
    for name, given in inputs.items():
        if name.startswith("images"):
            store = ImageStore(given.path)
            if store.class_names != data.class_names:
                raise SourceError(
                    f"{given.path}: images of classes {list(store.class_names)}, the data set has "
                    f"{list(data.class_names)}"
                )
            seed = int(name.removeprefix("images"))
            stores[seed] = opened(given, inputs.get(f"kept{seed}"))
    return views_of(points, data, shots, stores)


def failures_of(folder: Path) -> dict[str, str]:
    """Why points of a finished `train_points` are missing, by their names; {} of none."""
    return read_json(folder / FAILED_FILE, dict[str, str], optional=True)


@dataclass(frozen=True)
class Judging:
    """What trained points are asked besides the clean test images."""

    judge: JudgeConfig
    network: NetworkConfig
    seed: int


@stage()
def judge_points(work: Work, config: Judging, *, data: Dataset, training: Artifact) -> dict:
    """Every figure of the robustness suite for the points of the sizes that are judged.

    Images of no class are drawn textures. The figures' spread is that of the seeds: no bootstrap.
    """
    judge, key = config.judge, jax.random.key(config.seed)
    size = config.network.image_size
    strange = load_dataset(
        DataConfig(source="builtin", name="textures", image_size=size, images_per_class=100)
    )
    sets = suite.Sets(clean=data.test, ood={"textures": strange.train})
    models = load_models(training.path, config.network, data.num_classes)
    attacks = {name: suite.gradient_attacks()[name] for name in judge.attacks}
    found = []
    for answers, model in zip(answers_of(training.path), models, strict=True):
        if answers.point.size not in judge.sizes:
            continue
        answered = suite.answer(
            of_pixels(model, config.network), sets, key,
            preprocess=partial(square, size=size), attacks=attacks, eps=judge.eps,
            corruptions=judge.corruptions, batch_size=judge.batch_size,
        )  # fmt: skip
        values = {name: evaluate(*one[:2]) for name, one in table.figures(answered).items()}
        # R_adv of a model that is never right is no number.
        values = {name: value if np.isfinite(value) else None for name, value in values.items()}
        found.append(asdict(answers.point) | {"figures": values})
    write_json(work.folder / FIGURES_FILE, found)
    return {"points": len(found)}


def _save_models(folder: Path, models: Sequence[nnx.Module]) -> None:
    states = stack([extract(model) for model in models]).arrays
    own = [statistics_of(model) for model in models]
    states |= {name: np.stack([each[name] for each in own]) for name in own[0]}
    np.savez(folder / MODELS_FILE, **{k: np.asarray(x) for k, x in states.items()})


def load_models(folder: Path, network: NetworkConfig, num_classes: int) -> list[nnx.Module]:
    """The trained networks of a finished `train_points`, in the order of its points."""
    model = mark_trainable(network.make(num_classes, jax.random.key(0)))
    arrays, names = read_arrays(folder / MODELS_FILE), statistics_of(model)
    states = {k: jax.device_put(x) for k, x in arrays.items() if k not in names}
    return [
        with_statistics(load_state(model, state), {name: arrays[name][i] for name in names})
        for i, state in enumerate(unstack(AdapterState(states, None)))
    ]


@dataclass(frozen=True)
class Answers:
    """A point with its errors: whether each test image is told wrong."""

    point: Point
    wrong: np.ndarray

    @property
    def error(self) -> float:
        return float(self.wrong.mean())


def answers_of(folder: Path) -> list[Answers]:
    """What the points of a finished `train_points` answered."""
    logits, labels = read_array(folder / LOGITS_FILE), read_array(folder / LABELS_FILE)
    listed = read_json(folder / VIEWS_FILE, list)
    points = [Point(*(entry[name] for name in Point.__dataclass_fields__)) for entry in listed]
    return [
        Answers(point, own.argmax(-1) != labels) for point, own in zip(points, logits, strict=True)
    ]
