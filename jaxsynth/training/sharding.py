"""Where arrays lie on many devices: one mesh, one table of path rules per family of networks.

Networks carry no annotations, because annotated construction fails without a mesh. Instead each
leaf's dotted path is looked up in a table of (regex, PartitionSpec); the first match wins and an
unmatched path is an error, so a new layer cannot end up replicated unnoticed. The rules place the
tensor-parallel axes (attention and feed-forward, Megatron's columns then rows); what they leave
free, the generic FSDP rule cuts along its largest divisible axis. Adapters are replicated.

    mesh = make_mesh(data=2, fsdp=4)
    frozen = shard(frozen, mesh, UNET)
    state = replicate(init_state(trainable, tx, key), mesh)
    fit(state, frozen, batches, step, place=partial(shard_batch, mesh=mesh), ...)
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxsynth.core.errors import UserError
from jaxsynth.core.limits import Count, Range
from jaxsynth.core.words import counted

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
# Below this many elements an array is not worth the gathers that cutting it costs.
MIN_SIZE = 2**16

Table = Sequence[tuple[str, PartitionSpec]]

_COLUMNS = PartitionSpec(None, "tensor")  # of a kernel (in, out): every device makes some outputs
_ROWS = PartitionSpec("tensor", None)  # the layer after: partial sums, then one all-reduce
_PART = PartitionSpec("tensor")
_FREE = PartitionSpec()

_DIFFUSERS_ATTENTION: Table = (
    (r"\.to_[qkv]\.kernel$", _COLUMNS),
    (r"\.to_[qkv]\.bias$", _PART),
    (r"\.to_out\.0\.kernel$", _ROWS),
    (r"\.to_out\.0\.bias$", _FREE),
)
# Networks in diffusers' and transformers' names. Specs name the trailing axes.
UNET: Table = (
    *_DIFFUSERS_ATTENTION,
    (r"\.ff\.net\.0\.proj\.kernel$", _COLUMNS),
    (r"\.ff\.net\.0\.proj\.bias$", _PART),
    (r"\.ff\.net\.2\.kernel$", _ROWS),
    (r"\.ff\.net\.2\.bias$", _FREE),
    (r"\.(proj_in|proj_out|time_emb_proj)\.(kernel|bias)$", _FREE),
    (r"(^|\.)(time|add)_embedding\.linear_[12]\.(kernel|bias)$", _FREE),
    (r"(^|\.)conv(_in|_out|_shortcut|[12])?\.(kernel|bias)$", _FREE),
    (r"(^|\.)(norm[123]?|conv_norm_out)\.(scale|bias)$", _FREE),
    # What reads images as prompts.
    (r"\.to_[kv]_ip\.\d+\.kernel$", _COLUMNS),
    (r"\.attn2\.masks\.\d+$", _FREE),
    (r"(^|\.)image_projections\.\d+\..*(kernel|bias|scale|latents)$", _FREE),
)
CONTROLNET: Table = (
    *UNET,
    (r"(^|\.)controlnet_(down_blocks\.\d+|mid_block)\.(kernel|bias)$", _FREE),
    (r"(^|\.)controlnet_cond_embedding\.blocks\.\d+\.(kernel|bias)$", _FREE),
)
WEIGHT_UNET: Table = (
    *UNET,
    (r"(^|\.)index_embedding\.linear_[12]\.(kernel|bias)$", _FREE),
    (r"(^|\.)(downsampler|upsampler)\.(kernel|bias)$", _FREE),
    (r"(^|\.)position$", _FREE),
)
# Also where its blocks' parameters are stacked on a leading axis.
DIT: Table = (
    *_DIFFUSERS_ATTENTION,
    (r"\.ff\.net\.0\.proj\.kernel$", _COLUMNS),
    (r"\.ff\.net\.0\.proj\.bias$", _PART),
    (r"\.ff\.net\.2\.kernel$", _ROWS),
    (r"\.ff\.net\.2\.bias$", _FREE),
    (r"\.norm1\.linear\.(kernel|bias)$", _FREE),
    (r"(^|\.)pos_embed\.proj\.(kernel|bias)$", _FREE),
    (r"(^|\.)time_embedder\.linear_[12]\.(kernel|bias)$", _FREE),
    (r"(^|\.)class_embedder\.embedding_table\.embedding$", _FREE),
    (r"(^|\.)proj_out_[12]\.(kernel|bias)$", _FREE),
)
VAE: Table = (
    *_DIFFUSERS_ATTENTION,
    (r"(^|\.)(post_quant_conv|quant_conv)\.(kernel|bias)$", _FREE),
    (r"(^|\.)conv(_in|_out|_shortcut|[12])?\.(kernel|bias)$", _FREE),
    (r"\.(norm[12]|group_norm|conv_norm_out)\.(scale|bias)$", _FREE),
)
# CLIP's and SigLIP's two towers.
CLIP: Table = (
    (r"\.self_attn\.[qkv]_proj\.kernel$", _COLUMNS),
    (r"\.self_attn\.[qkv]_proj\.bias$", _PART),
    (r"\.self_attn\.out_proj\.kernel$", _ROWS),
    (r"\.mlp\.fc1\.kernel$", _COLUMNS),
    (r"\.mlp\.fc1\.bias$", _PART),
    (r"\.mlp\.fc2\.kernel$", _ROWS),
    (r"\.(self_attn\.out_proj|mlp\.fc2)\.bias$", _FREE),
    (r"\.(token_embedding|position_embedding)\.embedding$", _FREE),
    (r"\.(class_embedding|patch_embedding\.(kernel|bias))$", _FREE),
    (r"(^|\.)(layer_norm[12]|final_layer_norm|pre_layrnorm|post_layernorm)\.(scale|bias)$", _FREE),
    (r"(^|\.)(text_projection|visual_projection)\.kernel$", _FREE),
    (r"(^|\.)logit_(scale|bias)$", _FREE),
    # SigLIP's pooling of images, whose three projections are one matrix, and head of texts.
    (r"\.head\.(probe|attention\.in_proj_weight|attention\.in_proj_bias)$", _FREE),
    (r"\.head\.(attention\.out_proj\.|layernorm\.)?(kernel|scale|bias)$", _FREE),
)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; `data` -1 takes all that are left. It decides no result."""

    data: Annotated[int, Range(-1)] = field(default=-1, metadata={"identity": False})
    fsdp: Count = field(default=1, metadata={"identity": False})
    tensor: Count = field(default=1, metadata={"identity": False})

    def make(self) -> Mesh | None:
        """The mesh over all devices of all processes; None for one device, which needs none.

        UserError where the sizes do not fit the devices.
        """
        if jax.device_count() == 1 and self.data in (-1, 1) and self.fsdp == self.tensor == 1:
            return None
        try:
            return make_mesh(self.data, self.fsdp, self.tensor)
        except ValueError as error:
            raise UserError(f"mesh: {error}") from None


