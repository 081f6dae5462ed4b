"""The face of `jaxsynth generate`: an InstantID, embeddings or a photo, and keypoints."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxsynth.cli.image_inputs import weighted
from jaxsynth.core.errors import UsageError

HELP = """\
  --identity  an InstantID's folder (ip-adapter.bin, ControlNetModel/) and the weight of its tokens,
              which draws the person of --face: embeddings (.npy, .npz) of one or several photos, or
              a photo itself with --face-keypoints and --face-encoder (ArcFace's .onnx, or the
              folder of a face encoder that `jaxsynth run` trained). --keypoints says where the
              eyes, the nose and the corners of the mouth are drawn (.json, .npy, .npz, or a picture
              of them as InstantID draws it), and the weight of its IdentityNet. The authors draw at
              0.8 and 0.8
"""
_FLAGS = (
    ("--identity", "FOLDER[:WEIGHT]", "an InstantID and its weight, see below"),
    ("--face", "FILE", "embeddings of a face, or a photo of it"),
    ("--face-keypoints", "FILE", "the five keypoints of the photo"),
    ("--face-encoder", "FILE", "what makes embeddings of the photo"),
    ("--keypoints", "FILE[:WEIGHT]", "where the face is drawn, and how closely to follow it"),
)
_ARRAYS = (".npy", ".npz")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of faces."""
    for flag, metavar, text in _FLAGS:
        parser.add_argument(flag, default="", metavar=metavar, help=text)


def check(args: argparse.Namespace) -> None:
    """UsageError for what is wrong with flags alone."""
    if not args.identity:
        for flag, *_ in _FLAGS[1:]:
            if getattr(args, _name(flag)):
                raise UsageError(f"{flag} is for --identity, and none is given")
        return
    for flag, text in (("--face", args.face), ("--keypoints", args.keypoints)):
        if not text:
            raise UsageError(f"--identity needs {flag}=FILE beside it")
    weighted("--identity", args.identity)
    weighted("--keypoints", args.keypoints)
    photo = Path(args.face).suffix not in _ARRAYS
    for flag in ("--face", "--face-keypoints", "--face-encoder"):
        text = getattr(args, _name(flag))
        if flag != "--face" and photo and not text:
            raise UsageError(f"--face={args.face}: a photo needs {flag}=FILE beside it")
        if flag != "--face" and not photo and text:
            raise UsageError(f"{flag} is for a photo, and --face={args.face} are embeddings")
        if text and not Path(text).exists():
            raise UsageError(f"{flag}={text}: no such file")


def identity(
    args: argparse.Namespace, pipeline: Any, size: tuple[int, int], prompts: int, number: int
) -> tuple[list[Any], list[Any]]:
    """The image prompt of the face and its IdentityNet, [] each where no face is given.

    `number` is how many other image prompts there are, before it.
    """
    if not args.identity:
        return [], []
    import numpy as np

    from jaxsynth.data.keypoints import read_keypoint_picture
    from jaxsynth.generation.identities import identity_parts
    from jaxsynth.weights.adapters.identities import read_identity

    folder, weight = weighted("--identity", args.identity)
    file, net_weight = weighted("--keypoints", args.keypoints)
    picture = read_keypoint_picture(file, size)
    embeddings = _embeddings(args)
    found = read_identity(folder, pipeline.unet)
    prompt, control = identity_parts(
        found,
        [embeddings] * prompts,
        np.stack([picture] * prompts),
        scale=weight,
        net_scale=net_weight,
        number=number,
        name=str(folder),
    )
    control.check(pipeline.unet, size, name=str(folder))
    return [prompt], [control]


def kept(args: argparse.Namespace, digest: Callable[[Path], str]) -> dict[str, Any]:
    """What is kept of the face, for the request and each picture."""
    if not args.identity:
        return {}
    found: dict[str, Any] = {}
    for flag in ("--identity", "--keypoints"):
        path, weight = weighted(flag, getattr(args, _name(flag)))
        found[_name(flag)] = {"file": str(path), "digest": digest(path), "weight": weight}
    for flag in ("--face", "--face-keypoints", "--face-encoder"):
        if text := getattr(args, _name(flag)):
            found[_name(flag)] = {"file": text, "digest": digest(Path(text))}
    return found


def _embeddings(args: argparse.Namespace) -> Any:
    """(n, width), of the file or of the photo."""
    from jaxsynth.data.decode import decode_image
    from jaxsynth.data.keypoints import read_keypoints
    from jaxsynth.weights.face_encoder import load_face_encoder, read_embeddings

    file = Path(args.face)
    if file.suffix in _ARRAYS:
        return read_embeddings(file)
    photo = decode_image(file)
    points = read_keypoints(Path(args.face_keypoints), photo.shape[:2])
    return load_face_encoder(args.face_encoder)([photo], points[None])


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
