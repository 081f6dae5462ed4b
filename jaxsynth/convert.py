"""`jaxsynth convert`: anything the tool writes, in the formats that other tools read.

Adapters go between peft's folder and diffusers' file, image stores to ImageFolder, WebDataset and
Parquet. What the source is, is seen from its files, so only the target is asked for.
"""

from pathlib import Path

from jaxsynth.adapters.base import AdapterState
from jaxsynth.errors import UserError

ADAPTERS = ("peft", "diffusers")
STORES = ("imagefolder", "webdataset", "parquet")
TARGETS = (*ADAPTERS, *STORES)

_STORE_FILE = "store.json"


def convert(source: Path, target: Path, to: str) -> str:
    """Converts `source` to format `to` at `target` and returns a line that says what was done.

    Adapters of several networks are a folder of peft folders ("unet", "text_encoder") on one side
    and one diffusers file on the other. Raises `UserError` when the source is of no known kind, the
    format is for the other kind, or the target exists; the readers' errors name file and key.
    """
    if to not in TARGETS:
        raise UserError(f"--to={to}: expected one of {', '.join(TARGETS)}")
    if not source.exists():
        raise UserError(f"{source} does not exist")
    if target.exists():
        raise UserError(f"{target} already exists; a conversion writes a new place")
    if (source / _STORE_FILE).is_file():
        _expect(source, "an image store", to, STORES)
        from jaxsynth.data.export import export
        from jaxsynth.data.store import ImageStore

        store = ImageStore(source)
        export(store, target, to)
        return f"{len(store)} images to {target} ({to})"
    states = _read_adapters(source)
    _expect(source, "an adapter", to, ADAPTERS)
    _write_adapters(target, states, to)
    parts = ", ".join(f"{name} ({len(state.arrays)} arrays)" for name, state in states.items())
    return f"adapter of {parts} to {target} ({to})"


def _expect(source: Path, kind: str, to: str, formats: tuple[str, ...]) -> None:
    if to not in formats:
        raise UserError(f"{source} is {kind}: --to={to} does not apply, only {', '.join(formats)}")


def _read_adapters(source: Path) -> dict[str, AdapterState]:
    """The adapters at `source` by the name of their network."""
    from jaxsynth.weights.adapters import (
        DIFFUSERS_WEIGHTS,
        PEFT_CONFIG,
        read_diffusers,
        read_peft,
    )

    if (source / PEFT_CONFIG).is_file():
        state = read_peft(source)
        return {_network(state): state}
    if source.is_file() or (source / DIFFUSERS_WEIGHTS).is_file():
        return read_diffusers(source)
    folders = sorted(path.parent for path in source.glob(f"*/{PEFT_CONFIG}"))
    if folders:
        return {folder.name: read_peft(folder) for folder in folders}
    raise UserError(
        f"{source} is nothing this command knows: expected {_STORE_FILE} (an image store), "
        f"{PEFT_CONFIG} (peft) in it or in its folders, or {DIFFUSERS_WEIGHTS} (diffusers)"
    )


def _network(state: AdapterState) -> str:
    """The network that a peft folder without a name is for, by the names of its layers."""
    clip = any(".encoder.layers." in f".{name}" for name in state.arrays)
    return "text_encoder" if clip else "unet"


def _write_adapters(target: Path, states: dict[str, AdapterState], to: str) -> None:
    from jaxsynth.weights.adapters import write_diffusers, write_peft

    if to == "diffusers":
        write_diffusers(target, states)
    elif len(states) == 1:
        write_peft(target, next(iter(states.values())))
    else:
        for name, state in states.items():
            write_peft(target / name, state)
