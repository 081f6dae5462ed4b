"""What DiffScaler's training needs on a mesh, from a configuration alone.

The tasks are those that the run's stages make (`tasks.class_conditional.adapt_tasks`), of shapes.
Neither the base's weights nor a data set need to be there: the network's shape follows from its
config.json or its published name, and of data that cannot be counted a size is assumed and named.
"""

import re
from collections.abc import Callable
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


def plan(config: Config, mesh: Mesh) -> list[Plan]:
    """One for the base, if the run trains it, every recipe, the sets, and every condition.

    Raises UserError where the base's shape cannot be known, and as `trainer.train`.
    """
    network, made = network_of(config), []
    counted = {name: count_data(data) for name, data in config.data.items()}
    seed = config.seeds[0]

    def add(name: str, make: Callable[[], DiT], train: AdaptConfig, images: int, views: int, *,
            channels: int = 0, count: int = 0, notes: tuple[str, ...] = ()) -> None:  # fmt: skip
        latents, retention = _shapes(network, images, views, channels), train.retention
        kept = None
        if retention is not None:
            kept = jax.ShapeDtypeStruct((retention.images, *latents.mean.shape[2:]), jnp.float32)
        (task,) = adapt_tasks(
            [nnx.eval_shape(make)], [latents], NoiseSchedule.from_config(SCHEDULER), train,
            seed=seed, kept=kept,
        )  # fmt: skip
        note = ", ".join(dict.fromkeys(note for note in notes if note))
        sized = train.sized(images)
        made.append(trainer.plan(name, task, sized, mesh, count=count, note=note))

    def recipe(name: str, rows: int, channels: int = 0) -> Callable[[], DiT]:
        adaptation = config.adaptation(name, seed)
        return lambda: adaptation.apply(
            _network(network, config.dtype), rows, condition_channels=channels
        )

    if not config.base:
        base = [count_data(data) for data in config.base_data.values()]
        add(
            "base", lambda: mark_trainable(_network(network, "float32")), config.pretrain.train,
            sum(images for _, images, _ in base), _views(config, "base"),
            notes=tuple(note for *_, note in base),
        )  # fmt: skip
    for name in config.study:
        classes, images, note = counted[name]
        for one in config.recipes:
            add(
                f"{one} on {name}", recipe(one, classes), config.train, images,
                _views(config, name), notes=(note,),
            )  # fmt: skip
    if not config.data:
        return made
    rows = max(classes for classes, _, _ in counted.values())
    groups = [tuple(config.data)] if config.together else [(name,) for name in config.data]
    for group in groups:
        add(
            f"{len(group)} sets" if config.together else f"set of {group[0]}",
            recipe(config.sets_recipe, rows), config.sets_train,
            max(counted[name][1] for name in group), max(_views(config, name) for name in group),
            count=len(group), notes=tuple(counted[name][2] for name in group),
        )  # fmt: skip
    for name, kinds in config.conditions.items():
        for kind in kinds:
            channels = CHANNELS[kind] * _vae_config(config).downscale ** 2
            add(
                f"{kind} of {name}", recipe(config.sets_recipe, rows, channels),
                config.sets_train, counted[name][1], _views(config, name),
                channels=channels, notes=(counted[name][2],),
            )  # fmt: skip
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
