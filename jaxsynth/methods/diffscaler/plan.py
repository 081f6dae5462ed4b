"""What DiffScaler's training needs on a mesh, from a configuration alone.

Neither the base's weights nor a data set need to be there: the network's shape follows from its
config.json or its published name, and of data that cannot be counted a size is assumed and named.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxsynth.adapters.inject import mark_trainable
from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError
from jaxsynth.data.dataset import DataConfig
from jaxsynth.data.load import load_dataset
from jaxsynth.data.views import joined
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.methods.diffscaler.recipes import adapted
from jaxsynth.models.diffusion.dit import DiT, DiTConfig
from jaxsynth.models.diffusion.vae import AutoencoderKLConfig
from jaxsynth.training.planning import Plan, plan_adapt
from jaxsynth.weights.hub import resolve
from jaxsynth.weights.layout import stored
from jaxsynth.weights.networks.dit import SCHEDULER

if TYPE_CHECKING:
    from jaxsynth.methods.diffscaler.run import Config

# Of a data set that is not here: about that of the sets that DiT is usually transferred to.
ASSUMED_CLASSES, ASSUMED_IMAGES = 100, 10_000
# "DiT-XL-2-256x256.pt" of the authors, "facebook/DiT-XL-2-256" on the hub.
_PUBLISHED = re.compile(r"(?:.*/)?(DiT-(?:S|B|L|XL))-([248])-(256|512)(?:x\3)?(?:\.pt)?")


def plans(config: Config, mesh: Mesh) -> list[Plan]:
    """One for the base, if the run trains it, one for every recipe, and one for the sets.

    Raises UserError where the base's shape cannot be known, and ValueError as `plan_adapt`.
    """
    network = network_of(config)
    own = partial(_network, network, config.dtype)
    on_mesh = partial(plan_adapt, schedule=NoiseSchedule.from_config(SCHEDULER), mesh=mesh)
    ranks = {"rank": config.rank, "lora_rank": config.lora_rank, "seed": 0,
             "adapter": config.adapter}  # fmt: skip
    made = []
    if not config.base:
        counted = [_counted(data) for data in config.base_data.values()]
        images = sum(images for _, images, _ in counted)
        note = ", ".join(dict.fromkeys(note for _, _, note in counted if note))
        made.append(
            on_mesh(
                "base",
                lambda: mark_trainable(_network(network, "float32")),
                config=config.pretrain.train,
                images=images,
                views=_views(config, "base"),
                note=note,
            )
        )
    for name in config.study:
        classes, images, note = _counted(config.data[name])
        for recipe in config.recipes:
            made.append(
                on_mesh(
                    f"{recipe} on {name}",
                    lambda recipe=recipe, classes=classes: adapted(own(), recipe, classes, **ranks),
                    config=config.train,
                    images=images,
                    views=_views(config, name),
                    note=note,
                )
            )
    if config.together and len(config.data) > 1:
        counted = {name: _counted(data) for name, data in config.data.items()}
        rows = max(classes for classes, _, _ in counted.values())
        made.append(
            on_mesh(
                f"{len(config.data)} sets",
                lambda: adapted(own(), config.sets_recipe, rows, **ranks),
                config=config.sets_train,
                images=max(images for _, images, _ in counted.values()),
                views=max(_views(config, name) for name in config.data),
                sets=len(config.data),
                note=", ".join(dict.fromkeys(note for _, _, note in counted.values() if note)),
            )
        )
    return made


def network_of(config: Config) -> DiTConfig:
    """The shape of the base, whose weights may be elsewhere.

    Raises UserError naming `base` where neither a folder nor a published name tells it.
    """
    if not config.base:
        return _pretrained(config)
    folder = Path(config.base).expanduser()
    if folder.is_dir():
        inner = folder / "transformer"
        return DiTConfig.from_dict(read_json((inner if inner.is_dir() else folder) / "config.json"))
    match = _PUBLISHED.fullmatch(config.base)
    if match is None:
        raise UserError(
            f"base: {config.base!r} is no folder, and its name is not that of a published network "
            "(such as DiT-XL-2-256x256.pt), so its shape is unknown"
        )
    size, patch, pixels = match.groups()
    return DiTConfig.preset(f"{size}/{patch}", sample_size=int(pixels) // 8)


def _pretrained(config: Config) -> DiTConfig:
    """The base that the run trains itself."""
    folder = resolve(config.vae)
    inner = folder / "vae"
    values = read_json((inner if inner.is_dir() else folder) / "config.json")
    vae = AutoencoderKLConfig.from_dict(values)
    dataset = joined({name: load_dataset(data) for name, data in config.base_data.items()})
    side = dataset.train[0].image.shape[0] // vae.downscale
    return config.pretrain.network(side, vae.latent_channels, dataset.num_classes)


def _network(config: DiTConfig, dtype: str) -> DiT:
    """A frozen network stored and computed in `dtype`; to be traced."""
    graphdef, state = nnx.split(DiT(config, dtype=jax.numpy.dtype(dtype), rngs=nnx.Rngs(0)))
    return nnx.merge(graphdef, stored(state, dtype))


def _views(config: Config, name: str) -> int:
    return 2 if name in config.mirror else 1


def _counted(data: DataConfig) -> tuple[int, int, str]:
    """Classes and training images; those of data that would have to be fetched are assumed."""
    if data.source == "tfds" or (data.source == "folder" and not data.path):
        named = data.name or "no data set named"
        note = f"{named}: {ASSUMED_CLASSES} classes and {ASSUMED_IMAGES} images are assumed"
        return ASSUMED_CLASSES, ASSUMED_IMAGES, note
    dataset = load_dataset(data)
    return dataset.num_classes, len(dataset.train), ""
