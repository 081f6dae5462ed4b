"""The images that `jaxsynth generate` is given: to begin with, to prompt by, and as conditions."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxsynth.core.errors import UsageError

HELP = """\
  --image     a picture to begin with, in turns where there are several: a base of texts varies it
              by --strength (0 to 1, default 0.8), InstructPix2Pix edits it as the prompt says, and
              an inpainting base paints where --mask is white
  --image-adapter
              an IP-Adapter (or Plus) and its weight, which draws like --image-prompt; several have
              one --image-prompt each, and may have one --image-prompt-mask each, white where it
              counts. --image-encoder is the CLIP that it was trained with (default: image_encoder
              beside it, and tiny/clip for the base tiny)
  --controlnet
              a ControlNet's folder and its weight, which follows --condition; one for each
"""

_LISTS = (
    ("--image", "FILE", "a picture to begin with; may be repeated"),
    ("--mask", "FILE", "where to paint an image (white); one for each --image"),
    ("--image-adapter", "FILE[:WEIGHT]", "an IP-Adapter and its weight; may be repeated"),
    ("--image-prompt", "FILE", "a picture to draw like; may be repeated"),
    ("--image-prompt-mask", "FILE", "where it counts (white); one for each --image-adapter"),
    ("--controlnet", "FOLDER[:WEIGHT]", "a ControlNet and its weight; may be repeated"),
    ("--condition", "FILE", "the picture that it follows; one for each --controlnet"),
)
_VALUES = (
    ("--strength", float, None, "how far from --image, above 0 to 1 (default 0.8)"),
    ("--image-guidance", float, None, "of a base that edits: how near to --image (1.5)"),
    ("--image-encoder", str, "", "the CLIP that sees --image-prompt, see below"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of images."""
    for flag, metavar, text in _LISTS:
        parser.add_argument(flag, action="append", default=[], metavar=metavar, help=text)
    for flag, kind, default, text in _VALUES:
        name = flag.removeprefix("--").replace("-", "_").upper()
        parser.add_argument(flag, type=kind, default=default, metavar=name, help=text)
    parser.add_argument(
        "--guess-mode", action="store_true", help="follow --condition without a prompt"
    )


def weighted(flag: str, text: str) -> tuple[Path, float]:
    """The file or folder and its weight, 1 unless given; UsageError for neither."""
    if not text.strip():
        raise UsageError(f"{flag} is empty, expected FILE or FILE:WEIGHT")
    path, colon, weight = text.rpartition(":")
    if Path(text).exists() or not colon:
        path, weight = text, "1"
    try:
        strength = float(weight)
    except ValueError:
        raise UsageError(f"{flag}={text}: no such file, nor FILE:WEIGHT") from None
    if not Path(path).exists():
        raise UsageError(f"{flag}={text}: {path} does not exist")
    if not math.isfinite(strength):
        raise UsageError(f"{flag}={text}: weight {weight}, expected a number")
    return Path(path), strength


def check(args: argparse.Namespace) -> None:
    """UsageError for what is wrong with flags alone."""
    for flag in ("image", "mask", "image_prompt", "image_prompt_mask", "condition"):
        for file in getattr(args, flag):
            if not Path(file).is_file():
                raise UsageError(f"--{flag.replace('_', '-')}={file}: no such file")
    for flag, files, other, others in (
        ("--mask", args.mask, "--image", args.image),
        ("--image-prompt-mask", args.image_prompt_mask, "--image-adapter", args.image_adapter),
    ):
        if files and len(files) != len(others):
            raise UsageError(
                f"{flag}: {len(files)} given for {len(others)} {other}, expected one for each"
            )
    if len(args.condition) != len(args.controlnet):
        raise UsageError(
            f"--condition: {len(args.condition)} given for {len(args.controlnet)} --controlnet, "
            "expected one for each"
        )
    adapters, prompts = len(args.image_adapter), len(args.image_prompt)
    if (adapters > 1 and prompts != adapters) or bool(adapters) != bool(prompts):
        raise UsageError(
            f"--image-prompt: {prompts} given for {adapters} --image-adapter, expected one for each"
        )
    if args.strength is not None and not 0 < args.strength <= 1:
        raise UsageError(f"--strength={args.strength}: expected above 0 and at most 1")
    scale = args.image_guidance
    if scale is not None and not (math.isfinite(scale) and scale >= 0):
        raise UsageError(f"--image-guidance={scale}: expected a number from 0 on")
    for flag, given, other, needed in (
        ("--strength", args.strength is not None, "--image", args.image),
        ("--image-guidance", scale is not None, "--image", args.image),
        ("--image-encoder", bool(args.image_encoder), "--image-adapter", args.image_adapter),
        ("--guess-mode", args.guess_mode, "--controlnet", args.controlnet),
    ):
        if given and not needed:
            raise UsageError(f"{flag} is for {other}, and none is given")
    for flag, texts in (
        ("--image-adapter", args.image_adapter),
        ("--controlnet", args.controlnet),
    ):
        for text in texts:
            weighted(flag, text)


