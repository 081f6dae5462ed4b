"""How a pre-trained transformer is given a new data set: DiffScaler's Affiner and its rivals.

Each recipe turns a frozen base into a network whose `Trainable` variables are what it learns. All
but `scratch` start from the base with one new class row per class, and every new row starts as the
unconditional one. Any of them also learns to follow a condition image (`with_condition`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
from flax import nnx
from jaxtyping import Array, Key

from jaxsynth.adapters import registry
from jaxsynth.adapters.inject import AdapterLayer, layers, mark_trainable, matches
from jaxsynth.adapters.kinds.affiner import AffinerConfig, add_affiner
from jaxsynth.adapters.kinds.lora import LoRAConfig, add_lora
from jaxsynth.adapters.registry import AdapterChoice
from jaxsynth.adapters.surgery.class_rows import extend_table
from jaxsynth.adapters.surgery.input_channels import extend_input
from jaxsynth.models.diffusion.dit import DiT

TABLE = "class_embedder.embedding_table"
PATCHES = "pos_embed.proj"
# Where adapters go. The paper names query, key, value and the feed-forward block.
PLACES: dict[str, tuple[str, ...]] = {
    "paper": ("to_q", "to_k", "to_v", "ff.net.0.proj", "ff.net.2"),
    "all": (
        "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2",
        "norm1.linear", "pos_embed.proj", "proj_out_1", "proj_out_2",
    ),
}  # fmt: skip
# What reads latents and writes the noise: few parameters, and data sets differ in their means.
_ENDS = ("pos_embed.proj", "proj_out_1", "proj_out_2")
# The branches and projections that DiffFit scales (arXiv 2304.06648).
_DIFFFIT = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")
# The standard deviation of the down factor times sqrt(fan_in), Kaiming-normal as in the Affiner:
# LoRA and the Affiner with ranks by layer are compared from one start.
INITIAL_SCALE = math.sqrt(2)
# The recipe that a run's `--config.adapter=` means.
CHOSEN = "adapter"


@dataclass(frozen=True)
class Sizes:
    """The ranks of Affiners and LoRA, and the adapter that a run chooses, of LoRA's rank."""

    rank: int
    lora_rank: int
    adapter: AdapterChoice = field(default_factory=AdapterChoice)


@dataclass(frozen=True)
class Adaptation:
    """A recipe with all that decides what it makes of a base: its sizes, and the seed of its start.

    `adapter` is the kind of the recipe that a run chooses, None for every other one.
    """

    recipe: str
    rank: int
    lora_rank: int
    adapter: AdapterChoice | None
    seed: int

    def apply(self, base: DiT, classes: int, *, condition_channels: int = 0) -> DiT:
        """The network to train, for `classes` new classes; see `adapted`."""
        return adapted(
            base, self.recipe, classes, rank=self.rank, lora_rank=self.lora_rank, seed=self.seed,
            adapter=self.adapter, condition_channels=condition_channels,
        )  # fmt: skip


Build = Callable[[DiT, Sizes, jax.Array], DiT]


@dataclass(frozen=True)
class Recipe:
    """`build(extended base, sizes, key)` gives the network to train.

    `whole` recipes change the base's own weights: nothing is left of it to go back to.
    """

    label: str
    build: Build
    whole: bool = False


def _free(model: DiT, place: str) -> tuple[str, ...]:
    """The targets of a placement without those that are wrapped already, by a condition's input."""
    taken = [path for path, layer in layers(model).items() if isinstance(layer, AdapterLayer)]
    return tuple(
        target for target in PLACES[place] if not any(matches(target, path) for path in taken)
    )


def _affiner(place: str, *, ranked: bool = False, **options) -> Build:
    def build(model: DiT, sizes: Sizes, key: jax.Array) -> DiT:
        ranks = {"rank": sizes.rank}
        if ranked:
            ranks = _ranks(sizes.lora_rank) | {"initial_scale": INITIAL_SCALE}
        config = AffinerConfig(**ranks | {"targets": _free(model, place)} | options)
        return add_affiner(model, config, rngs=key)

    return build


def _lora(place: str, *, ranked: bool = False) -> Build:
    def build(model: DiT, sizes: Sizes, key: jax.Array) -> DiT:
        ranks = {"rank": sizes.lora_rank}
        if ranked:
            ranks = _ranks(sizes.lora_rank) | {"init": "gaussian", "initial_scale": INITIAL_SCALE}
        return add_lora(model, LoRAConfig(**ranks, targets=_free(model, place)), rngs=key)

    return build


