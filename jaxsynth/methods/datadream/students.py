"""Students: classifiers of any checkpoint, trained whole on a run's images in CLIP's place.

What a synthetic set is worth to the network that somebody will really use (a ResNet, a ConvNeXt, a
DINOv2), and not to CLIP alone, which knows the classes' names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxsynth.core.io import write_json
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.decode import squares
from jaxsynth.data.splits import load_shots
from jaxsynth.data.views import Subset, shared
from jaxsynth.methods.datadream.stages import shared_sets
from jaxsynth.methods.image_sets import SHOTS_FILE
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.clip_predictions import scores
from jaxsynth.tasks.networks import CheckpointNetwork, logits_of
from jaxsynth.tasks.supervised import (
    Pool,
    SupervisedConfig,
    View,
    planned_task,
    streamed_tasks,
    supervised_tasks,
    train_tasks,
)
from jaxsynth.training.loop import NonFiniteError
from jaxsynth.training.space import training_bytes
from jaxsynth.weights.networks.classifiers import Classifier

# Test images that are in memory at a time.
_AT_ONCE = 1024


@dataclass(frozen=True)
class Teaching:
    """How a student is trained. An epoch is `images` images, as many as a generated set holds.

    `real_weight` is the shots' weight in the loss beside `shares` of sets of images, 1 less it
    theirs.
    """

    train: SupervisedConfig
    real_weight: float
    images: int
    seed: int
    shares: dict[str, float] = field(default_factory=dict)


def _student_bytes(config: Teaching, *, data: Dataset, student: Classifier, **_: object) -> int:
    logits, network = 4 * len(data.test) * data.num_classes, CheckpointNetwork.of(student)
    task = planned_task(network, config.train, images=1, longest=1, num_classes=data.num_classes)
    return logits + training_bytes(task.model, config.train)


@stage(processes="all", space=_student_bytes)
def train_student(
    work: Work,
    config: Teaching,
    *,
    data: Dataset,
    student: Classifier,
    shots: Artifact | None = None,
    **sets: Artifact,
) -> dict:
    """A checkpoint with a new head, all of it trained on the shots, sets of images, or both.

    Of both every batch holds as many in expectation, however few the shots are. The test scores are
    those of the last step.
    """
    real = None
    if shots is not None:
        real = load_shots(shots.path / SHOTS_FILE).train_source(data)
    images = shared_sets(config.shares, sets, data.class_names) if config.shares else None
    source, weights = _weighted(real, images, config.real_weight)
    network, sized = CheckpointNetwork.of(student), config.train.sized(config.images)
    given = {"seeds": [config.seed], "num_classes": data.num_classes, "backbone": student}
    if sized.streamed:
        tasks = streamed_tasks([(source, weights)], network, sized, **given)
    else:
        pool = Pool(squares(source, network.image_size), np.asarray(source.labels))
        view = View(np.arange(len(source)), weights)
        tasks = supervised_tasks(pool, [view], network, sized, **given)
    trained = train_tasks(tasks, sized, work.training, mesh=work.mesh, description="train student")
    if trained.failed:
        raise NonFiniteError(f"student: {trained.failed[0]}; lower students.*.train.learning_rate")
    if not work.writes:
        return {}
    test = data.test
    logits = np.concatenate([
        logits_of(
            trained.models[0], network,
            squares(Subset(test, range(i, min(i + _AT_ONCE, len(test)))), network.image_size),
        )
        for i in range(0, len(test), _AT_ONCE)
    ])  # fmt: skip
    found = scores(logits, np.asarray(test.labels), data.class_names)
    np.save(work.folder / "logits.npy", logits)
    write_json(work.folder / "scores.json", found)
    return {"top1": found["top1"], "macro": found["macro"]}


def _weighted(
    real: ImageSource | None, images: ImageSource | None, real_weight: float
) -> tuple[ImageSource, np.ndarray]:
    """What is trained on, and the weight of each image in the loss."""
    if real is None or images is None:
        source = real if images is None else images
        assert source is not None
        return source, np.ones(len(source), np.float32)
    both: Mapping[str, ImageSource] = {"shots": real, "images": images}
    source = shared(both, dict.fromkeys(both, 1.0))
    counts = [len(part) for part in source.sources]
    return source, np.repeat(np.float32([real_weight, 1 - real_weight]), counts)
