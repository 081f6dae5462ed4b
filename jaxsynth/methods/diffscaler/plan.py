"""What DiffScaler's training needs on a mesh, from a configuration alone.

The tasks are those that the run's stages make (`tasks.class_conditional.adapt_tasks`), of shapes.
Neither the base's weights nor a data set need to be there: the network's shape follows from its
config.json or its published name, and of data that cannot be counted a size is assumed and named.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxsynth.adapters.inject import mark_trainable
from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError
from jaxsynth.data.conditions import CHANNELS
from jaxsynth.data.load import load_dataset
from jaxsynth.data.views import joined
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.methods.diffscaler.config import Config
from jaxsynth.methods.diffscaler.inputs import vae_folder
from jaxsynth.models.diffusion.dit import DiT, DiTConfig
from jaxsynth.models.diffusion.vae import AutoencoderKLConfig
from jaxsynth.runs.sources import count_data
from jaxsynth.tasks.class_conditional import AdaptConfig, Latents, adapt_tasks
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan
from jaxsynth.weights.layout import stored
from jaxsynth.weights.networks.dit import SCHEDULER

# "DiT-XL-2-256x256.pt" of the authors, "facebook/DiT-XL-2-256" on the hub.
_PUBLISHED = re.compile(r"(?:.*/)?(DiT-(?:S|B|L|XL))-([248])-(256|512)(?:x\3)?(?:\.pt)?")


@dataclass(frozen=True)
class _Program:
    """A training of the run: of a `recipe`, or of the base itself ("")."""

    name: str
    recipe: str
    train: AdaptConfig
    images: int
    views: int
    rows: int = 0
    channels: int = 0
    count: int = 0
    note: str = ""

    @property
    def shape(self) -> "_Program":
        """What equal trainings have in common: one of them is planned."""
        return replace(self, name="", note="", train=replace(self.train, steps=0))


def plan(config: Config, mesh: Mesh) -> list[Plan]:
    """One for every training program: the base's, every recipe's, the sets' and the conditions'.

    Raises UserError where the base's shape cannot be known, and as `trainer.train`.
    """
    network, planned = network_of(config), {}
    for one in _programs(config):
        planned.setdefault(one.shape, one)
    return [_planned(one, config, network, mesh) for one in planned.values()]


def _programs(config: Config) -> list[_Program]:
    made = []
    if not config.base:
        counts = [count_data(data) for data in config.base_data.values()]
        images, views = sum(images for _, images, _ in counts), _views(config, "base")
        note = _joined(note for *_, note in counts)
        made.append(_Program("base", "", config.pretrain.train, images, views, note=note))
    counted = {name: count_data(data) for name, data in config.data.items()}
    for name in config.study:
        classes, images, note = counted[name]
        for recipe in config.recipes:
            views = _views(config, name)
            label = f"{recipe} on {name}"
            made.append(_Program(label, recipe, config.train, images, views, classes, note=note))
    if not config.data:
        return made
    recipe, train = config.sets_recipe, config.sets_train
    rows = max(classes for classes, _, _ in counted.values())
    for group in [tuple(counted)] if config.together else [(name,) for name in counted]:
        made.append(
            _Program(
                f"{len(group)} sets" if len(group) > 1 else f"set of {group[0]}",
                recipe,
                train,
                max(counted[name][1] for name in group),
                max(_views(config, name) for name in group),
                rows,
                count=len(group) if len(group) > 1 else 0,
                note=_joined(counted[name][2] for name in group),
            )
        )
    for name, kinds in config.conditions.items():
        _, images, note = counted[name]
        for kind in kinds:
            channels = CHANNELS[kind] * _vae_config(config).downscale ** 2
            label, views = f"{kind} of {name}", _views(config, name)
            made.append(
                _Program(label, recipe, train, images, views, rows, channels, note=note)
            )  # fmt: skip
    return made


def _planned(one: _Program, config: Config, network: DiTConfig, mesh: Mesh) -> Plan:
    seed = config.seeds[0]

    def make() -> DiT:
        if not one.recipe:
            return mark_trainable(_network(network, "float32"))
        base = _network(network, config.dtype)
        adaptation = config.adaptation(one.recipe, seed)
        return adaptation.apply(base, one.rows, condition_channels=one.channels)

    latents = _shapes(network, one.images, one.views, one.channels)
    retention, kept = one.train.retention, None
    if retention is not None:
        kept = jax.ShapeDtypeStruct((retention.images, *latents.mean.shape[2:]), jnp.float32)
    schedule = NoiseSchedule.from_config(SCHEDULER)
    (task,) = adapt_tasks(
        [nnx.eval_shape(make)], [latents], schedule, one.train, seed=seed, kept=kept
    )
    sized = one.train.sized(one.images)
    return trainer.plan(one.name, task, sized, mesh, count=one.count, note=one.note)


def _joined(notes: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(note for note in notes if note))


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
    vae = _vae_config(config)
    dataset = joined({name: load_dataset(data) for name, data in config.base_data.items()})
    side = dataset.train[0].image.shape[0] // vae.downscale
    return config.pretrain.network(side, vae.latent_channels, dataset.num_classes)


def _vae_config(config: Config) -> AutoencoderKLConfig:
    """The autoencoder's shape: of the base's folder where it has one."""
    own = Path(config.base).expanduser() / "vae"
    folder = own if config.base and own.is_dir() else vae_folder(config.vae)
    return AutoencoderKLConfig.from_dict(read_json(folder / "config.json"))


def _network(config: DiTConfig, dtype: str) -> DiT:
    """A frozen network stored and computed in `dtype`; to be traced."""
    graphdef, state = nnx.split(DiT(config, dtype=jax.numpy.dtype(dtype), rngs=nnx.Rngs(0)))
    return nnx.merge(graphdef, stored(state, dtype))


def _shapes(network: DiTConfig, images: int, views: int, channels: int) -> Latents:
    """Latents of so many images, with conditions of `channels` channels, as shapes."""
    grid = (images, views, network.sample_size, network.sample_size)
    latent = jax.ShapeDtypeStruct((*grid, network.in_channels), jnp.float32)
    condition = jax.ShapeDtypeStruct((*grid, channels), np.uint8) if channels else None
    return Latents(latent, latent, jax.ShapeDtypeStruct((images,), np.int32), condition)


def _views(config: Config, name: str) -> int:
    return 2 if name in config.mirror else 1
