"""The families of Stable Diffusion that come in one file, and what all files of each share.

The UNet and the autoencoder lie under the same names in all. The text encoder of 1.x is CLIP's in
Hugging Face's names, that of 2.x OpenCLIP's in its own; SDXL has one of each (arXiv 2307.01952,
section 2.1), and its refiner, which is read nowhere here, has the second in the place of the first.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxsynth.weights.pipeline_parts import DOUBLE, SINGLE

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _CONDITIONER = "cond_stage_model.", "conditioner."
_REFINER = f"{_CONDITIONER}embedders.0.model."
# The noise of all published models.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Family:
    """One family: the prefix of each network's keys, and the scheduler's config.

    `open_clip` is the text encoder in OpenCLIP's names, "" for none. `vae` are fields of the
    autoencoder's config that no shape tells.
    """

    name: str
    texts: dict[str, str]
    open_clip: str
    scheduler: dict[str, Any]
    vae: dict[str, Any]

    @property
    def parts(self) -> dict[str, tuple[type, type]]:
        """Each network's class and its config's."""
        return DOUBLE if self.double else SINGLE

    @property
    def double(self) -> bool:
        """Whether it has two text encoders."""
        return len(self.texts) == 2

    @property
    def prefixes(self) -> dict[str, str]:
        """The beginnings of each network's keys."""
        return {"unet": UNET, "vae": VAE, **self.texts}


FIRST = Family(
    "Stable Diffusion 1",
    {"text_encoder": f"{_CLIP}transformer."},
    open_clip="",
    scheduler={"_class_name": "PNDMScheduler", "skip_prk_steps": True, **SCHEDULE},
    vae={},
)
SECOND = Family(
    "Stable Diffusion 2",
    {"text_encoder": f"{_CLIP}model."},
    open_clip="text_encoder",
    scheduler={"_class_name": "DDIMScheduler", **SCHEDULE},
    vae={},
)
XL = Family(
    "SDXL",
    {
        "text_encoder": f"{_CONDITIONER}embedders.0.transformer.",
        "text_encoder_2": f"{_CONDITIONER}embedders.1.model.",
    },
    open_clip="text_encoder_2",
    scheduler={
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "leading",
        **SCHEDULE,
    },
    vae={"scaling_factor": 0.13025},
)


def family_of(keys: Iterable[str], *, xl: bool) -> Family:
    """The family of a file's keys; `xl` where layers of its UNet are SDXL's."""
    if xl:
        return XL
    start = SECOND.prefixes["text_encoder"]
    return SECOND if any(key.startswith(start) for key in keys) else FIRST


def is_refiner(keys: Iterable[str]) -> bool:
    """Whether a file of SDXL is the refiner's, which has no text encoder of CLIP's."""
    return any(key.startswith(_REFINER) for key in keys)
