"""A face to draw: its tokens beside the text, and IdentityNet on a picture of its keypoints.

InstantID as an image prompt (`image_prompts`) and a ControlNet (`controls`) that reads the prompt's
tokens in the place of the text. Guidance leads away from the tokens of an embedding of zeros, which
IdentityNet then reads too, as in the authors' pipeline.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from jaxsynth.core.errors import UserError
from jaxsynth.generation.controls import Control
from jaxsynth.generation.image_prompts import ImagePrompt
from jaxsynth.models.diffusion.identity import Identity


def identity_parts(
    identity: Identity,
    embeddings: Sequence[Float[np.ndarray, "n d"]],
    keypoints: UInt8[np.ndarray, "p h w 3"],
    *,
    scale: float = 1.0,
    net_scale: float = 1.0,
    number: int = 0,
    name: str = "the InstantID",
) -> tuple[ImagePrompt, Control]:
    """What `Generator` takes as `image_prompts` and `controls` of a face for each text prompt.

    `embeddings[p]` are those of so many pictures of the face at text prompt p, the same number for
    each; the resampler sees all of them. `keypoints` are pictures (`data.keypoints`). `number` is
    that of the image prompt among those given. The authors draw at scales of 0.8. UserError naming
    the InstantID for embeddings of another width.
    """
    features = np.stack([np.asarray(own, np.float32) for own in embeddings])[:, None]
    if features.shape[-1] != identity.width:
        raise UserError(
            f"{name}: reads embeddings of {identity.width} numbers, and these have "
            f"{features.shape[-1]}; give those of the face encoder that it was trained with"
        )
    absent = np.zeros(features.shape[2:], np.float32)
    prompt = ImagePrompt(identity.adapter, features, absent, scale)
    return prompt, Control(identity.net, keypoints, net_scale, reads=number)
