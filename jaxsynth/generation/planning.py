"""What generating images needs on a mesh: the sampler's own program, compiled from shapes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsynth.adapters.inject import Constant, Trainable
from jaxsynth.generation.conditioners import Text
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.generation.sampler import Structure, draw_images, latent_shape, sampler_of
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.models.shapes import transform
from jaxsynth.training import sharding
from jaxsynth.training.planning import Plan, measure, shaped
from jaxsynth.weights.hf import StableDiffusion


def plan_images(
    name: str,
    pipeline: StableDiffusion,
    config: GenerateConfig,
    mesh: Mesh,
    *,
    prompts: int,
    adapt: Callable[[TextToImage], TextToImage] | None = None,
    adapters: int = 0,
    note: str = "",
) -> Plan:
    """The program of `Generator` for one batch; `pipeline` may be of shapes.

    `adapt` puts an adapter into the networks. With `adapters` 0 it is merged, as one adapter is;
    otherwise each image runs one of so many.
    """
    model = TextToImage(pipeline.unet, pipeline.text_encoder)
    if adapt is not None and adapters:
        model = transform(adapt, model)
    graphdef, factors, constants, frozen = nnx.split(model, Trainable, Constant, ...)
    if adapters:
        factors = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((adapters, *x.shape), x.dtype), factors
        )
    vae_graph, vae = nnx.split(pipeline.vae)
    tokens, width = pipeline.tokenizer.max_length, pipeline.text_encoder.config.hidden_size
    dtype = jax.eval_shape(
        lambda text: text(jnp.zeros((1, tokens), jnp.int32)).last_hidden_state,
        pipeline.text_encoder,
    ).dtype
    states = jax.ShapeDtypeStruct((prompts, tokens, width), dtype)
    sampler = sampler_of(pipeline, config.sampler, config.num_inference_steps)
    whole = NamedSharding(mesh, PartitionSpec())

    def everywhere(tree):
        return shaped(tree, jax.tree.map(lambda _: whole, tree))

    conditioner = Text(config.guidance_scale)
    base = shaped(frozen, sharding.shardings_for(frozen, mesh, conditioner.table))
    decoder = shaped(vae, sharding.shardings_for(vae, mesh, sharding.VAE))
    networks = ((everywhere(factors), None), (everywhere(constants), base))
    arrays = (networks, decoder, everywhere((states, states)), everywhere(sampler))
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-config.batch_size // parts) * parts
    place = NamedSharding(mesh, sharding.BATCH)

    def row(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), jnp.dtype(dtype), sharding=place)

    keys = jax.random.key_data(jax.random.key(0))
    structure = Structure(graphdef, bool(adapters), ())
    traced = draw_images.trace(
        structure,
        vae_graph,
        conditioner,
        latent_shape(pipeline),
        arrays,
        row(*keys.shape, dtype=str(keys.dtype)),
        {"prompt": row()},
        row(),
    )
    return measure(name, traced, mesh.size, (base, decoder), note=note)
