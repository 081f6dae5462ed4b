"""What a run of generated weights needs on a mesh, from a configuration alone.

The programs are those of the base, of a group of LoRAs together (their stack axis over "data"), of
one fine-tuning, of each generator's training (its state cut by `sharding.WEIGHT_UNET`, the batch
over "data" and "fsdp"), and of making one concept's weights. Nothing of their size is allocated.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxsynth.adapters.flatten import Layout
from jaxsynth.adapters.inject import (
    AdapterState,
    Trainable,
    freeze,
    mark_trainable,
    trainable_variables,
)
from jaxsynth.core.documents import read_json
from jaxsynth.methods.weightgen.config import Config, Variant
from jaxsynth.methods.weightgen.editors import with_text_width
from jaxsynth.models.diffusion.weight_unet import WeightUNet
from jaxsynth.models.gan.e2gan import E2GAN
from jaxsynth.models.gan.patchgan import PatchGAN
from jaxsynth.tasks import weight_diffusion
from jaxsynth.tasks.gan import (
    GANConfig,
    Networks,
    adapted,
    draw_each,
    draw_mixed,
    draw_one,
    init_gan,
    make_step,
)
from jaxsynth.tasks.weight_generator import fitted
from jaxsynth.training import sharding
from jaxsynth.training.planning import Plan, plan
from jaxsynth.training.step import init_state
from jaxsynth.weights.hub import resolve

# Stable Diffusion 1.x's, where the text encoder is not at hand.
ASSUMED_WIDTH, ASSUMED_TOKENS = 768, 77
WORDINGS = 4


def plans(config: Config, mesh: Mesh) -> list[Plan]:
    """One for each program of a run; ValueError where a batch does not divide over the mesh."""
    width, tokens, note = _text(config)
    editor = with_text_width(config.editor, width)
    key = jax.random.key(0)
    base = nnx.eval_shape(lambda: mark_trainable(E2GAN(editor.generator, rngs=nnx.Rngs(0))))

    def with_lora() -> E2GAN:
        model = adapted(E2GAN(editor.generator, rngs=nnx.Rngs(0)), config.lora, key)
        return model if editor.train_down else freeze(model, ["lora_A"])

    lora = nnx.eval_shape(with_lora)
    judge = nnx.eval_shape(lambda: PatchGAN(editor.discriminator, rngs=nnx.Rngs(0)))
    gan = partial(_gan, config=config, mesh=mesh, judge=judge, text=(width, tokens), note=note)
    group = editor.group or config.concepts.train
    made = [
        gan("base", base, train=editor.base, concepts=config.concepts.base, draw=draw_mixed),
        gan(f"{group} LoRAs", lora, train=editor.together, concepts=group, draw=draw_each),
        gan("one fine-tuning", lora, train=editor.tune, concepts=1, draw=draw_one),
    ]
    values = {name: one.get_value() for name, one in trainable_variables(lora).items()}
    layout = Layout.of(AdapterState(values, config.lora), config.block)
    for name, variant in config.generators.items():
        made += _generator(name, variant, layout, config, mesh, (width, tokens), note)
    return made


def _text(config: Config) -> tuple[int, int, str]:
    """Width and number of the text's states."""
    if config.text.split("/")[0] == "tiny" or Path(config.text).is_dir():
        found = read_json(resolve(config.text) / "text_encoder" / "config.json")
        return found["hidden_size"], found["max_position_embeddings"], ""
    note = f"{config.text}: texts of {ASSUMED_TOKENS} x {ASSUMED_WIDTH} states are assumed"
    return ASSUMED_WIDTH, ASSUMED_TOKENS, note