def pictures(args: argparse.Namespace, size: tuple[int, int], prompts: int) -> Any:
    """The images to begin with, which all prompts share; None where there are none."""
    if not args.image:
        return None
    import numpy as np

    from jaxsynth.generation.pictures import Pictures

    images = np.stack([_image(file, size) for file in args.image])
    masks = None
    if args.mask:
        masks = [np.stack([_mask(file, size) >= 0.5 for file in args.mask])] * prompts
    return Pictures([images] * prompts, masks, args.strength, args.image_guidance)


def image_prompts(
    args: argparse.Namespace, pipeline: Any, size: tuple[int, int], prompts: int
) -> list[Any]:
    """The adapters of images, each with its images, which all prompts share."""
    if not args.image_adapter:
        return []
    from jaxsynth.data.decode import decode_image
    from jaxsynth.generation.image_prompts import prompt_of
    from jaxsynth.weights.adapters.identities import NET
    from jaxsynth.weights.adapters.image_prompts import find_image_adapter, read_image_adapter
    from jaxsynth.weights.image_encoder import load_image_encoder

    given = [weighted("--image-adapter", text) for text in args.image_adapter]
    images = [decode_image(Path(file)) for file in args.image_prompt]
    own = [[image] for image in images] if len(given) > 1 else [images]
    masks = [_mask(file, size) for file in args.image_prompt_mask] or [None] * len(given)
    found = []
    for (path, weight), pictured, mask in zip(given, own, masks, strict=True):
        if (find_image_adapter(path).parent / NET / "config.json").is_file():
            raise UsageError(
                f"--image-adapter={path}: is an InstantID, with its {NET} beside it; it is given "
                "by --identity"
            )
        adapter = read_image_adapter(path, pipeline.unet)
        encoder = args.image_encoder
        beside = find_image_adapter(path).parent / "image_encoder"
        if not encoder and (beside / "config.json").is_file():
            encoder = str(beside)
        if not encoder and args.base == "tiny":
            encoder = "tiny/clip"
        if not encoder:
            raise UsageError(
                f"--image-adapter={path}: no image_encoder beside it; say which CLIP it was "
                "trained with by --image-encoder=FOLDER"
            )
        seen = load_image_encoder(encoder)
        found.append(
            prompt_of(adapter, seen, [pictured] * prompts, scale=weight, mask=mask, name=str(path))
        )
    return found


def controls(
    args: argparse.Namespace, pipeline: Any, size: tuple[int, int], prompts: int
) -> list[Any]:
    """The ControlNets, each with its condition, which all prompts share."""
    import numpy as np

    from jaxsynth.generation.controls import Control
    from jaxsynth.models.diffusion.controlnet import ControlNet, ControlNetConfig
    from jaxsynth.weights.models import load_model

    found = []
    for text, file in zip(args.controlnet, args.condition, strict=True):
        folder, weight = weighted("--controlnet", text)
        net = load_model(ControlNet, ControlNetConfig, folder)
        image = _image(file, size)
        if net.config.conditioning_channels == 1:
            image = np.round(_mask(file, size) * 255).astype(np.uint8)[..., None]
        control = Control(net, np.stack([image] * prompts), weight, args.guess_mode)
        control.check(pipeline.unet, size, name=str(folder))
        found.append(control)
    return found


def kept(args: argparse.Namespace, begins: Any, digest: Callable[[Path], str]) -> dict[str, Any]:
    """What is kept of all images and of what reads them, for the request and each picture."""
    found: dict[str, Any] = {}
    for name, files in (
        ("images", args.image),
        ("masks", args.mask),
        ("image_prompts", args.image_prompt),
        ("image_prompt_masks", args.image_prompt_mask),
        ("conditions", args.condition),
    ):
        if files:
            found[name] = [{"file": file, "digest": digest(Path(file))} for file in files]
    for name, flag, texts in (
        ("image_adapters", "--image-adapter", args.image_adapter),
        ("controlnets", "--controlnet", args.controlnet),
    ):
        if texts:
            pairs = [weighted(flag, text) for text in texts]
            found[name] = [
                {"file": str(path), "digest": digest(path), "weight": weight}
                for path, weight in pairs
            ]
    if args.image_encoder:
        found["image_encoder"] = args.image_encoder
    if args.guess_mode:
        found["guess_mode"] = True
    if begins.strength is not None:
        found["strength"] = begins.strength
    if (scale := getattr(begins.conditioner, "image_guidance_scale", None)) is not None:
        found["image_guidance"] = scale
    return found


def _image(file: str, size: tuple[int, int]) -> Any:
    from jaxsynth.data.decode import covering, decode_image

    return covering(decode_image(Path(file)), *size)


def _mask(file: str, size: tuple[int, int]) -> Any:
    """(h, w) in [0, 1], float32."""
    import numpy as np

    return (_image(file, size).mean(axis=-1) / 255).astype(np.float32)
