"""A study's clones: backbones trained without classes, and what their features tell."""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxsynth.adapters.inject import AdapterState, extract, load_state, mark_trainable
from jaxsynth.core.arrays import read_arrays
from jaxsynth.core.io import write_json
from jaxsynth.data.dataset import Dataset
from jaxsynth.data.decode import squares
from jaxsynth.data.store import ImageStore
from jaxsynth.methods.scaling.trainings import LABELS_FILE, LOGITS_FILE, devices_of
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.contrastive import (
    CloneConfig,
    backbone_of,
    backbone_start,
    clone_network,
    clone_task,
)
from jaxsynth.tasks.networks import NetworkConfig, features_of
from jaxsynth.tasks.probe import ProbeConfig, probe
from jaxsynth.tasks.supervised import Pool
from jaxsynth.training.metrics import read_metrics
from jaxsynth.training.space import training_bytes
from jaxsynth.training.trainer import train
from jaxsynth.weights.hf import StableDiffusion
from jaxsynth.weights.networks.classifiers import Classifier

BACKBONE_FILE, SCORES_FILE, NEIGHBORS_FILE = "backbone.npz", "scores.json", "neighbors.npy"
# Of a training's last measures, the mean of so many lines.
_LAST = 3


@dataclass(frozen=True)
class Cloning:
    """How a backbone is trained."""

    clone: CloneConfig
    network: NetworkConfig
    seed: int


def _clone_bytes(
    config: Cloning, *, base: StableDiffusion, images: Artifact, backbone: Classifier | None = None
) -> int:
    # A batch's captions, of the longest text: what tokens do to the size is the vocabulary's.
    tokens = np.full(
        (1, base.tokenizer.each[0].max_length), base.text_encoder.config.vocab_size - 1
    )
    network = nnx.eval_shape(lambda: clone_network(config.network, config.clone, tokens, 0))
    return training_bytes(network, config.clone)


@stage(processes="all", space=_clone_bytes)
def train_clone(
    work: Work,
    config: Cloning,
    *,
    base: StableDiffusion,
    images: Artifact,
    backbone: Classifier | None = None,
) -> dict:
    """A backbone trained on a store's images, whose prompts are its captions."""
    store = ImageStore(images.path)
    captions, numbers = np.unique([entry.prompt for entry in store.entries], return_inverse=True)
    pool = Pool(squares(store, config.network.image_size), store.labels)
    tokens = np.asarray(base.tokenizer.each[0](captions.tolist()))
    task = clone_task(
        pool, numbers, tokens, config.network, config.clone, seed=config.seed, backbone=backbone
    )
    sized = config.clone.sized(len(store))
    model = train(
        task, sized, work.training, mesh=work.mesh, description=f"train {config.clone.method}"
    )
    if not work.writes:
        return {}
    state = extract(mark_trainable(backbone_of(model)))
    np.savez(work.folder / BACKBONE_FILE, **{k: np.asarray(x) for k, x in state.arrays.items()})
    lines = [line for line in read_metrics(work.training / "metrics.jsonl") if "loss" in line]
    measures = {
        name: float(np.mean([line[name] for line in lines[-_LAST:]]))
        for name in ("loss", "feature_std", "effective_rank")
    }
    counts = {"captions": len(captions), "steps": sized.steps, "devices": devices_of(work)}
    return counts | measures


@dataclass(frozen=True)
class Probing:
    """How a backbone's features are asked about; `seed` is that of its start, too."""

    probe: ProbeConfig
    network: NetworkConfig
    seed: int


@stage(processes="all")
def probe_backbone(
    work: Work,
    config: Probing,
    *,
    data: Dataset,
    clone: Artifact | None = None,
    backbone: Classifier | None = None,
) -> dict:
    """Heads on a clone's features of the real training images, or on those of its start."""
    network = config.network
    model = backbone_start(network, config.seed, backbone)
    if clone is not None:
        model = load_backbone(clone.path, model)
    train, test = (
        features_of(model, network, squares(source, network.image_size))
        for source in (data.train, data.test)
    )
    found = probe(
        train, np.asarray(data.train.labels), test,
        config.probe, work.training, num_classes=data.num_classes, seed=config.seed,
        mesh=work.mesh,
    )  # fmt: skip
    if not work.writes:
        return {}
    labels = np.asarray(data.test.labels)
    np.save(work.folder / LOGITS_FILE, found.logits)
    np.save(work.folder / NEIGHBORS_FILE, found.neighbors)
    np.save(work.folder / LABELS_FILE, labels)
    scores = {
        "linear": float((found.logits.argmax(-1) == labels).mean()),
        "neighbors": float((found.neighbors.argmax(-1) == labels).mean()),
        "rate": found.rate,
        "held_out": found.held_out,
    }
    write_json(work.folder / SCORES_FILE, scores)
    return scores


def load_backbone(folder: Path, start: nnx.Module) -> nnx.Module:
    """The backbone of a finished `train_clone`, of the structure of `start`."""
    arrays = {k: jax.device_put(x) for k, x in read_arrays(folder / BACKBONE_FILE).items()}
    return load_state(mark_trainable(start), AdapterState(arrays, None))
