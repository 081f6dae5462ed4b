"""`jaxsynth convert`: anything the tool reads, in the formats that other tools read.

Adapters go between the files of peft, diffusers, kohya, LyCORIS, ComfyUI and A1111 and this
package's own, image stores to ImageFolder, WebDataset and Parquet. What the source is, is seen from
its files, so only the target is asked for; what its files leave open (alpha, the axis of DoRA's
magnitudes) is read from shapes and metadata and said in the answer.

Files that name layers by flattened paths, and kinds that only a network can tell apart, need the
base that they are for.
"""

from pathlib import Path

from jaxsynth.adapters.inject import AdapterState, extract
from jaxsynth.adapters.to_lora import as_lora
from jaxsynth.core.errors import UserError
from jaxsynth.data.export import export
from jaxsynth.data.store import ImageStore
from jaxsynth.weights.adapters.a1111 import write_hypernetwork
from jaxsynth.weights.adapters.comfyui import write_comfyui
from jaxsynth.weights.adapters.components import join_networks
from jaxsynth.weights.adapters.diffusers import fits_diffusers, write_diffusers
from jaxsynth.weights.adapters.io import Networks, read
from jaxsynth.weights.adapters.layer_names import PREFIXES
from jaxsynth.weights.adapters.lycoris import write_networks
from jaxsynth.weights.adapters.native import write_state
from jaxsynth.weights.adapters.peft import write_peft

ADAPTERS = ("peft", "diffusers", "kohya", "lycoris", "comfyui", "a1111", "jaxsynth")
STORES = ("imagefolder", "webdataset", "parquet")
TARGETS = (*ADAPTERS, *STORES)

_STORE_FILE = "store.json"


def convert(source: Path, target: Path, to: str, base: str = "") -> str:
    """Converts `source` to format `to` at `target` and returns lines that say what was done.

    Adapters of several networks are a folder of peft folders ("unet", "text_encoder") or one file.
    `base` is the Stable Diffusion (a folder, hub id or "tiny") that an adapter is for. Raises
    `UserError` when the source is of no known kind, the format is for the other kind or has no form
    for the adapter, the base is needed and not given, or the target exists; the readers' errors
    name file and key.
    """
    if to not in TARGETS:
        raise UserError(f"--to={to}: expected one of {', '.join(TARGETS)}")
    if not source.exists():
        raise UserError(f"{source} does not exist")
    if target.exists():
        raise UserError(f"{target} already exists; a conversion writes a new place")
    if (source / _STORE_FILE).is_file():
        _expect(source, "an image store", to, STORES)
        store = ImageStore(source)
        export(store, target, to)
        return f"{len(store)} images to {target} ({to})"
    networks = Networks.of(base)
    states, notes = read(source, networks)
    _expect(source, "an adapter", to, ADAPTERS)
    try:
        notes += _write_adapters(target, states, to, networks)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source} cannot be written as {to}: {error}") from error
    parts = ", ".join(f"{name} ({len(state.arrays)} arrays)" for name, state in states.items())
    return "\n".join([f"adapter of {parts} to {target} ({to})", *notes])


def _expect(source: Path, kind: str, to: str, formats: tuple[str, ...]) -> None:
    if to not in formats:
        raise UserError(f"{source} is {kind}: --to={to} does not apply, only {', '.join(formats)}")


def _write_adapters(
    target: Path, states: dict[str, AdapterState], to: str, networks: Networks
) -> list[str]:
    """Writes the states; returns what has become of them."""

    if to == "jaxsynth":
        write_state(target, join_networks(states, mixed=True))
        return []
    if to == "peft":
        for name, state in states.items():
            place = target if len(states) == 1 else target / name
            write_peft(place, state, model=networks.get(name))
        return []
    notes: list[str] = []
    if to in ("diffusers", "kohya"):
        states, notes = _as_lora(states, to, networks)
    if to == "diffusers":
        write_diffusers(target, states)
        return notes
    why = f"--to={to} needs the base's layers"
    models = {name: networks.attached(state, name, why) for name, state in states.items()}
    if to == "a1111":
        if list(models) != ["unet"]:
            raise ValueError(f"A1111's hypernetworks are a UNet's, found {', '.join(models)}")
        write_hypernetwork(target, models["unet"])
    elif to == "comfyui":
        write_comfyui(target, models)
        if any(getattr(s.config, "decompose", "") == "output" for s in states.values()):
            notes.append("DoRA's magnitudes are for the base's norms, by which ComfyUI divides")
    else:
        if unknown := sorted(models.keys() - PREFIXES):
            raise ValueError(f"kohya's files of Stable Diffusion have no {unknown[0]}")
        write_networks(target, {PREFIXES[name]: model for name, model in models.items()})
    return notes


def _as_lora(
    states: dict[str, AdapterState], to: str, networks: Networks
) -> tuple[dict[str, AdapterState], list[str]]:
    """The states as plain LoRA or DoRA, exactly, where they are another kind."""

    found, notes = {}, []
    for name, state in states.items():
        if not fits_diffusers(state.config):
            kind = type(state.config).__name__.removesuffix("Config")
            why = f"--to={to} makes LoRA of {kind}, for which the base is needed"
            state = extract(as_lora(networks.attached(state, name, why)))
            notes.append(f"{name}: {kind} as LoRA of rank {state.config.rank}, exactly")
        found[name] = state
    return found, notes
