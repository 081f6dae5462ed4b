"""What of a SigLIP's folder is not its network: which it is, its tokenizer, its images.

Read are checkpoints of `model_type` "siglip", as SigLIP's and SigLIP 2's at fixed resolutions are.
SigLIP 2's NaFlex ("siglip2") takes lists of patches in the place of images, and is refused.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.data.pipeline.augment import EvalTransform
from jaxsynth.models.siglip import SiglipModel, SiglipTextConfig, SiglipVisionConfig
from jaxsynth.weights import hub, preprocessing
from jaxsynth.weights.models import save_model
from jaxsynth.weights.pipeline_parts import check_tokenizer
from jaxsynth.weights.preprocessing import PREPROCESSOR, Preprocessing
from jaxsynth.weights.text_tokenizer import TextTokenizer

_TWO_TOWERS = "siglip"


def is_siglip(folder: Path) -> bool:
    """Whether a folder of two towers is a SigLIP's.

    UserError for one of its towers alone, and for NaFlex.
    """
    path = folder / "config.json"
    kind = read_json(path, optional=True).get("model_type")
    if not (isinstance(kind, str) and kind.startswith("siglip")):
        return False
    check_fixed(path, kind)
    if kind != _TWO_TOWERS:
        raise UserError(
            f"{path}: model_type {quoted(kind)}, expected {_TWO_TOWERS!r}: images are compared "
            "with texts, which takes both towers; give the whole checkpoint"
        )
    return True


def check_fixed(path: Path, kind: Any) -> None:
    """UserError for a checkpoint that takes patches."""
    if isinstance(kind, str) and kind.startswith("siglip2"):
        raise UserError(
            f"{path}: model_type {quoted(kind)}: SigLIP 2's NaFlex reads lists of patches, which "
            "is not supported; take a checkpoint of a fixed resolution, such as "
            "google/siglip2-base-patch16-224, whose model_type is 'siglip'"
        )


def read_tokenizer(folder: Path, config: SiglipTextConfig) -> TextTokenizer:
    """The tokenizer, if the text tower reads its ids; else UserError naming the folder."""
    tokenizer = TextTokenizer(folder, positions=config.max_position_embeddings)
    check_tokenizer(folder, tokenizer, config)
    return tokenizer


def read_preprocessing(folder: Path, config: SiglipVisionConfig) -> Preprocessing:
    """How images are prepared, from preprocessor_config.json.

    UserError naming the file where images get another size than the network's, or are cropped.
    """
    path = folder / PREPROCESSOR
    found = preprocessing.from_transformers(path)
    if found.image_size != config.image_size:
        raise UserError(
            f"{path}: size is {found.image_size}, but the network's image_size is "
            f"{config.image_size}"
        )
    if not found.squash or found.resize != found.image_size:
        raise UserError(
            f"{path}: the images are cropped, expected size {{'height': {config.image_size}, "
            f"'width': {config.image_size}}} and no do_center_crop, as SigLIP's have it"
        )
    return found


def save(
    model: SiglipModel,
    tokenizer: Any,
    transform: EvalTransform,
    folder: Path,
    dtype: Any = None,
) -> None:
    """Write a folder that `load_clip` and transformers load."""
    config = dataclasses.asdict(model.config)
    config["text_config"]["model_type"] = "siglip_text_model"
    config["vision_config"]["model_type"] = "siglip_vision_model"
    save_model(model, config, folder, dtype)
    tokenizer.save(folder)
    size = transform.size
    seen = Preprocessing(
        size, size, True, transform.interpolation, transform.mean, transform.std, "floor"
    )
    settings = preprocessing.to_transformers(seen)
    for name in ("crop_size", "do_center_crop"):
        del settings[name]
    hub.write_json(
        folder / PREPROCESSOR, {**settings, "image_processor_type": "SiglipImageProcessor"}
    )
