"""Where a study's images come from: shots, adapters, stores, filters, choices."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import Dataset, SourceError
from jaxsynth.data.decode import squares
from jaxsynth.data.prompts import prompts as class_prompts
from jaxsynth.data.splits import few_shot, load_shots
from jaxsynth.data.store import ImageStore
from jaxsynth.data.views import Subset, first_of_each
from jaxsynth.methods.image_sets import KEPT_FILE, SHOTS_FILE
from jaxsynth.methods.scaling.points import Point, views_of
from jaxsynth.methods.scaling.trainings import (
    VIEWS_FILE,
    devices_of,
    load_models,
    opened,
)
from jaxsynth.quality.features import clip_features
from jaxsynth.quality.filters import entropy, most_uncertain
from jaxsynth.quality.similarity import class_spread
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.clip_classifier import predict
from jaxsynth.tasks.networks import NetworkConfig, logits_of
from jaxsynth.tasks.text_to_image import (
    FinetuneConfig,
    encode_examples,
    finetune,
    planned_task,
)
from jaxsynth.training.sharding import local_mesh
from jaxsynth.training.space import training_bytes
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.hf import Clip, StableDiffusion


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
    found, failed = views_of([point], data, drawn, {})
    if failed:
        raise SourceError(failed[point])
    real, _ = found[point]
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
    return {"steps": config.finetune.num_steps(len(examples)), "devices": devices_of(work)}


@dataclass(frozen=True)
class Measuring:
    """How many images of each class a source is judged by: its first."""

    images: int


@stage()
def measure_images(
    work: Work, config: Measuring, *, data: Dataset, clip: Clip, images: Artifact
) -> dict:
    """How recognisable and how diverse a source's images are (Fan et al., section 4).

    recognisability: the share that a CLIP, which no training here touches, tells as its class.
    diversity: `class_spread` of its features.
    """
    store = ImageStore(images.path)
    some = first_of_each(store, data.class_names, config.images)
    logits = predict(clip, clip.model, class_prompts(data), some, mesh=local_mesh())
    features = clip_features(clip).of_source(some)
    return {
        "images": len(some),
        "recognisability": float((logits.argmax(-1) == some.labels).mean()),
        "diversity": class_spread(features, some.labels),
    }


@dataclass(frozen=True)
class Choosing:
    """Which images of a seed the next `size` of each class are, and by what network."""

    size: int
    seed: int
    network: NetworkConfig


@stage()
def choose_uncertain(
    work: Work,
    config: Choosing,
    *,
    data: Dataset,
    images: Artifact,
    training: Artifact,
    kept: Artifact | None = None,
) -> dict:
    """Deliberate practice's next images: those of the last round, then the least certain others.

    Of each class, among all images that were drawn (and kept by the source's filters), those about
    which the classifier of the last round has the largest entropy. Askari-Hemmat et al. (ICML 2025,
    arXiv 2502.15588) move the sampler by the entropy's gradient to draw such images alone; here
    they are chosen from images drawn as for every other point, so all images cost their drawing.
    """
    store = opened(images, kept)
    answered = {
        entry["seed"]: (number, entry["synthetic_ids"])
        for number, entry in enumerate(read_json(training.path / VIEWS_FILE, list))
    }
    if config.seed not in answered:
        # The point that failed is named; those that would follow have no images.
        write_json(work.folder / KEPT_FILE, [])
        return {"images": 0}
    number, before = answered[config.seed]
    model = load_models(training.path, config.network, data.num_classes)[number]
    logits = logits_of(model, config.network, squares(store, config.network.image_size))
    shares = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    places = {id_: place for place, id_ in enumerate(store.ids)}
    old = np.array([places[id_] for id_ in before], np.int64)
    new = most_uncertain(shares, store.labels, old, config.size - len(old) // data.num_classes)
    chosen = np.concatenate([old, new])
    root = store.indices[chosen] if isinstance(store, Subset) else chosen
    write_json(work.folder / KEPT_FILE, root.tolist())
    uncertain, left = entropy(shares), np.setdiff1d(np.arange(len(store)), chosen)
    means = {"entropy": new, "entropy of the others": left}
    return {"images": len(chosen)} | {
        name: float(uncertain[own].mean()) for name, own in means.items() if len(own)
    }
