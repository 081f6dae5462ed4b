"""What DiffScaler's training needs on a mesh, from a configuration alone.

The tasks are those that the run's stages make (`tasks.class_conditional.adapt_tasks`), of shapes.
Neither the base's weights nor a data set need to be there: the network's shape follows from its
config.json or its published name, and of data that cannot be counted a size is assumed and named.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

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
from jaxsynth.generation.classes import class_sampler
from jaxsynth.generation.planning import plan_sampler
from jaxsynth.methods.diffscaler.config import Config
from jaxsynth.methods.diffscaler.inputs import vae_folder
from jaxsynth.models.diffusion.dit import DiT, DiTConfig
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.runs.sources import count_data
from jaxsynth.tasks.class_conditional import AdaptConfig, adapt_tasks
from jaxsynth.tasks.latents import Latents
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan, Program, rows_of
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights import published
from jaxsynth.weights.hf import is_here
from jaxsynth.weights.layout import stored
from jaxsynth.weights.networks.dit import DDIM_SCHEDULER, SCHEDULER, DiTPipeline

# "DiT-XL-2-256x256.pt" of the authors, "facebook/DiT-XL-2-256" on the hub.
_PUBLISHED = re.compile(r"(?:.*/)?(DiT-(?:S|B|L|XL))-([248])-(256|512)(?:x\3)?(?:\.pt)?")


@dataclass(frozen=True)
class _Training:
    """A training of the run: of a `recipe`, or of the base itself (""), and what is drawn of it.

    `drawn` counts the sets of parameters that one batch of images is drawn of, 0 for none, `times`
    the rates and seeds that share the program.
    """

    name: str
    recipe: str
    train: AdaptConfig
    images: int
    views: int
    rows: int = 0
    channels: int = 0
    count: int = 0
    drawn: int = 0
    times: int = 1
    note: str = ""

    @property
    def shape(self) -> Any:
        """What equal trainings have in common: one of them is planned."""
        train = replace(self.train, steps=0)
        return replace(self, name="", note="", drawn=0, times=1, train=train)

    def updates(self, batch: int) -> int:
        """Of all its rates and seeds."""
        return self.times * replace(self.train, batch_size=batch).sized(self.images).steps


def plan(config: Config, mesh: Mesh) -> list[Program]:
    """One for every training program: the base's, every recipe's, the sets' and the conditions'.

    After them the drawing of images, on one device as in a run. Raises UserError where the base's
    shape cannot be known, and as `trainer.train`.
    """
    network, trainings, drawings = network_of(config), {}, {}
    for one in _trainings(config):
        trainings.setdefault(one.shape, []).append(one)
        if one.drawn:
            drawings.setdefault((one.recipe, one.rows, one.channels, one.drawn), one)
    one_device, batch = make_mesh(devices=mesh.devices.flat[:1]), config.generate.batch_size
    programs = []
    for same in trainings.values():
        one = same[0]
        field = "train.batch_size" if one.recipe else "pretrain.train.batch_size"
        unit = one.train.accumulate * (1 if one.count else rows_of(mesh))
        build = partial(_planned, one, config, network, mesh)
        updates = partial(_updates, same)
        programs.append(Program(one.name, build, field, one.train.batch_size, unit, updates))
    for one in drawings.values():
        build = partial(_drawn, one, config, network, one_device)
        programs.append(Program(f"draw {one.name}", build, "generate.batch_size", batch))
    return programs


def _updates(trainings: Sequence[_Training], batch: int) -> int:
    return sum(one.updates(batch) for one in trainings)


def _trainings(config: Config) -> list[_Training]:
    made = []
    if not config.base:
        counts = [count_data(data) for data in config.base_data.values()]
        images, views = sum(images for _, images, _ in counts), _views(config, "base")
        note = _joined(note for *_, note in counts)
        made.append(_Training("base", "", config.pretrain.train, images, views, note=note))
    counted = {name: count_data(data) for name, data in config.data.items()}
    for name in config.study:
        classes, images, note = counted[name]
        for recipe in config.recipes:
            views = _views(config, name)
            label, drawn = f"{recipe} on {name}", int(recipe in config.draw)
            times = len(config.rates_of(recipe)) + len(config.seeds) - 1
            made.append(
                _Training(
                    label, recipe, config.train, images, views, classes, drawn=drawn, times=times,
                    note=note,
                )
            )  # fmt: skip
    if not config.data:
        return made
    recipe, train = config.sets_recipe, config.sets_train
    rows = max(classes for classes, _, _ in counted.values())
    for group in [tuple(counted)] if config.together else [(name,) for name in counted]:
        # What streams trains in turn (`adapt_each`).
        stacked = len(group) > 1 and not train.streamed
        made.append(
            _Training(
                f"{len(group)} sets" if len(group) > 1 else f"set of {group[0]}",
                recipe,
                train,
                max(counted[name][1] for name in group),
                max(_views(config, name) for name in group),
                rows,
                count=len(group) if stacked else 0,
                drawn=len(counted),
                times=1 if stacked else len(group),
                note=_joined(counted[name][2] for name in group),
            )
        )
    for name, kinds in config.conditions.items():
        _, images, note = counted[name]
        for kind in kinds:
            channels = CHANNELS[kind] * _vae_config(config).downscale ** 2
            label, views = f"{kind} of {name}", _views(config, name)
            made.append(
                _Training(
                    label, recipe, train, images, views, rows, channels, drawn=1, note=note
                )
            )  # fmt: skip
    return made


def _model(one: _Training, config: Config, network: DiTConfig) -> DiT:
    """The network of a training, of shapes."""

    def make() -> DiT:
        if not one.recipe:
            return mark_trainable(_network(DiT, network, "float32"))
        base = _network(DiT, network, config.dtype)
        adaptation = config.adaptation(one.recipe, config.seeds[0])
        return adaptation.apply(base, one.rows, condition_channels=one.channels)

    return nnx.eval_shape(make)


def _planned(one: _Training, config: Config, network: DiTConfig, mesh: Mesh, batch: int) -> Plan:
    train = replace(one.train, batch_size=batch)
    latents = _shapes(network, one.images, one.views, one.channels)
    retention, kept = train.retention, None
    if retention is not None:
        kept = jax.ShapeDtypeStruct((retention.images, *latents.mean.shape[2:]), jnp.float32)
    schedule, models = NoiseSchedule.from_config(SCHEDULER), [_model(one, config, network)]
    (task,) = adapt_tasks(models, [latents], schedule, train, seed=config.seeds[0], kept=kept)
    sized = train.sized(one.images)
    return trainer.plan(one.name, task, sized, mesh, count=one.count, note=one.note)


def _drawn(one: _Training, config: Config, network: DiTConfig, mesh: Mesh, batch: int) -> Plan:
    scheduler = SCHEDULER if config.base else DDIM_SCHEDULER
    model, generate = _model(one, config, network), replace(config.generate, batch_size=batch)
    rows = {"label": ((), jnp.int32)}
    if one.channels:
        grid = (network.sample_size, network.sample_size, one.channels)
        rows["condition"] = (grid, jnp.uint8)
    vae, own = _vae_config(config), (Path(config.base).expanduser() / "vae").is_dir()
    dtype = config.dtype if config.base and own else "float32"
    assumed = f"{config.vae}: Stable Diffusion's autoencoder is assumed" * (vae is published.VAE)
    return plan_sampler(
        f"draw {one.name}",
        model,
        nnx.eval_shape(lambda: _network(AutoencoderKL, vae, dtype)),
        *class_sampler(model.config, scheduler, generate),
        (network.sample_size, network.sample_size, network.in_channels),
        rows,
        mesh,
        batch_size=batch,
        adapters=one.drawn,
        note=_joined([one.note, assumed]),
    )


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


def planned_base(config: Config, vae: AutoencoderKL) -> DiTPipeline:
    """The base that the run trains itself, of shapes."""
    network = _pretrained(config)
    model = nnx.eval_shape(lambda: _network(DiT, network, config.dtype))
    return DiTPipeline(model, vae, DDIM_SCHEDULER, {})


def _vae_config(config: Config) -> AutoencoderKLConfig:
    """The autoencoder's shape: of the base's folder where it has one; Stable Diffusion's of a hub.

    That is what published transformers are used with.
    """
    own = Path(config.base).expanduser() / "vae"
    if config.base and own.is_dir():
        folder = own
    elif is_here(config.vae):
        folder = vae_folder(config.vae)
    else:
        return published.VAE
    return AutoencoderKLConfig.from_dict(read_json(folder / "config.json"))


def _network(kind: Callable[..., Any], config: Any, dtype: str) -> Any:
    """A frozen network stored and computed in `dtype`; to be traced."""
    graphdef, state = nnx.split(kind(config, dtype=jax.numpy.dtype(dtype), rngs=nnx.Rngs(0)))
    return nnx.merge(graphdef, stored(state, dtype))


def _shapes(network: DiTConfig, images: int, views: int, channels: int) -> Latents:
    """Latents of so many images, with conditions of `channels` channels, as shapes."""
    grid = (images, views, network.sample_size, network.sample_size)
    latent = jax.ShapeDtypeStruct((*grid, network.in_channels), jnp.float32)
    condition = jax.ShapeDtypeStruct((*grid, channels), np.uint8) if channels else None
    return Latents(latent, latent, jax.ShapeDtypeStruct((images,), np.int32), condition)


def _views(config: Config, name: str) -> int:
    return 2 if name in config.mirror else 1
