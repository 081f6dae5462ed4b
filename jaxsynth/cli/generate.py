"""`jaxsynth generate`: pictures from any base, any adapters and any prompts."""

import argparse
import difflib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxsynth.cli import animation_inputs, identity_inputs, image_inputs
from jaxsynth.cli.paths import local_path
from jaxsynth.core.errors import UsageError, UserError
from jaxsynth.core.words import counted

EPILOG = (
    """\
A picture depends on its prompt, its seed, its number and the settings below, and not on the prompts
beside it, the batch or the devices. The same command goes on where it stopped; other settings for
the same folder are refused.

  --base      a folder in diffusers' layout, a hub id, or tiny (which comes with the package)
  --adapter   a file or folder of peft, diffusers, kohya, LyCORIS, ComfyUI or this package, and its
              strength (default 1); several are mixed
  --embedding a file of Textual Inversion (diffusers, A1111, kohya), and the word that stands for it
              in prompts (default: the file's own); several add a word each
  --prompts   a text file with one prompt a line, or .jsonl with {"prompt": ..., "negative_prompt":
              ..., "seed": ...}
"""
    + image_inputs.HELP
    + identity_inputs.HELP
    + animation_inputs.HELP
    + """\
  --sampler   ddim, pndm, dpmsolver++, euler, euler_ancestral, ddpm or lcm (default: the base's own)

Each PNG holds its settings as the text "jaxsynth", and metadata.jsonl those of all. With --store
the images go to an image store, which `jaxsynth convert` writes in other formats.

examples:
  jaxsynth generate --base=tiny --prompt="a photo of the digit three" --out=images
  jaxsynth generate --base=org/base --adapter=style.safetensors:0.7 --adapter=face.safetensors \\
      --prompts=prompts.txt --count=8 --steps=25 --sampler=dpmsolver++ --out=images
  jaxsynth generate --base=org/base --embedding=dog.pt:'<dog>' --adapter=style.safetensors \\
      --prompt="a photo of a <dog> in the snow" --out=images
  jaxsynth generate --base=tiny --image=three.png --strength=0.6 \\
      --prompt="the digit eight" --out=images
"""
)


