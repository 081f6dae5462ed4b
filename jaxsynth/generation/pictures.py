"""Images that drawing begins with: one to vary, one to edit, one to paint a part of.

What a base does with them is for its denoiser to say. A text-to-image base starts from the image
with noise on it and takes the last steps of the sampler alone, so many as `strength` says (SDEdit,
Meng et al. 2022, arXiv 2108.01073). An InstructPix2Pix base reads the image beside the noise, and
an inpainting base what is around a mask (`conditioners.ImageEdit`, `conditioners.Inpaint`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt8

from jaxsynth.core.errors import UserError
from jaxsynth.generation.conditioners import ImageEdit, Inpaint, Text
from jaxsynth.weights.hf import EDITING, INPAINTING, TEXT_TO_IMAGE, StableDiffusion, kind_of

# diffusers' defaults.
STRENGTH, IMAGE_GUIDANCE = 0.8, 1.5


@dataclass(frozen=True)
class Pictures:
    """The images of each prompt, of the size to be drawn: image i takes them in turns.

    `masks` (True where a base for inpainting paints) go with the images. `strength` is for bases of
    texts (0.8 unless given) and of inpainting (the image's place is all noise unless given),
    `image_guidance_scale` for those that edit (1.5 unless given).
    """

    images: Sequence[UInt8[np.ndarray, "n h w 3"]]
    masks: Sequence[Bool[np.ndarray, "n h w"]] | None = None
    strength: float | None = None
    image_guidance_scale: float | None = None

    def rows(
        self, names: Sequence[str], labels: Int[np.ndarray, " b"], indices: Int[np.ndarray, " b"]
    ) -> dict[str, np.ndarray]:
        """The rows `names` of a batch of images, for `sampler.ImageSampler`."""
        sources = {"start": self.images, "pixels": self.images, "mask": self.masks}

        def pick(of_prompts: Sequence[np.ndarray]) -> np.ndarray:
            pairs = zip(labels, indices, strict=True)
            return np.stack([of_prompts[c][i % len(of_prompts[c])] for c, i in pairs])

        return {name: pick(sources[name]) for name in names}


@dataclass(frozen=True)
class Beginning:
    """What a base makes of `Pictures`: a conditioner, the sampler's strength, the rows it reads."""

    conditioner: Text
    strength: float | None = None
    rows: tuple[str, ...] = ()


def beginning_of(
    pipeline: StableDiffusion,
    text: Text,
    pictures: Pictures | None,
    size: tuple[int, int],
) -> Beginning:
    """How the base draws, with or without images of `size` pixels (height, width).

    `text` is how a base of texts draws without any.

    UserError for a base that needs images or masks and has none, and for settings, masks, or images
    of a size that it has no use for.
    """
    kind = kind_of(pipeline.unet, pipeline.vae)
    name, plain = "draws texts", kind in TEXT_TO_IMAGE
    if not plain:
        name = "edits images" if kind in EDITING else "paints parts of images"
    if pictures is None:
        if not plain:
            raise UserError(f"the base {name} and is given none: say which, as by --image=FILE")
        return Beginning(text)
    for images in (*pictures.images, *(pictures.masks or ())):
        if not len(images) or images.shape[1:3] != size:
            raise UserError(
                f"images to begin with of shape {images.shape}, expected some of "
                f"{size[1]}x{size[0]} pixels (width x height)"
            )
    unused = [
        text
        for text, given, users in (
            ("a mask", pictures.masks, INPAINTING),
            ("a strength", pictures.strength, TEXT_TO_IMAGE + INPAINTING),
            ("a guidance of the image", pictures.image_guidance_scale, EDITING),
            ("a rescaled guidance", text.rescale or None, TEXT_TO_IMAGE + INPAINTING),
        )
        if given is not None and kind not in users
    ]
    if unused:
        raise UserError(f"the base {name}, and has no use for {unused[0]}; leave it out")
    if kind in EDITING:
        scale = pictures.image_guidance_scale
        scale = IMAGE_GUIDANCE if scale is None else scale
        edit = ImageEdit(text.guidance_scale, image_guidance_scale=scale)
        return Beginning(edit, rows=("pixels",))
    if kind in INPAINTING:
        if pictures.masks is None:
            raise UserError(f"the base {name} and is given no mask: say which, as by --mask=FILE")
        paint = Inpaint(text.guidance_scale, text.rescale)
        if pictures.strength is None or pictures.strength == 1:
            return Beginning(paint, rows=("pixels", "mask"))
        return Beginning(paint, pictures.strength, ("pixels", "mask", "start"))
    strength = STRENGTH if pictures.strength is None else pictures.strength
    return Beginning(text, strength, ("start",))
