"""What a run of generated weights needs on a mesh, from a configuration alone.

The programs are those of the base, of a group of LoRAs together (their stack axis over "data"), of
each generator's training (its state cut by `sharding.WEIGHT_UNET`, the batch over "data" and
"fsdp"), of one fine-tuning, and of making one concept's weights; the last two run on one device.
They are made from the very tasks that a run trains, of shapes in the place of arrays.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxsynth.adapters.inject import mark_trainable
from jaxsynth.core.errors import UserError
from jaxsynth.data.procedural.concepts import Concept, split_concepts
from jaxsynth.methods.weightgen.config import Config, Variant
from jaxsynth.methods.weightgen.editors import Networks, shared_words
from jaxsynth.methods.weightgen.generator import fitted
from jaxsynth.models.diffusion.weight_unet import WeightUNet
from jaxsynth.models.gan.e2gan import E2GAN
from jaxsynth.tasks.gan import GANConfig, gan_task
from jaxsynth.tasks.gan_together import mixture, stacked_parts
from jaxsynth.tasks.weight_diffusion import recover, weight_task
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan, Program, compile_plan, rows_of
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.hf import PIPELINES, has_shapes, pipeline_configs

# Stable Diffusion 1.x's, where the text encoder is not at hand.
ASSUMED_WIDTH, ASSUMED_TOKENS = 768, 77
# Of concepts that a server is still to name.
ASSUMED_WORDINGS = 4


def plan(config: Config, mesh: Mesh) -> list[Program]:
    """Each program of a run; of the LoRAs together the batch is how many there are in a group.

    Raises:
        UserError: not even one LoRA for each device fits in `config.memory`.
    """
    shapes, one_device = _Shapes.of(config), make_mesh(devices=mesh.devices.flat[:1])
    group = config.editor.group or config.concepts.train
    if config.memory and not config.editor.group:
        group = fitting_group(config, mesh)
    batches = {name: variant.generator.train for name, variant in config.generators.items()}
    base, tune = config.editor.base, config.editor.tune
    unit, seeds, photos = rows_of(mesh), len(config.seeds), config.photos

    def groups(size: int) -> int:
        together = config.editor.together.sized(photos).steps
        return seeds * math.ceil(config.concepts.train / size) * together

    programs = [
        Program(
            "base", partial(shapes.base, mesh), "editor.base.batch_size", base.batch_size, unit,
            lambda batch: seeds * replace(base, batch_size=batch).sized(photos).steps,
        ),
        Program(
            f"{group} LoRAs", partial(shapes.together, mesh), "editor.group", group,
            mesh.shape["data"], groups,
        ),
        *(
            Program(
                f"generator {name}", partial(shapes.generator, name, mesh),
                f"generators.{name}.generator.train.batch_size", train.batch_size,
                unit * train.accumulate, partial(shapes.generator_updates, name),
            )
            for name, train in batches.items()
        ),
        Program(
            "one fine-tuning", partial(shapes.tuning, one_device), "editor.tune.batch_size",
            tune.batch_size,
        ),
        *(
            Program(f"weights of one concept, {name}", partial(shapes.making, name, one_device))
            for name in config.generators
        ),
    ]  # fmt: skip
    return [replace(one, build=partial(_within, one.build, config.memory)) for one in programs]


def fitting_group(config: Config, mesh: Mesh) -> int:
    """How many LoRAs at a time fit in `config.memory` of each device: all, a half, a quarter, ...

    Raises:
        UserError: not even one for each device fits, or parts in common forbid groups.
    """
    shapes, limit = _Shapes.of(config), config.memory * 2**30
    group, least = config.concepts.train, mesh.shape["data"]
    while (found := shapes.together(mesh, group).bytes) > limit:
        if config.editor.share != "none":
            raise UserError(
                f"memory: {group} LoRAs together need {found / 2**30:.1f} GiB of each device's "
                f"{config.memory:g}, and with editor.share {config.editor.share!r} all train "
                "together: take more devices, or a smaller editor.together.batch_size"
            )
        if group <= least:
            raise UserError(
                f"memory: {group} LoRAs need {found / 2**30:.1f} GiB of each device's "
                f"{config.memory:g}: take a smaller editor.together.batch_size"
            )
        group = max(math.ceil(group / 2), least)
    return group


def _within(build: Callable[[int], Plan], memory: float, batch: int) -> Plan:
    """The plan, which says so where it needs more than `memory` GiB (0: no limit)."""
    one = build(batch)
    if not memory or one.bytes <= memory * 2**30:
        return one
    over = f"needs {one.bytes / 2**30:.2f} GiB of each device's {memory:g} and does not fit"
    return replace(one, note="; ".join(filter(None, [one.note, over])))


@dataclass(frozen=True)
class _Shapes:
    """A run's networks and data as shapes. `width` and `tokens` are of the text's states."""

    config: Config
    networks: Networks
    concepts: list[Concept] | None
    width: int
    tokens: int
    note: str

    @classmethod
    def of(cls, config: Config) -> "_Shapes":
        width, tokens, note = _text(config)
        concepts, wanted = None, config.concepts
        if wanted.source == "server" or (
            wanted.source == "file" and not Path(wanted.path).is_file()
        ):
            assumed = f"{ASSUMED_WORDINGS} wordings of a concept are assumed"
            note = "; ".join(filter(None, [note, assumed]))
        else:
            seed, rest = config.seeds[0], wanted.validation + wanted.unseen
            concepts, _ = split_concepts(wanted.load(seed), wanted.train, rest, seed=seed)
        return cls(config, config.networks.with_text(width), concepts, width, tokens, note)

    def base(self, mesh: Mesh, batch: int) -> Plan:
        """A step of the base, with all its concepts' pairs."""
        key = jax.random.key(0)
        model = nnx.eval_shape(lambda: mark_trainable(self.networks.make_generator(key)))
        config = replace(self.config.editor.base, batch_size=batch)
        count = self.config.concepts.base
        return self._gan("base", model, config, count, "mixed", mesh)

    def together(self, mesh: Mesh, group: int) -> Plan:
        """A step of so many LoRAs."""
        devices = mesh.shape["data"]
        count, mix = group + -group % devices, None
        if self.config.editor.share != "none":
            mix = self._mix(count, devices)
        parts = count if mix is None else mix.shape[1]
        model = nnx.eval_shape(
            lambda: stacked_parts(self._with_lora(), parts, shared=mix is not None)
        )
        config = self.config.editor.together
        return self._gan(f"{group} LoRAs", model, config, count, "each", mesh, mix)

    def _mix(self, count: int, devices: int) -> jax.ShapeDtypeStruct:
        """The shape of what `mixture` gives."""
        # No more words recur than there are concepts, of those that are not known yet.
        features = np.zeros((count, count))
        if self.concepts is not None:
            features = np.zeros((count, shared_words(self.concepts).shape[1]))
        return jax.ShapeDtypeStruct(mixture(features, count, multiple=devices).shape, np.float32)

    def tuning(self, mesh: Mesh, batch: int) -> Plan:
        """A step of one concept's fine-tuning."""
        model = nnx.eval_shape(self._with_lora)
        config = replace(self.config.editor.tune, batch_size=batch)
        return self._gan("one fine-tuning", model, config, 1, "one", mesh)

    def _with_lora(self) -> E2GAN:
        key = jax.random.key(0)
        return self.config.adapter.add(self.networks.make_generator(key), key)

    def _gan(
        self,
        name: str,
        generator: E2GAN,
        train: GANConfig,
        concepts: int,
        batches: Literal["mixed", "each", "one"],
        mesh: Mesh,
        mix: Any = None,
    ) -> Plan:
        """A step of the generator and the discriminator."""
        key, photos = jax.random.key(0), self.config.photos
        if batches == "one":
            photos = self.config.editor.pairs or photos
        judge = nnx.eval_shape(lambda: self.networks.make_discriminator(key))
        side, wordings = self.config.data.image_size or 32, self._wordings
        data = {
            "source": jax.ShapeDtypeStruct((photos, side, side, 3), jnp.uint8),
            "target": jax.ShapeDtypeStruct((concepts, photos, side, side, 3), jnp.uint8),
            "states": jax.ShapeDtypeStruct(
                (concepts, wordings, self.tokens, self.width), jnp.float32
            ),
            "pooled": jax.ShapeDtypeStruct((concepts, wordings, self.width), jnp.float32),
        }
        task = gan_task(generator, judge, data, train, seed=0, batches=batches, mix=mix)
        images = train.batch_size * (concepts if batches == "each" else 1)
        return trainer.plan(name, task, train.sized(photos), mesh, images=images, note=self.note)

    @property
    def _wordings(self) -> int:
        if self.concepts is None:
            return ASSUMED_WORDINGS
        return max(len(concept.texts) for concept in self.concepts)

    def generator(self, name: str, mesh: Mesh, batch: int) -> Plan:
        """A step of the denoiser of weights."""
        variant = self.config.generators[name]
        config, layout = self.config, self.config.adapter.layout(self.networks)
        concepts, count = config.concepts.train, layout.num_blocks
        arrays = {
            "blocks": jax.ShapeDtypeStruct(
                (concepts, config.checkpoints, count, layout.block), jnp.float32
            ),
            "context": jax.ShapeDtypeStruct(
                (concepts, self._wordings, self.tokens, self.width), jnp.float32
            ),
            "counts": jax.ShapeDtypeStruct((concepts,), jnp.int32),
            "mask": jax.ShapeDtypeStruct((count, layout.block), jnp.bool_),
        }
        train = replace(variant.generator.train, batch_size=batch)
        task = weight_task(self._denoiser(variant), arrays, train, seed=0)
        sized = train.sized(concepts * config.checkpoints * count)
        return trainer.plan(f"generator {name}", task, sized, mesh, note=self.note)

    def generator_updates(self, name: str, batch: int) -> int:
        """Those of every seed's denoiser of weights."""
        config = self.config
        blocks = config.adapter.layout(config.networks).num_blocks
        train = replace(config.generators[name].generator.train, batch_size=batch)
        sized = train.sized(config.concepts.train * config.checkpoints * blocks)
        return len(config.seeds) * sized.steps

    def making(self, name: str, mesh: Mesh, _: int) -> Plan:
        """One concept's weights in one step."""
        variant = self.config.generators[name]
        train, count = variant.generator.train, self.config.adapter.layout(self.networks).num_blocks
        schedule = train.noise_schedule()

        def make(key, model, context):
            t = jnp.asarray(train.num_train_timesteps - 1)
            return key, {"blocks": recover(model, schedule, context, t, key, count=count)}

        key = jax.eval_shape(lambda: jax.random.key(0))
        texts = jax.ShapeDtypeStruct((1, self.tokens, self.width), jnp.float32)
        return compile_plan(
            f"weights of one concept, {name}", make, _whole(key, mesh),
            _whole(self._denoiser(variant), mesh), _whole(texts, mesh), note=self.note,
        )  # fmt: skip

    def _denoiser(self, variant: Variant) -> WeightUNet:
        layout = self.config.adapter.layout(self.networks)
        network = fitted(variant.generator.network, layout, self.width)
        return nnx.eval_shape(lambda: WeightUNet(network, rngs=nnx.Rngs(0)))


def _text(config: Config) -> tuple[int, int, str]:
    """Width and number of the text's states."""
    if has_shapes(config.text):
        found = pipeline_configs(config.text, PIPELINES)[0]["text_encoder"]
        return found.hidden_size, found.max_position_embeddings, ""
    note = f"{config.text}: texts of {ASSUMED_TOKENS} x {ASSUMED_WIDTH} states are assumed"
    return ASSUMED_WIDTH, ASSUMED_TOKENS, note


def _whole(tree: PyTree, mesh: Mesh) -> PyTree:
    """On every device."""
    place = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