def _ranks(rank: int) -> dict:
    """More for the feed-forward block and less for query and key, in all as about `rank` for each.

    Found on validation images of digits: there a parameter lowers the error most.
    """
    few = {"to_q|to_k": max(rank // 4, 1), "|".join(_ENDS): max(rank // 2, 1)}
    return {"rank": max(rank - 1, 1), "rank_pattern": {r"ff\.net\..*": 2 * rank, **few}}


def _chosen(model: DiT, sizes: Sizes, key: jax.Array) -> DiT:
    config = sizes.adapter.config(targets=_free(model, "all"), defaults={"rank": sizes.lora_rank})
    return registry.add(model, config, rngs=key)


def _difffit(model: DiT, _: Sizes, key: jax.Array) -> DiT:
    config = AffinerConfig(rank=0, targets=_DIFFFIT, scale_side="output", shift=False)
    return mark_trainable(add_affiner(model, config, rngs=key), [".*bias"])


def _scratch(model: DiT, _: Sizes, key: jax.Array) -> DiT:
    fresh = DiT(model.config, dtype=model.dtype, rngs=nnx.Rngs(key))
    rows = model.class_embedder.embedding_table.rows.get_value()
    fresh = extend_table(fresh, TABLE, len(rows), start=model.config.null_label)
    return mark_trainable(fresh)


RECIPES: dict[str, Recipe] = {
    "scratch": Recipe("from scratch", _scratch, whole=True),
    "full": Recipe("full fine-tuning", lambda m, *_: mark_trainable(m), whole=True),
    "embeddings": Recipe("class rows only", lambda m, *_: m),
    "bitfit": Recipe("BitFit", lambda m, *_: mark_trainable(m, [".*bias"]), whole=True),
    "scale_shift": Recipe("scale + shift (paper)", _affiner("paper", rank=0)),
    "scale_shift_all": Recipe("scale + shift (all)", _affiner("all", rank=0)),
    "difffit": Recipe("DiffFit", _difffit, whole=True),
    "lora": Recipe("LoRA (paper)", _lora("paper")),
    "lora_all": Recipe("LoRA (all)", _lora("all")),
    "affiner": Recipe("Affiner (paper)", _affiner("paper")),
    "affiner_relu": Recipe("Affiner with ReLU (paper)", _affiner("paper", form="relu")),
    "affiner_all": Recipe("Affiner (all)", _affiner("all")),
    "affiner_zero": Recipe("Affiner, zero W_up (all)", _affiner("all", gate=False)),
    "lora_ranked": Recipe("LoRA, ranks by layer (all)", _lora("all", ranked=True)),
    "affiner_ranked": Recipe(
        "Affiner, ranks by layer (all)",
        _affiner("all", ranked=True, gate=False, scale_side="none", shift=_ENDS),
    ),
    CHOSEN: Recipe("chosen adapter", _chosen),
}


def adapted(
    base: DiT,
    name: str,
    classes: int,
    *,
    rank: int,
    lora_rank: int,
    seed: int,
    adapter: AdapterChoice | None = None,
    condition_channels: int = 0,
) -> DiT:
    """The network that recipe `name` trains: `base` with `classes` new labels from `first_label`.

    With `condition_channels` it also reads a condition image of so many channels. Raises
    ValueError for an unknown name.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r}, expected one of {', '.join(RECIPES)}")
    key = jax.random.key(seed)
    extended = extend_table(base, TABLE, classes, start=base.config.null_label)
    if condition_channels:
        extended = with_condition(extended, condition_channels, rngs=key)
    sizes = Sizes(rank, lora_rank, AdapterChoice() if adapter is None else adapter)
    return RECIPES[name].build(extended, sizes, key)


def with_condition(
    model: DiT, channels: int, *, rngs: nnx.Rngs | Key[Array, ""], gate: bool = True
) -> DiT:
    """`model` with a trainable input for condition images of `channels` channels.

    The image is of the latents' size (`ops.space_to_depth`) and enters beside them:
    the patch embedding gets a second kernel, Kaiming-normal behind a scalar gate of zero, so that
    the network starts as what it was without a zero convolution; `gate` False starts from a kernel
    of zeros instead. Adapters elsewhere then learn to use it. An image of zeros is no condition.

    `inject.merge` makes a plain DiT with `condition_channels` of it. Raises ValueError where the
    patch embedding is wrapped already, or `channels` is below 1.
    """
    extended = extend_input(model, PATCHES, channels, gate=gate, rngs=rngs)
    known = extended.config.condition_channels
    extended.config = replace(extended.config, condition_channels=known + channels)
    return extended


def first_label(base: DiT) -> int:
    """The first new label: the rows before it are the base's classes and no label."""
    return base.config.null_label + 1
