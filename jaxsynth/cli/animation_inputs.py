"""What makes animations of `jaxsynth generate`: motion modules and their settings."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxsynth.cli.image_inputs import weighted
from jaxsynth.core.errors import UsageError

HELP = """\
  --motion    motion modules of AnimateDiff (diffusers' folder or the authors' file) and their
              weight: each picture becomes an animation of --frames, a GIF with its frames as PNG
              files in a folder beside it, and an MP4 with --mp4. --motion-lora are LoRA on them.
              More frames than the modules have places for are drawn in windows. --motion-norm is
              over each frame, as the published modules were trained, or over all, as diffusers
              draws
"""
_NORMS = ("frame", "all")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of animations."""
    parser.add_argument(
        "--motion", default="", metavar="PATH[:WEIGHT]", help="motion modules, see below"
    )
    parser.add_argument(
        "--motion-lora", action="append", default=[], metavar="PATH[:WEIGHT]",
        help="a LoRA of motion modules and its strength; may be repeated",
    )  # fmt: skip
    for flag, kind, text in (
        ("--frames", int, "of each animation (default 16)"),
        ("--fps", int, "frames a second (default 8)"),
    ):
        name = flag.removeprefix("--").upper()
        parser.add_argument(flag, type=kind, metavar=name, help=text)
    parser.add_argument(
        "--motion-norm", choices=_NORMS, help="what the modules' norms are over (default frame)"
    )
    parser.add_argument("--mp4", action="store_true", help="write an MP4 beside each GIF")


def check(args: argparse.Namespace) -> None:
    """UsageError for what is wrong with flags alone."""
    given = {
        "--motion-lora": args.motion_lora,
        "--frames": args.frames is not None,
        "--fps": args.fps is not None,
        "--motion-norm": args.motion_norm,
        "--mp4": args.mp4,
    }
    for flag, value in given.items():
        if value and not args.motion:
            raise UsageError(f"{flag} is for --motion, and none is given")
    for name, most in (("frames", 1000), ("fps", 100)):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"--{name}={value}: expected 1 to {most}")
    if args.motion and args.store:
        raise UsageError("--store: an image store holds no animations; leave it or --motion out")
    for flag, texts in (
        ("--motion", [args.motion] if args.motion else []),
        ("--motion-lora", args.motion_lora),
    ):
        for text in texts:
            weighted(flag, text)


def film(args: argparse.Namespace) -> Any:
    """How animations are written, None for pictures; UserError where that is not installed."""
    if not args.motion:
        return None
    from jaxsynth.generation.animations import Film

    found = Film(args.fps or Film.fps, args.mp4)
    found.check()
    return found


def motion(args: argparse.Namespace, pipeline: Any) -> Any:
    """The motion modules with their LoRA, None for pictures."""
    if not args.motion:
        return None
    from jaxsynth.generation.animations import Motion
    from jaxsynth.weights.adapters.motion import read_motion, with_motion_lora

    path, weight = weighted("--motion", args.motion)
    modules = read_motion(path, pipeline.unet.config, dtype=pipeline.unet.dtype)
    for text in args.motion_lora:
        modules = with_motion_lora(modules, *weighted("--motion-lora", text))
    frames = Motion.frames if args.frames is None else args.frames
    return Motion(modules, frames, weight, args.motion_norm == "all")


def kept(
    args: argparse.Namespace, motion: Any, film: Any, digest: Callable[[Path], str]
) -> dict[str, Any]:
    """What is kept of animations, for the request and each of them."""
    if motion is None:
        return {}

    def file(flag: str, text: str) -> dict[str, Any]:
        path, weight = weighted(flag, text)
        return {"file": str(path), "digest": digest(path), "weight": weight}

    return {
        "motion": file("--motion", args.motion),
        "motion_loras": [file("--motion-lora", text) for text in args.motion_lora],
        "motion_norm": args.motion_norm or _NORMS[0],
        "frames": motion.frames,
        "fps": film.fps,
        "mp4": film.mp4,
    }
