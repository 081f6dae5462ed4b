"""Faces of data whose people are known: a small network learns to tell them apart, and sees all.

InstantID needs an embedding of each face. Where data come without (`faces`), as drawn people do, a
vision transformer is trained to classify the people of the training images; its class token is the
embedding, of people that it has not seen too, as face recognition networks are used. A second one,
of another seed, judges the images that are drawn, so that nothing is measured by what it was told.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxsynth.core.limits import Count, Positive, check_limits
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.decode import squares
from jaxsynth.data.faces import (
    FILE,
    Faces,
    keypoint_pictures,
    keypoints_of,
    people_of,
    read_faces,
    write_faces,
)
from jaxsynth.data.pipeline.augment import RECIPES
from jaxsynth.generation.controls import Control
from jaxsynth.generation.identities import identity_parts
from jaxsynth.generation.image_prompts import ImagePrompt
from jaxsynth.models.diffusion.identity import Identity
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.networks import NetworkConfig
from jaxsynth.tasks.supervised import (
    Pool,
    SupervisedConfig,
    View,
    planned_task,
    supervised_tasks,
    train_tasks,
)
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan, Program
from jaxsynth.training.space import training_bytes
from jaxsynth.weights.face_encoder import load_face_encoder
from jaxsynth.weights.networks.classifiers import Classifier, save_classifier
from jaxsynth.weights.preprocessing import Preprocessing

ENCODER = "encoder"
_SIDE, _PATCH, _HEAD = 32, 8, 16
# Of data that are not at hand: what is published for faces.
PUBLISHED_WIDTH = 512


@dataclass(frozen=True)
class FaceEncoderConfig:
    """A vision transformer for pictures of 32 pixels that tells people apart, and its training.

    `width` is that of the embedding, a multiple of 16.
    """

    width: Count = 64
    layers: Count = 4
    steps: Count = 600
    batch_size: Count = 64
    learning_rate: Positive = 1e-3

    def __post_init__(self):
        check_limits(self)
        if self.width % _HEAD:
            raise ValueError(f"width: {self.width}, expected a multiple of {_HEAD}")

    @property
    def network(self) -> NetworkConfig:
        return NetworkConfig(
            image_size=_SIDE, patch_size=_PATCH, width=self.width, layers=self.layers,
            heads=self.width // _HEAD,
        )  # fmt: skip

    @property
    def training(self) -> SupervisedConfig:
        return SupervisedConfig(
            steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate,
            augment=RECIPES["none"], steps_per_call=math.gcd(self.steps, 20),
        )  # fmt: skip


@dataclass(frozen=True)
class Recognizing:
    """How people are told apart."""

    encoder: FaceEncoderConfig
    seed: int


def _bytes(config: Recognizing, *, data: Dataset, **_: Any) -> int:
    task = _planned(config.encoder, 1, len(np.unique(people_of(data.train))))
    return 2 * training_bytes(task.model, config.encoder.training)


@stage(processes="all", space=_bytes)
def recognize(work: Work, config: Recognizing, *, data: Dataset) -> dict:
    """A face encoder that is trained on the people of the training images, and all faces by it."""
    images, people = squares(data.train, _SIDE), people_of(data.train)
    names, labels = np.unique(people, return_inverse=True)
    own, network = config.encoder, config.encoder.network
    rows = np.arange(len(images))
    tasks = supervised_tasks(
        Pool(images, labels.astype(np.int32)), [View(rows, np.ones(len(rows)))], network,
        own.training, seeds=[config.seed], num_classes=len(names),
    )  # fmt: skip
    trained = train_tasks(
        tasks, own.training.sized(len(images)), work.training, mesh=work.mesh,
        description="recognize",
    )  # fmt: skip
    if trained.failed:
        raise FloatingPointError(f"the face encoder failed: {trained.failed[0]}")
    counts = {"people": len(names), "images": len(images)}
    if not work.writes:
        return counts
    made = Preprocessing(_SIDE, _SIDE, False, "bicubic", network.mean, network.std, "round")
    save_classifier(Classifier(trained.models[0], made), work.folder / ENCODER)
    encoder = load_face_encoder(work.folder / ENCODER)
    parts = (data.train, data.test)
    keypoints = np.concatenate([keypoints_of(part) for part in parts])
    pictures = np.concatenate([images, squares(data.test, _SIDE)])
    ids = tuple(id_ for part in parts for id_ in part.ids)
    faces = Faces(ids, encoder(list(pictures), keypoints), keypoints)
    write_faces(work.folder / FILE, faces)
    return counts


def faces_in(given: Artifact | Faces) -> Faces:
    """The faces of a stage, or those that are given."""
    return given if isinstance(given, Faces) else read_faces(given.path / FILE)


class Judge:
    """The embeddings of a second face encoder, from the mean of those of the training images."""

    def __init__(self, made: Artifact, data: Dataset):
        self._encoder = load_face_encoder(made.path / ENCODER)
        self._mean = faces_in(made).of(data.train).embeddings.mean(0)

    def of_source(self, source: ImageSource) -> Float[np.ndarray, "n d"]:
        """Of every image of a source."""
        pictures = list(squares(source, _SIDE))
        return self._encoder(pictures, np.zeros((len(pictures), 5, 2))) - self._mean


def face_parts(
    identity: Identity, references: ImageSource, faces: Faces, texts: int, size: int
) -> tuple[ImagePrompt, Control]:
    """What draws each of so many texts like the references in turns.

    Each has the keypoints of the next reference, which are of somebody else: what is alike comes of
    the embedding.
    """
    own = faces.of(references)
    pictures = np.roll(keypoint_pictures(references, own.keypoints, size), -1, axis=0)
    turns = np.arange(texts) % len(references)
    return identity_parts(identity, own.embeddings[turns][:, None], pictures[turns])


def planned(config: FaceEncoderConfig, images: int, mesh: Mesh, note: str) -> Program:
    """The training of a face encoder, of two: one is told who it is, and one judges."""

    def build(batch: int) -> Plan:
        # A picture a person at the most.
        task = _planned(config, images, images)
        return trainer.plan("faces", task, config.training.sized(images), mesh, count=1, note=note)

    return Program(
        "faces", build, "face_encoder.batch_size", config.batch_size, config.batch_size,
        lambda batch: 2 * config.steps,
    )  # fmt: skip


def _planned(config: FaceEncoderConfig, images: int, people: int):
    return planned_task(
        config.network, config.training, images=images, longest=images, num_classes=people
    )