def add_parser(verbs) -> argparse.ArgumentParser:
    """The verb's parser; `call` is left to the command."""
    parser = verbs.add_parser(
        "generate",
        help="draw pictures from a base, adapters and prompts",
        description="Draw pictures from a base, adapters and prompts.",
        usage="jaxsynth generate --base=BASE --prompt=TEXT --out=DIR [--adapter=FILE[:WEIGHT] ...]",
        epilog=EPILOG,
    )
    parser.add_argument("--base", required=True, metavar="BASE", help="what draws, see below")
    parser.add_argument(
        "--out", required=True, type=local_path, metavar="DIR", help="where images go"
    )
    for flag, metavar, text in (
        ("--adapter", "FILE[:WEIGHT]", "an adapter and its strength; may be repeated"),
        ("--embedding", "FILE[:WORD]", "a new word for prompts; may be repeated"),
        ("--prompt", "TEXT", "what to draw; may be repeated"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar=metavar, help=text)
    parser.add_argument(
        "--prompts", type=local_path, metavar="FILE", help="a file of prompts, see below"
    )
    for flag, kind, default, text in (
        ("--negative-prompt", str, "", "what to stay away from (default none)"),
        ("--seed", int, 0, "of the noise (default 0)"),
        ("--count", int, 4, "images of each prompt (default 4)"),
        ("--sampler", str, "", "see below (default: the base's own)"),
        ("--steps", int, 50, "of the sampler (default 50)"),
        ("--guidance", float, 7.5, "how closely to follow the prompt (default 7.5; 1 is off)"),
        ("--guidance-rescale", float, 0.0, "keep contrast under guidance, 0 to 1 (default 0)"),
        ("--size", str, "", "pixels, such as 512 or 768x512 (width x height; default: the base's)"),
        ("--batch-size", int, 4, "images or frames drawn at a time (default 4)"),
    ):
        name = flag.removeprefix("--").replace("-", "_").upper()
        parser.add_argument(flag, type=kind, default=default, metavar=name, help=text)
    image_inputs.add_flags(parser)
    identity_inputs.add_flags(parser)
    animation_inputs.add_flags(parser)
    parser.add_argument("--store", action="store_true", help="write an image store, not PNG files")
    return parser


def generate(args: argparse.Namespace, prepare: Callable[[], None]) -> str:
    """Draws what is asked for; returns the line that says what was done.

    `prepare` is called before JAX is used, and after what is wrong without it has been told.
    UsageError for mistakes of the command line, before weights are loaded where that can be known.
    """
    size = _size(args.size)
    adapters = [image_inputs.weighted("--adapter", text) for text in args.adapter]
    embeddings = [_embedding(text) for text in args.embedding]
    _check_numbers(args)
    if not args.prompt and not args.prompts:
        raise UsageError("nothing to draw: give --prompt=TEXT or --prompts=FILE")
    if args.prompts and not args.prompts.is_file():
        raise UsageError(f"--prompts={args.prompts}: no such file")
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out={args.out}: is a file, expected a folder")
    if not args.base.strip():
        raise UsageError("--base is empty, expected a folder, a hub id or tiny")
    image_inputs.check(args)
    identity_inputs.check(args)
    animation_inputs.check(args)
    prepare()
    from jaxsynth.diffusion.samplers import NAMES

    if args.sampler and args.sampler not in NAMES:
        close = difflib.get_close_matches(args.sampler, NAMES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"--sampler={args.sampler}: expected one of {', '.join(NAMES)}{hint}")
    from jaxsynth.generation.folder import Request, read_requests

    requests = [Request(text, args.negative_prompt, args.seed) for text in args.prompt]
    if args.prompts:
        requests += read_requests(
            args.prompts, negative_prompt=args.negative_prompt, seed=args.seed
        )
    if args.store:
        _check_store(requests)
    _check_out(args.out)
    return _generate(args, requests, adapters, embeddings, size)


def _generate(
    args,
    requests,
    adapters: Sequence[tuple[Path, float]],
    embeddings: Sequence[tuple[Path, str]],
    size,
) -> str:
    from jax import device_count

    from jaxsynth.core.console import console
    from jaxsynth.generation import folder
    from jaxsynth.generation.conditioners import Text
    from jaxsynth.generation.generate import GenerateConfig, Generator, fill_store
    from jaxsynth.generation.mixing import mix
    from jaxsynth.generation.pictures import beginning_of
    from jaxsynth.generation.sampler import image_keys, latent_shape, sampler_of
    from jaxsynth.training.sharding import make_mesh
    from jaxsynth.weights.adapters.embeddings import read_embedding, with_embedding
    from jaxsynth.weights.hf import KINDS, load_pipeline

    film = animation_inputs.film(args)
    pipeline = load_pipeline(args.base, kinds=KINDS)
    words = []
    for path, word in embeddings:
        embedding = read_embedding(path, word)
        pipeline = with_embedding(pipeline, embedding, path)
        words.append({"file": str(path), "digest": _digest(path), "word": embedding.word})
    height, width, _ = latent_shape(pipeline, size)
    down = pipeline.vae.config.downscale
    pixels = height * down, width * down
    pictures = image_inputs.pictures(args, pixels, len(requests))
    image_prompts = image_inputs.image_prompts(args, pipeline, pixels, len(requests))
    controls = image_inputs.controls(args, pipeline, pixels, len(requests))
    faces = identity_inputs.identity(args, pipeline, pixels, len(requests), len(image_prompts))
    image_prompts, controls = [*image_prompts, *faces[0]], [*controls, *faces[1]]
    motion = animation_inputs.motion(args, pipeline)
    text = Text(args.guidance, args.guidance_rescale)
    begins = beginning_of(pipeline, text, pictures, pixels)
    sampler_of(pipeline, args.sampler, args.steps, begins.strength)
    pipeline.tokenizer([text for r in requests for text in (r.prompt, r.negative_prompt)])
    states = [(str(path), _read(path, pipeline), weight) for path, weight in adapters]
    settings = {
        "base": args.base,
        "base_digest": pipeline.digest,
        "adapters": [
            {"file": str(path), "digest": _digest(path), "weight": weight}
            for path, weight in adapters
        ],
        "sampler": args.sampler or pipeline.scheduler_config.get("_class_name", ""),
        "steps": args.steps,
        "guidance": args.guidance,
        "width": width * down,
        "height": height * down,
        **image_inputs.kept(args, begins, _digest),
        **identity_inputs.kept(args, _digest),
        **animation_inputs.kept(args, motion, film, _digest),
    }
    if args.guidance_rescale:
        settings["guidance_rescale"] = args.guidance_rescale
    if words:
        settings["embeddings"] = words
    folder.begin(args.out, requests, args.count, {**settings, "store": args.store})
    frames = 1 if motion is None else motion.frames
    config = GenerateConfig(
        images_per_class=args.count,
        guidance_scale=args.guidance,
        guidance_rescale=args.guidance_rescale,
        num_inference_steps=args.steps,
        sampler=args.sampler,
        batch_size=min(args.batch_size, args.count * len(requests) * frames),
    )
    prompts = [request.prompt for request in requests]
    generator = Generator(
        pipeline,
        prompts,
        config,
        seed=args.seed,
        model=mix(pipeline, states),
        negative_prompts=[request.negative_prompt for request in requests],
        size=size,
        pictures=pictures,
        image_prompts=image_prompts,
        controls=controls,
        motion=motion,
        mesh=make_mesh() if device_count() > 1 else None,
    )
    total = args.count * len(requests)
    what = counted(total, "image" if motion is None else "animation")
    console.print(f"{what} of {width * down}x{height * down}: compiling, then drawing")
    if not args.store:
        drawn = folder.fill_folder(generator, args.out, requests, args.count, settings, film)
        kept = f", {total - drawn} of them there already" if drawn < total else ""
        return f"{what} to {args.out}{kept}"

    def numbered(labels, indices):
        return generator.draw(image_keys(args.seed, 0 * labels, indices), labels, indices)

    used = [*settings["adapters"], *words]
    digests = [json.dumps(used, sort_keys=True)] if used else []
    fill_store(
        numbered, args.out, prompts, prompts, config, seed=args.seed, adapter_digests=digests
    )
    return f"an image store of {counted(total, 'image')} at {args.out}"


def _read(path: Path, pipeline: Any) -> dict[str, Any]:
    """The states of an adapter by network; UserError naming the file where none fits."""
    from jaxsynth.weights.adapters.io import Networks, read

    states, _ = read(path, Networks(lambda: pipeline.adaptable))
    return states


def _digest(path: Path) -> str:
    """The digest of an adapter's files."""
    from jaxsynth.core.io import file_digest
    from jaxsynth.weights.hub import digest

    if path.is_file():
        return file_digest(path)
    return digest(sorted(file for file in path.rglob("*") if file.is_file()))


def _embedding(text: str) -> tuple[Path, str]:
    """The file and the word that is given to it, "" for the file's own."""
    if not text.strip():
        raise UsageError("--embedding is empty, expected FILE or FILE:WORD")
    path, _, word = (text, "", "") if Path(text).exists() else text.rpartition(":")
    if not path or not Path(path).exists():
        raise UsageError(f"--embedding={text}: {path or text} does not exist")
    return Path(path), word


def _size(text: str) -> tuple[int, int] | None:
    """(height, width) of "512" or "768x512", None for ""."""
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not found or "0" in (found[1].lstrip("0") or "0", (found[2] or "1").lstrip("0") or "0"):
        raise UsageError(f"--size={text}: expected pixels, such as 512 or 768x512 (width x height)")
    width = int(found[1])
    return int(found[2] or width), width


def _check_numbers(args: argparse.Namespace) -> None:
    for name, least in (("count", 1), ("steps", 1), ("batch_size", 1)):
        if getattr(args, name) < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag}={getattr(args, name)}: expected at least {least}")
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed={args.seed}: expected 0 to {2**32 - 1}")
    if not math.isfinite(args.guidance) or args.guidance < 0:
        raise UsageError(f"--guidance={args.guidance}: expected a number from 0 on")
    if not 0 <= args.guidance_rescale <= 1:
        raise UsageError(f"--guidance-rescale={args.guidance_rescale}: expected 0 to 1")


def _check_out(out: Path) -> None:
    """What can be known of the folder before anything is loaded."""
    from jaxsynth.generation.folder import REQUEST_FILE

    if out.is_dir() and any(out.iterdir()) and not (out / REQUEST_FILE).is_file():
        raise UsageError(
            f"--out={out}: is not empty, and no folder of images to go on with "
            f"({REQUEST_FILE} is missing)"
        )


def _check_store(requests: Sequence[Any]) -> None:
    """An image store has one seed, and a class for each prompt."""
    seeds = {request.seed for request in requests}
    prompts = [request.prompt for request in requests]
    twice = next((text for text in prompts if prompts.count(text) > 1), None)
    if len(seeds) > 1:
        raise UserError("--store: the prompts have several seeds, and an image store has one")
    if twice is not None:
        raise UserError(
            f"--store: the prompt {twice!r} is given twice, and is a class of the store"
        )