def local_mesh() -> Mesh | None:
    """This process's devices along "data", for work that needs no other process; None for one."""
    devices = jax.local_devices()
    return None if len(devices) == 1 else make_mesh(devices=devices)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes "data", "fsdp" and "tensor"; one of the sizes may be -1, the rest.

    The axes are Auto: XLA chooses the shardings between what the tables pin. JAX's default became
    Explicit, under which a convolution over sharded parameters is an error.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [data, fsdp, tensor]
    if shape.count(-1) == 1:
        shape[shape.index(-1)] = len(devices) // -math.prod(shape)
    if min(shape) < 1 or math.prod(shape) != len(devices):
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ValueError(
            f"data={data}, fsdp={fsdp}, tensor={tensor} do not make "
            f"{counted(len(devices), 'device')}; "
            f"expected sizes that do, each of {', '.join(map(str, divisors))}"
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def shardings_for(tree: PyTree, mesh: Mesh, table: Table, *, min_size: int = MIN_SIZE) -> PyTree:
    """The NamedSharding of every leaf (arrays or shapes), in a tree of the same structure.

    A rule's axis that does not divide its dimension (an odd number of channels) is left out for
    that leaf. Optimiser state follows its parameters, because its paths end with theirs.

    Raises:
        ValueError: paths that no rule of the table matches; they are named.
    """
    unmatched: list[str] = []

    def choose(path, leaf) -> NamedSharding:
        if math.prod(leaf.shape) <= 1:  # counters, keys, scalars
            return NamedSharding(mesh, PartitionSpec())
        name = dotted(path)
        rule = next((spec for pattern, spec in table if re.search(pattern, name)), None)
        if rule is None:
            unmatched.append(name)
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, _spec(leaf.shape, rule, mesh, min_size))

    chosen = jax.tree_util.tree_map_with_path(choose, tree)
    if unmatched:
        raise ValueError(
            f"no sharding rule for {len(unmatched)} paths, such as {unmatched[:5]}; the table has "
            f"{[pattern for pattern, _ in table]}"
        )
    return chosen


