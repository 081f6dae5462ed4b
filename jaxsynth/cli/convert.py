"""`jaxsynth convert`: anything the tool reads, in the formats that other tools read.

Adapters go between the files of peft, diffusers, kohya, LyCORIS, ComfyUI and A1111 and this
package's own, embeddings (Textual Inversion) between those of diffusers, A1111 and kohya, motion
modules (AnimateDiff) between diffusers' folders and the authors' files, whole Stable Diffusions
between diffusers' folders and checkpoints in one file, image stores to ImageFolder, WebDataset and
Parquet. What the source is, is seen from its files, so only the target is asked for; what its files
leave open (alpha, the axis of DoRA's magnitudes) is read from shapes and metadata and said in the
answer.

Files that name layers by flattened paths, and kinds that only a network can tell apart, need the
base that they are for.
"""

import difflib
from pathlib import Path

from jaxsynth.core.errors import UsageError, UserError
from jaxsynth.core.words import counted
from jaxsynth.weights.adapters.formats import FORMATS

STORES = ("imagefolder", "webdataset", "parquet")
TARGETS = (*FORMATS, *STORES)

_STORE_FILE = "store.json"


def convert(source: Path, target: Path, to: str, base: str = "") -> str:
    """Converts `source` to format `to` at `target` and returns lines that say what was done.

    Adapters of several networks are a folder of peft folders ("unet", "text_encoder") or one file.
    `base` is the Stable Diffusion (a folder, hub id or "tiny") that an adapter is for, or what a
    checkpoint in one file lacks (`weights.single_file`). Raises
    `UserError` when the source is of no known kind, the format is for the other kind or has no form
    for the adapter, the base is needed and not given, or the target exists; the readers' errors
    name file and key.
    """
    _check(source, target, to)
    # JAX, which takes seconds, comes with them.
    from jaxsynth.data.export import export
    from jaxsynth.data.store import ImageStore
    from jaxsynth.weights import bases, recognize
    from jaxsynth.weights.adapters import embeddings, motion
    from jaxsynth.weights.adapters.io import Networks, read, write
    from jaxsynth.weights.hf import pipeline_configs

    if (source / _STORE_FILE).is_file():
        _expect(source, "an image store", to, STORES)
        store = ImageStore(source)
        export(store, target, to)
        return f"{counted(len(store), 'image')} to {target} ({to})"
    if bases.is_base(source):
        _expect(source, "a whole Stable Diffusion (a checkpoint)", to, bases.FOLDERS + bases.FILES)
        notes = bases.convert(source, target, to, base)
        return "\n".join([f"Stable Diffusion of {source} to {target} ({to})", *notes])
    if embeddings.embedding_file(source):
        _expect(source, recognize.EMBEDDING, to, embeddings.FORMATS)
        embedding = embeddings.read_embedding(source)
        file = embeddings.write_embedding(target, embedding, to)
        return f"{embedding.word!r} of {counted(len(embedding.vectors), 'vector')} to {file} ({to})"
    if motion.is_motion(source):
        _expect(source, "motion modules (AnimateDiff)", to, motion.FOLDERS + motion.FILES)
        unet = pipeline_configs(base)[0]["unet"] if base else None
        modules = motion.read_motion(source, unet)
        file = motion.write_motion(target, modules, to)
        return f"motion modules {modules.config.version} to {file} ({to})"
    networks = Networks.of(base)
    states, notes = read(source, networks)
    _expect(source, "an adapter", to, FORMATS)
    try:
        notes += write(target, states, to, networks)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source} cannot be written as {to}: {error}") from error
    parts = ", ".join(f"{name} ({len(state.arrays)} arrays)" for name, state in states.items())
    return "\n".join([f"adapter of {parts} to {target} ({to})", *notes])


def _check(source: Path, target: Path, to: str) -> None:
    """UsageError for what is wrong with the arguments alone."""
    if to not in TARGETS:
        close = difflib.get_close_matches(to, TARGETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"--to={to}: expected one of {', '.join(TARGETS)}{hint}")
    if not source.exists():
        raise UsageError(f"{source} does not exist")
    if target.exists():
        raise UsageError(f"{target} already exists; a conversion writes a new place")
    there = next(place for place in target.absolute().parents if place.exists())
    if not there.is_dir():
        raise UsageError(f"{target}: {there} is a file, expected a folder")


def _expect(source: Path, kind: str, to: str, formats: tuple[str, ...]) -> None:
    if to not in formats:
        raise UserError(f"{source} is {kind}: --to={to} does not apply, only {', '.join(formats)}")
