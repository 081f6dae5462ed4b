"""What drawing images needs on a mesh: the sampler's own program, compiled from shapes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxsynth.adapters.inject import Constant, Trainable
from jaxsynth.diffusion.samplers import Sampler
from jaxsynth.generation.conditioners import Conditioner, Text
from jaxsynth.generation.controls import ControlledText, Setting, WithControlNets, row_of
from jaxsynth.generation.generate import GenerateConfig, merges
from jaxsynth.generation.sampler import Structure, draw_images, latent_shape, sampler_of
from jaxsynth.models.diffusion.identity import IdentityPrompted
from jaxsynth.models.diffusion.image_prompt import ImagePrompted
from jaxsynth.models.diffusion.text_to_image import TextCondition, TextToImage, encode_texts
from jaxsynth.models.diffusion.vae import AutoencoderKL
from jaxsynth.models.shapes import transform
from jaxsynth.training import sharding
from jaxsynth.training.planning import Plan, measure, shaped
from jaxsynth.weights.hf import StableDiffusion


def plan_sampler(
    name: str,
    model: nnx.Module,
    vae: AutoencoderKL,
    conditioner: Conditioner,
    sampler: Sampler,
    shape: tuple[int, int, int],
    rows: Mapping[str, tuple[tuple[int, ...], Any]],
    mesh: Mesh,
    *,
    batch_size: int,
    tables: PyTree = None,
    adapters: int = 0,
    note: str = "",
) -> Plan:
    """The program of `ImageSampler` for one batch; the networks and `tables` may be of shapes.

    `rows` are the conditioner's: of each the shape and type of one image's. Of several `adapters`,
    which differ in what is `Trainable`, each image runs its own.
    """
    graphdef, factors, constants, frozen = nnx.split(model, Trainable, Constant, ...)
    routed = adapters > 1
    if routed:
        factors = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((adapters, *x.shape), x.dtype), factors
        )
    vae_graph, vae_state = nnx.split(vae)
    whole = NamedSharding(mesh, PartitionSpec())

    def everywhere(tree: PyTree) -> PyTree:
        return shaped(tree, jax.tree.map(lambda _: whole, tree))

    base = shaped(frozen, sharding.shardings_for(frozen, mesh, conditioner.table))
    decoder = shaped(vae_state, sharding.shardings_for(vae_state, mesh, sharding.VAE))
    networks = ((everywhere(factors), None), (everywhere(constants), base))
    arrays = (networks, decoder, everywhere(tables), everywhere(sampler))
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    count = -(-batch_size // parts) * parts
    place = NamedSharding(mesh, sharding.BATCH)

    def row(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *shape), jnp.dtype(dtype), sharding=place)

    keys = jax.random.key_data(jax.random.key(0))
    structure = Structure(graphdef, routed, tuple(getattr(model, "stacked", ())))
    batch = (
        row(keys.shape, keys.dtype),
        {field: row(*kind) for field, kind in rows.items()},
        row((), jnp.int32) if routed else None,
    )
    traced = draw_images.trace(structure, vae_graph, conditioner, shape, arrays, *batch)
    return measure(
        name, traced, mesh.size, (arrays, batch), (base, decoder), images=count, note=note
    )


def plan_images(
    name: str,
    pipeline: StableDiffusion,
    config: GenerateConfig,
    mesh: Mesh,
    *,
    prompts: int,
    adapt: Callable[[TextToImage], TextToImage] | None = None,
    adapters: int = 0,
    prompted: Callable[[TextToImage], ImagePrompted] | None = None,
    moving: Callable[[TextToImage], TextToImage] | None = None,
    note: str = "",
) -> Plan:
    """The program of `Generator` for one batch; `pipeline` may be of shapes.

    `adapt` puts an adapter into the networks. One alone is merged where the generator merges it;
    of several `adapters` each image runs its own. `prompted` puts adapters of images in, one image
    for each, or an InstantID, and `moving` motion modules, with whole animations in a batch.
    """
    conditioner: Text = Text(config.guidance_scale, config.guidance_rescale)
    rows: dict[str, tuple[tuple[int, ...], Any]] = {"prompt": ((), jnp.int32)}
    shape = latent_shape(pipeline)
    model = pipeline.networks
    if adapt is not None:
        adapted = transform(adapt, model)
        model = model if adapters < 2 and merges(pipeline, adapted) else adapted
    states = text_states(pipeline, prompts)
    if prompted is not None:
        model = transform(prompted, model)
        width, dtype = states.states.shape[-1], states.states.dtype
        tokens = sum(part.config.tokens for part in model.image_projections)
        more = jax.ShapeDtypeStruct((prompts, tokens, width), dtype)
        states = jax.eval_shape(TextCondition.followed_by, states, more)
        if isinstance(model, IdentityPrompted):
            setting = Setting(1.0, False, (-tokens, None))
            conditioner = ControlledText(
                config.guidance_scale, config.guidance_rescale, controls=(setting,), tokens=tokens
            )
            down = pipeline.vae.config.downscale
            rows[row_of(0)] = ((shape[0] * down, shape[1] * down, 3), jnp.uint8)
            model = transform(lambda own: WithControlNets(own, [own.identity_net]), model)
    if moving is not None:
        model = transform(moving, model)
    return plan_sampler(
        name,
        model,
        pipeline.vae,
        conditioner,
        sampler_of(pipeline, config.sampler, config.num_inference_steps),
        shape,
        rows,
        mesh,
        batch_size=config.batch_size,
        tables=(states, states),
        adapters=adapters,
        note=note,
    )


def text_states(pipeline: StableDiffusion, texts: int) -> TextCondition:
    """The shapes of what the denoiser is told by so many texts, with sizes where it reads them."""
    ids = jax.ShapeDtypeStruct((texts, *pipeline.tokenizer.shape), jnp.int32)
    found = jax.eval_shape(encode_texts, pipeline.networks, ids)
    return jax.eval_shape(lambda text: text.sized(jnp.zeros(6)), found)
