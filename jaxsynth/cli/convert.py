"""`jaxsynth convert`: anything the tool reads, in the formats that other tools read.

Adapters go between the files of peft, diffusers, kohya, LyCORIS, ComfyUI and A1111 and this
package's own, image stores to ImageFolder, WebDataset and Parquet. What the source is, is seen from
its files, so only the target is asked for; what its files leave open (alpha, the axis of DoRA's
magnitudes) is read from shapes and metadata and said in the answer.

Files that name layers by flattened paths, and kinds that only a network can tell apart, need the
base that they are for.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxsynth.adapters.inject import AdapterState
from jaxsynth.core.errors import UserError

ADAPTERS = ("peft", "diffusers", "kohya", "lycoris", "comfyui", "a1111", "jaxsynth")
STORES = ("imagefolder", "webdataset", "parquet")
TARGETS = (*ADAPTERS, *STORES)

_STORE_FILE = "store.json"
_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}


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
        from jaxsynth.data.export import export
        from jaxsynth.data.store import ImageStore

        store = ImageStore(source)
        export(store, target, to)
        return f"{len(store)} images to {target} ({to})"
    networks = Networks(base)
    states, notes = read_adapters(source, networks)
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


class Networks:
    """The networks of the base by component, loaded when a format first needs them."""

    def __init__(self, base: str):
        self._base = base

    @classmethod
    def of(cls, pipeline: Any) -> "Networks":
        """Those of a pipeline that is loaded already."""
        networks = cls(str(pipeline.folder or "the base"))
        networks._loaded = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
        return networks

    def __bool__(self) -> bool:
        return bool(self._base)

    def need(self, why: str) -> Mapping[str, Any]:
        """All of them; UserError where no base is given."""
        if not self._base:
            raise UserError(f"{why}: say which by --base=FOLDER, a hub id or tiny")
        return self._loaded

    def get(self, component: str) -> Any:
        """One of them, None where no base is given."""
        return self._loaded.get(component) if self._base else None

    def attached(self, state: AdapterState, component: str, why: str) -> Any:
        """The base's network with the adapter of a state."""
        from jaxsynth.weights.adapters.diffusers import attach

        found = self.need(why)
        if component not in found:
            raise UserError(f"the base has no {component}, only {', '.join(found)}")
        return attach(found[component], state)

    @cached_property
    def _loaded(self) -> Mapping[str, Any]:
        from jaxsynth.weights.hf import load_pipeline

        pipeline = load_pipeline(self._base)
        return {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}


def read_adapters(source: Path, networks: Networks) -> tuple[dict[str, AdapterState], list[str]]:
    """The adapters at `source` by the name of their network, and what was assumed."""
    from jaxsynth.weights.adapters.diffusers import DIFFUSERS_WEIGHTS, PEFT_CONFIG, read_peft
    from jaxsynth.weights.adapters.native import STATE_FILE

    if (source / PEFT_CONFIG).is_file():
        network = _network(_peft_keys(source))
        return {network: read_peft(source, networks.get(network))}, []
    folders = sorted(path.parent for path in source.glob(f"*/{PEFT_CONFIG}"))
    if folders:
        return {f.name: read_peft(f, networks.get(f.name)) for f in folders}, []
    for name in (DIFFUSERS_WEIGHTS, STATE_FILE):
        if (source / name).is_file():
            return _read_file(source / name, networks)
    if source.is_file():
        return _read_file(source, networks)
    raise UserError(
        f"{source} is nothing this command knows: expected {_STORE_FILE} (an image store), "
        f"{PEFT_CONFIG} (peft) in it or in its folders, {DIFFUSERS_WEIGHTS} (diffusers), "
        f"{STATE_FILE} (jaxsynth), or a file of an adapter"
    )


