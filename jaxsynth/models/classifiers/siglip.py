"""SigLIP's and SigLIP 2's image tower with a linear head of classes.

Zhai et al. 2023 (arXiv 2303.15343); Tschannen et al. 2025 (arXiv 2502.14786). The head reads what
the tower's attention pools, as linear probes of the papers do; transformers' classifier leaves that
out and reads the mean of the patches. Modules carry the names of transformers' files.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.models import layers
from jaxsynth.models.fields import known_fields, square_sizes, unused_fields
from jaxsynth.models.siglip import SiglipVisionConfig, SiglipVisionTransformer

_TYPES = ("siglip", "siglip_vision_model")
_UNUSED = unused_fields("eos_token_id text_config")


@dataclasses.dataclass(frozen=True)
class SiglipClassifierConfig(SiglipVisionConfig):
    """Shape of the image tower; field names and defaults are transformers'.

    model_type: "siglip" for the files of both towers, "siglip_vision_model" for one. A head reads
    the attention's pooling where `vision_use_head`, else the mean of the patches. num_labels 0
    leaves the head out.
    """

    model_type: str = "siglip"
    num_labels: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.model_type not in _TYPES:
            raise ValueError(
                f"SiglipClassifierConfig.model_type: {self.model_type!r}, expected {_TYPES}"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a config.json; an unknown field is a ValueError naming it."""
        tower = {}
        if config.get("model_type", _TYPES[0]) == _TYPES[0]:
            tower = config.get("vision_config") or {}
            if not isinstance(tower, Mapping):
                raise ValueError(f"vision_config: {type(tower).__name__}, expected an object")
            tower = {**tower, "model_type": _TYPES[0]}
            # Those that say what the classifier is; the tower's are in its own object.
            config = {name: value for name, value in config.items() if name != "vision_config"}
        given = {**square_sizes(tower), **square_sizes(config)}
        if given.get("num_labels"):
            # transformers' classifier of such files passes over the pooling.
            given["vision_use_head"] = False
        return cls(**known_fields(cls, given, ignored=_UNUSED))

    @property
    def prefix(self) -> str:
        return "vision_model"

    @property
    def left_out(self) -> str:
        """A pattern of keys in its files that no part of it has: the other tower, buffers."""
        others = r"text_model\..*|logit_scale|logit_bias|(.*\.)?position_ids"
        return others if self.vision_use_head else rf"{others}|(vision_model\.)?head\..*"


class SiglipForImageClassification(nnx.Module):
    """The image tower with a linear head on its pooled feature."""

    def __init__(self, config: SiglipClassifierConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.vision_model = SiglipVisionTransformer(config, dtype=dtype, rngs=rngs)
        if config.num_labels:
            self.classifier = layers.Linear(
                config.hidden_size, config.num_labels, dtype=dtype, rngs=rngs
            )

    def features(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """What the head reads."""
        return self.vision_model(pixels).pooled

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        """Logits of normalised images."""
        return self.classifier(self.features(pixels))