def _gan(
    name: str,
    generator: E2GAN,
    *,
    config: Config,
    mesh: Mesh,
    judge: PatchGAN,
    text: tuple[int, int],
    note: str,
    train: GANConfig,
    concepts: int,
    draw: Any,
) -> Plan:
    """A step of the generator and the discriminator."""
    together = draw is draw_each
    graph, trainable, frozen = nnx.split(generator, Trainable, ...)
    graph_d, trainable_d = nnx.split(nnx.eval_shape(lambda: mark_trainable(judge)))
    parts, devices = concepts, mesh.shape["data"]
    if together:
        if config.editor.share != "none":
            # One part for all, one for each concept, and no more words that recur than concepts.
            parts = 1 + 2 * concepts
            parts += -parts % devices
        trainable = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((parts, *x.shape), x.dtype), trainable
        )
    state = jax.eval_shape(
        lambda g, d: init_gan(g, d, train, jax.random.key(0)), trainable, trainable_d
    )
    networks = Networks(graph, graph_d, stacked=together)
    step = make_step(networks, train, partial(draw, count=train.batch_size))
    side, (width, tokens) = config.data.image_size, text
    shapes = {
        "source": ((config.photos, side, side, 3), jnp.uint8),
        "target": ((concepts, config.photos, side, side, 3), jnp.uint8),
        "states": ((concepts, WORDINGS, tokens, width), jnp.float32),
        "pooled": ((concepts, WORDINGS, width), jnp.float32),
    }
    if parts != concepts:
        shapes["mix"] = ((concepts, parts), jnp.float32)
    data = {name: jax.ShapeDtypeStruct(*one) for name, one in shapes.items()}
    over = PartitionSpec("data") if together and concepts % devices == 0 else None

    def place(path, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own = over is not None and len(leaf.shape) and leaf.shape[0] in (concepts, parts)
        of_photos = "source" in jax.tree_util.keystr(path)
        of_judge = "discriminator" in jax.tree_util.keystr(path)
        spec = over if own and not of_photos and not of_judge else PartitionSpec()
        return _at(leaf, NamedSharding(mesh, spec))

    state, data = (jax.tree_util.tree_map_with_path(place, tree) for tree in (state, data))
    return plan(name, step, state, _whole(frozen, mesh), data, note=note)


def _generator(
    name: str,
    variant: Variant,
    layout: Layout,
    config: Config,
    mesh: Mesh,
    text: tuple[int, int],
    note: str,
) -> list[Plan]:
    """Training the denoiser of weights, and one concept's weights in one step."""
    train, (width, tokens) = variant.generator.train, text
    weight_diffusion.check_rows(train, mesh)
    network = fitted(variant.generator.network, layout, width)
    model = nnx.eval_shape(lambda: WeightUNet(network, rngs=nnx.Rngs(0)))
    graph, trainable, frozen = nnx.split(
        nnx.eval_shape(lambda: mark_trainable(WeightUNet(network, rngs=nnx.Rngs(0)))),
        Trainable,
        ...,
    )
    tx, step = weight_diffusion.make_step(graph, train, mesh)
    init = partial(init_state, tx=tx, ema=bool(train.ema_decay))
    state = jax.eval_shape(lambda values: init(values, key=jax.random.key(0)), trainable)
    places = sharding.shardings_for(state, mesh, sharding.WEIGHT_UNET)
    concepts, count = config.concepts.train, layout.num_blocks
    data = {
        "blocks": jax.ShapeDtypeStruct(
            (concepts, config.checkpoints, count, layout.block), jnp.float32
        ),
        "context": jax.ShapeDtypeStruct((concepts, WORDINGS, tokens, width), jnp.float32),
        "counts": jax.ShapeDtypeStruct((concepts,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((count, layout.block), jnp.bool_),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    schedule = train.noise_schedule()

    def make(key, model, context):
        t = jnp.asarray(train.num_train_timesteps - 1)
        found = weight_diffusion.recover(model, schedule, context, t, key, count=count)
        return key, {"blocks": found}

    trained = plan(
        f"generator {name}", step, jax.tree.map(_at, state, places), _whole(frozen, mesh),
        _whole(data, mesh), steps=train.steps_per_call, note=note,
    )  # fmt: skip
    texts = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
    used = plan(
        f"weights of one concept, {name}", make, _whole(data["key"], mesh), _whole(model, mesh),
        _whole(texts, mesh), note=note,
    )  # fmt: skip
    return [trained, used]


def _whole(tree: PyTree, mesh: Mesh) -> PyTree:
    """On every device."""
    return jax.tree.map(lambda x: _at(x, NamedSharding(mesh, PartitionSpec())), tree)


def _at(leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