def _read_file(source: Path, networks: Networks) -> tuple[dict[str, AdapterState], list[str]]:
    """The adapters of one file, whose keys say whose it is."""
    from jaxsynth.adapters.inject import extract
    from jaxsynth.weights.adapters import comfyui, lycoris
    from jaxsynth.weights.adapters.a1111 import read_hypernetwork
    from jaxsynth.weights.adapters.components import split_networks
    from jaxsynth.weights.adapters.diffusers import read_diffusers
    from jaxsynth.weights.adapters.native import is_state, read_state

    if source.suffix in (".pt", ".pth", ".bin"):
        why = f"{source} has networks by the width of layers, which a base tells"
        return {"unet": extract(read_hypernetwork(source, networks.need(why)["unet"]))}, []
    if is_state(source):
        state = read_state(source)
        parts = split_networks(state)
        return parts or {_network(state.arrays): state}, []
    tensors, metadata = lycoris.load(source)
    if not tensors:
        raise UserError(f"{source}: holds no tensors")
    notes = lycoris.conventions(tensors)
    if comfyui.is_comfyui(tensors):
        found = networks.need(f"{source} is ComfyUI's, whose layers a base tells")
        models = comfyui.read_comfyui(source, tensors, metadata, found)
        if metadata.get(comfyui.MARK[0]) == comfyui.MARK[1]:
            notes = [note for note in notes if not note.startswith("DoRA")]
            notes.append("DoRA's magnitudes are for the base's norms, as its metadata says")
        return {name: extract(model) for name, model in models.items()}, notes
    first = next(iter(tensors))
    if not first.startswith(lycoris.PREFIXES):
        states = read_diffusers(source)
        given = "lora_adapter_metadata" in metadata
        return states, [] if given else ["no configuration in the file: alpha = rank"]
    found = networks.need(f"{source} is kohya's or LyCORIS', whose layers a base tells")
    states = {}
    for component, own in _by_prefix(tensors, source).items():
        names = _kohya_names(component, found[component])
        states[component] = extract(lycoris.fill(own, found[component], names, source))
    return states, notes


def _by_prefix(tensors: Mapping[str, Any], source: Path) -> dict[str, dict[str, Any]]:
    """A kohya file's tensors by component, the prefix of its text encoder made one."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        for prefix, component in (
            ("lora_unet_", "unet"),
            ("lycoris_", "unet"),
            ("lora_te1_", "text_encoder"),
            ("lora_te_", "text_encoder"),
        ):
            if key.startswith(prefix):
                name = f"{_PREFIXES[component]}_{key.removeprefix(prefix)}"
                parts.setdefault(component, {})[name] = value
                break
        else:
            raise UserError(
                f"{source}: key {key} is of no network of Stable Diffusion 1 or 2: expected "
                "lora_unet_, lycoris_, lora_te_ or lora_te1_"
            )
    return parts


def _kohya_names(component: str, model: Any) -> dict[str, str]:
    """The paths of a network's layers by their flattened names, the original code's too."""
    from jaxsynth.weights.adapters import comfyui, lycoris

    prefix = _PREFIXES[component]
    names = {f"{prefix}_{path.replace('.', '_')}": path for path in lycoris.layer_paths(model)}
    if component == "unet":
        for path, name in comfyui.names_of(component, model).items():
            flat = name.removeprefix("diffusion_model.").replace(".", "_")
            names[f"{prefix}_{flat}"] = path
    return names


def _peft_keys(folder: Path) -> list[str]:
    """The keys of a peft folder's weights."""
    from jaxsynth.weights.adapters.diffusers import PEFT_WEIGHTS
    from jaxsynth.weights.adapters.lycoris import load

    return list(load(folder / PEFT_WEIGHTS)[0]) if (folder / PEFT_WEIGHTS).is_file() else []


def _network(names: Any) -> str:
    """The network that an adapter without a name is for, by the names of its layers."""
    clip = any(".encoder.layers." in f".{name}" for name in names)
    return "text_encoder" if clip else "unet"


def _write_adapters(
    target: Path, states: dict[str, AdapterState], to: str, networks: Networks
) -> list[str]:
    """Writes the states; returns what has become of them."""
    from jaxsynth.weights.adapters.a1111 import write_hypernetwork
    from jaxsynth.weights.adapters.comfyui import write_comfyui
    from jaxsynth.weights.adapters.components import join_networks
    from jaxsynth.weights.adapters.diffusers import write_diffusers, write_peft
    from jaxsynth.weights.adapters.lycoris import write_networks
    from jaxsynth.weights.adapters.native import write_state

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
        if unknown := sorted(models.keys() - _PREFIXES):
            raise ValueError(f"kohya's files of Stable Diffusion have no {unknown[0]}")
        write_networks(target, {_PREFIXES[name]: model for name, model in models.items()})
    return notes


def _as_lora(
    states: dict[str, AdapterState], to: str, networks: Networks
) -> tuple[dict[str, AdapterState], list[str]]:
    """The states as plain LoRA or DoRA, exactly, where they are another kind."""
    from jaxsynth.adapters.inject import extract
    from jaxsynth.adapters.to_lora import as_lora
    from jaxsynth.weights.adapters.diffusers import fits_diffusers

    found, notes = {}, []
    for name, state in states.items():
        if not fits_diffusers(state.config):
            kind = type(state.config).__name__.removesuffix("Config")
            why = f"--to={to} makes LoRA of {kind}, for which the base is needed"
            state = extract(as_lora(networks.attached(state, name, why)))
            notes.append(f"{name}: {kind} as LoRA of rank {state.config.rank}, exactly")
        found[name] = state
    return found, notes