def shard(tree: PyTree, mesh: Mesh, table: Table, *, min_size: int = MIN_SIZE) -> PyTree:
    """`tree` placed by `table`; of several processes, each passes the same whole values."""
    return place(tree, shardings_for(tree, mesh, table, min_size=min_size))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """`tree` whole on every device, as adapters and their optimiser state should be."""
    return place(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def shard_batch(batch: PyTree, mesh: Mesh, *, spec: PartitionSpec = BATCH) -> PyTree:
    """This process's rows of a batch, as part of one global batch over "data" and "fsdp".

    For stacked adapters, whose batches have a leading stack axis, use `spec=PartitionSpec("data")`.

    Raises:
        ValueError: the global number of rows is not divisible by the devices that share them.
    """
    sharding = NamedSharding(mesh, spec)
    names = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
    parts = math.prod(mesh.shape[name] for name in names)

    def put(path, leaf):
        rows = np.shape(leaf)[0] * jax.process_count()
        if rows % parts:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has {counted(rows, 'row')} in all processes, "
                f"not divisible over {names} = {parts} devices"
            )
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree_util.tree_map_with_path(put, batch)


def gather(tree: PyTree) -> PyTree:
    """`tree` off the mesh: every leaf whole on the default device of each process."""

    def whole(leaf: jax.Array) -> jax.Array:
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_put(np.asarray(leaf))

    return jax.tree.map(whole, tree)


def dotted(path: tuple) -> str:
    """A leaf's path in Hugging Face's module names: without NNX's `value` and adapters' `base`."""
    parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    return ".".join(part for part in parts if part not in ("value", "base"))


def _spec(shape: tuple[int, ...], rule: PartitionSpec, mesh: Mesh, min_size: int) -> PartitionSpec:
    """The rule on the trailing axes, then "fsdp" on the largest free axis that it divides.

    Of equal axes the last, a kernel's outputs: cut inputs would tempt XLA into partial sums.
    """
    axes: list[str | None] = [None] * (len(shape) - len(rule)) + list(rule)
    axes = axes[len(axes) - len(shape) :]
    for i, axis in enumerate(axes):
        if axis is not None and (mesh.shape[axis] == 1 or shape[i] % mesh.shape[axis]):
            axes[i] = None
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and math.prod(shape) >= min_size:
        free = [i for i, axis in enumerate(axes) if axis is None and shape[i] % fsdp == 0]
        if free:
            axes[max(free, key=lambda i: (shape[i], i))] = "fsdp"
    return PartitionSpec(*axes)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """`tree` with each leaf where `shardings` says; of several processes, each has the whole."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_put_everywhere, tree, shardings)


def _put_everywhere(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Every process gives its own devices their parts of the value that it holds whole."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put_everywhere(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
