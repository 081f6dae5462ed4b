"""A study's stages: shots, adapters, images, trainings, robustness. `run` says in which order."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
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
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import DataConfig, Dataset, ImageSource, SourceError
from jaxsynth.data.decode import square
from jaxsynth.data.load import load_dataset
from jaxsynth.data.prompts import prompts as class_prompts
from jaxsynth.data.splits import few_shot, load_shots
from jaxsynth.data.store import ImageStore
from jaxsynth.data.views import Subset
from jaxsynth.methods.image_sets import KEPT_FILE, SHOTS_FILE
from jaxsynth.methods.scaling.config import JudgeConfig
from jaxsynth.methods.scaling.points import Point, pixels_of, pooled, views_of
from jaxsynth.robustness import suite
from jaxsynth.robustness.metrics import table
from jaxsynth.robustness.metrics.bootstrap import evaluate
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.supervised import (
    NetworkConfig,
    SupervisedConfig,
    logits_of,
    of_pixels,
    supervised_tasks,
)
from jaxsynth.tasks.supervised import planned_task as planned_points
from jaxsynth.tasks.text_to_image import (
    FinetuneConfig,
    encode_examples,
    finetune,
    planned_task,
)
from jaxsynth.training.config import aside
from jaxsynth.training.space import training_bytes
from jaxsynth.training.trainer import train_stacked
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.hf import StableDiffusion

VIEWS_FILE, MODELS_FILE = "views.json", "models.npz"
LOGITS_FILE, LABELS_FILE, FIGURES_FILE = "logits.npy", "labels.npy", "figures.json"


@dataclass(frozen=True)
class Drawing:
    """Which real images a seed may see, in the order in which sizes take them."""

    count: int
    seed: int


@stage()
def draw_real(work: Work, config: Drawing, *, data: Dataset) -> dict:
    """The real images of a seed, as lists of ids."""
    drawn = few_shot(data, config.count, config.seed)
    drawn.save(work.folder / SHOTS_FILE)
    return {"images": sum(map(len, drawn.train))}


@dataclass(frozen=True)
class Finetuning:
    """How a generator learns the first `shots` real images of each class."""

    finetune: FinetuneConfig
    shots: int
    seed: int
    dtype: str


def _adapter_bytes(
    config: Finetuning, *, shots: Artifact, data: Dataset, base: StableDiffusion
) -> int:
    train = config.finetune
    return training_bytes(planned_task(base, train, images=1).model, train)


@stage(processes="all", space=_adapter_bytes)
def learn_shots(
    work: Work, config: Finetuning, *, shots: Artifact, data: Dataset, base: StableDiffusion
) -> dict:
    """One adapter for all classes."""
    drawn = {config.seed: load_shots(shots.path / SHOTS_FILE)}
    point = Point("shots", config.seed, config.shots, 0)
    ((real, _),) = views_of([point], data, drawn, {})
    assert real is not None
    examples = encode_examples(
        base, real, class_prompts(data), crops=config.finetune.crops_per_image, seed=config.seed
    )
    state = finetune(
        base, examples, config.finetune, work.training, seed=config.seed, mesh=work.mesh,
        description=f"learn {counted(config.shots, 'shot')}",
    )  # fmt: skip
    if work.writes:
        adapter_io.save(state, work.folder)
    return {"steps": config.finetune.num_steps(len(examples))}


@dataclass(frozen=True)
class Training:
    """The points of one setting, and how each is trained."""

    points: tuple[Point, ...]
    network: NetworkConfig
    train: SupervisedConfig
    real_weight: float
    at_once: int = aside(0)


def _points_bytes(config: Training, *, data: Dataset, **_: Artifact) -> int:
    classes, points = data.num_classes, len(config.points)
    task = planned_points(config.network, config.train, images=1, longest=1, num_classes=classes)
    logits = 4 * len(data.test) * classes
    return training_bytes(task.model, config.train, count=points) + points * logits


@stage(processes="all", space=_points_bytes)
def train_points(work: Work, config: Training, *, data: Dataset, **inputs: Artifact) -> dict:
    """Every point of a setting trained, in one program, and its answers to the test images.

    Inputs: "shots<seed>", "images<seed>" and "kept<seed>" of images that were filtered.
    """
    views = _views(config.points, data, inputs)
    pool, rows, ids = pooled(views, config.network.image_size, config.real_weight)
    seeds = [point.seed for point in config.points]
    tasks = supervised_tasks(
        pool, rows, config.network, config.train, seeds=seeds, num_classes=data.num_classes
    )
    sized = config.train.sized(max(len(view.rows) for view in rows))
    models, group = [], config.at_once or len(tasks)
    for start in range(0, len(tasks), group):
        some = tasks[start : start + group]
        models += train_stacked(
            some, sized, work.training / f"{start:04d}", mesh=work.mesh,
            description=f"train {counted(len(some), 'point')}",
        )  # fmt: skip
    if not work.writes:
        return {}
    states = stack([extract(model) for model in models])
    np.savez(work.folder / MODELS_FILE, **{k: np.asarray(x) for k, x in states.arrays.items()})
    test = pixels_of(data.test, config.network.image_size)
    labels = np.asarray(data.test.labels)
    logits = np.stack([logits_of(model, test) for model in models])
    np.save(work.folder / LOGITS_FILE, logits)
    np.save(work.folder / LABELS_FILE, labels)
    listed = [asdict(point) | own for point, own in zip(config.points, ids, strict=True)]
    write_json(work.folder / VIEWS_FILE, listed)
    right = (logits.argmax(-1) == labels).mean(1)
    return {"points": len(tasks), "steps": sized.steps, "top1": float(right.mean())}


def _views(points: Sequence[Point], data: Dataset, inputs: Mapping[str, Artifact]):
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
            stores[seed] = store
            if filtered := inputs.get(f"kept{seed}"):
                stores[seed] = Subset(store, read_json(filtered.path / KEPT_FILE, list[int]))
    return views_of(points, data, shots, stores)


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
            of_pixels(model), sets, key, preprocess=partial(square, size=size), attacks=attacks,
            eps=judge.eps, corruptions=judge.corruptions, batch_size=judge.batch_size,
        )  # fmt: skip
        values = {name: evaluate(*one[:2]) for name, one in table.figures(answered).items()}
        # R_adv of a model that is never right is no number.
        values = {name: value if np.isfinite(value) else None for name, value in values.items()}
        found.append(asdict(answers.point) | {"figures": values})
    write_json(work.folder / FIGURES_FILE, found)
    return {"points": len(found)}


def load_models(folder: Path, network: NetworkConfig, num_classes: int) -> list[nnx.Module]:
    """The trained networks of a finished `train_points`, in the order of its points."""
    model = mark_trainable(network.make(num_classes, jax.random.key(0)))
    arrays = {k: jnp.asarray(x) for k, x in read_arrays(folder / MODELS_FILE).items()}
    return [load_state(model, state) for state in unstack(AdapterState(arrays, None))]


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
