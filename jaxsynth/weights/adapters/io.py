"""One way to keep an adapter: the place that chooses a format when writing, and sees it in a file.

It stands here and not in `adapters/`, because it names the formats, which stand above adapters:
each is a module beside this one, and a new one is added in `read`. A state is over the networks of
a pipeline, its paths starting with "unet.", "text_encoder." or "text_encoder_2.".

    from jaxsynth.weights.adapters import io
    state = io.load("lora.safetensors", networks=io.Networks.of("tiny"))
    io.save(state, "folder")
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import jax
from flax import nnx

from jaxsynth.adapters.inject import AdapterState, configs_of, extract, trainable_variables
from jaxsynth.adapters.registry import add, attach
from jaxsynth.adapters.to_lora import as_lora
from jaxsynth.core.errors import UserError
from jaxsynth.core.patterns import in_file
from jaxsynth.core.words import counted
from jaxsynth.weights import recognize
from jaxsynth.weights.adapters import (
    comfyui,
    factors,
    lycoris,
    native,
    tensor_files,
)
from jaxsynth.weights.adapters.a1111 import read_hypernetwork, write_hypernetwork
from jaxsynth.weights.adapters.components import join_networks, split_networks
from jaxsynth.weights.adapters.diffusers import (
    DIFFUSERS_WEIGHTS,
    METADATA,
    TORCH_WEIGHTS,
    fits_diffusers,
    read_diffusers,
    write_diffusers,
)
from jaxsynth.weights.adapters.layer_names import SECOND
from jaxsynth.weights.adapters.layered import read_layers
from jaxsynth.weights.adapters.peft import PEFT_CONFIG, read_peft, weights_of, write_peft
from jaxsynth.weights.hf import load_networks

FILES = (DIFFUSERS_WEIGHTS, native.STATE_FILE, TORCH_WEIGHTS)


class Networks:
    """The networks of the base that adapters are for, by component; loaded when first needed."""

    def __init__(self, load: Callable[[], Mapping[str, nnx.Module]] | None = None):
        self._load = load

    @classmethod
    def of(cls, base: str) -> "Networks":
        """Those of a Stable Diffusion (a folder, hub id or "tiny"); none where it is ""."""

        return cls((lambda: load_networks(base)) if base else None)

    def __bool__(self) -> bool:
        return self._load is not None

    @property
    def is_double(self) -> bool:
        """Whether the base has two text encoders, as SDXL."""
        return bool(self) and SECOND in self._loaded

    def need(self, why: str) -> Mapping[str, nnx.Module]:
        """All of them; UserError where no base is given."""
        if self._load is None:
            raise UserError(f"{why}: say which by --base=FOLDER, a hub id or tiny")
        return self._loaded

    def get(self, component: str) -> nnx.Module | None:
        """One of them, None where no base is given or it has none."""
        return self._loaded.get(component) if self else None

    def attached(self, state: AdapterState, component: str, why: str) -> nnx.Module:
        """The base's network with the adapter of a state."""
        found = self.need(why)
        if component not in found:
            raise UserError(f"the base has no {component}, only {', '.join(found)}")
        return attach(found[component], state)

    @cached_property
    def _loaded(self) -> Mapping[str, nnx.Module]:
        assert self._load is not None
        return self._load()


def save(state: AdapterState, folder: str | Path) -> Path:
    """Writes an adapter over a pipeline's networks into a folder; returns the file.

    LoRA and DoRA become `pytorch_lora_weights.safetensors`, diffusers' file; any other kind, which
    diffusers has no file for, this package's own `adapter.safetensors`.
    """
    folder = Path(folder)
    if fits_diffusers(state.config) and (states := split_networks(state)):
        write_diffusers(folder, states)
        return folder / DIFFUSERS_WEIGHTS
    native.write_state(folder / native.STATE_FILE, state)
    return folder / native.STATE_FILE


def load(path: str | Path, networks: Networks | None = None) -> AdapterState:
    """The adapter at a path, in any format that `read` knows, over a pipeline's networks.

    The UNet comes first. Raises UserError as `read`.
    """
    path = Path(path)
    if path.is_file() and path.name == native.STATE_FILE:
        return native.read_state(path)
    states, _ = read(path, networks or Networks())
    try:
        return join_networks(dict(sorted(states.items(), reverse=True)), mixed=True)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def find(folder: str | Path, names: Sequence[str] = ()) -> list[Path]:
    """The one adapter file of a folder, or that of each of its folders `names`, in their order."""
    folder = Path(folder)
    places = [folder, *(folder / name for name in names)]
    found = [place / file for place in places for file in FILES if (place / file).is_file()]
    if len(found) not in (1, len(names)):
        raise UserError(f"{folder}: {counted(len(found), 'adapter')}, expected 1 or {len(names)}")
    return found


def read(source: str | Path, networks: Networks) -> tuple[dict[str, AdapterState], list[str]]:
    """The adapters at `source` by the name of their network, and what was assumed.

    A file of diffusers, kohya, LyCORIS, ComfyUI, OneTrainer, A1111 or this package, a folder with
    one, a peft folder, or a folder of those. Where a base is given, all paths and shapes must fit
    it. Raises UserError naming the file, and what it is where it is no adapter.
    """
    source = Path(source)
    beside = source.parent / PEFT_CONFIG
    if source.is_file() and beside.is_file() and source == weights_of(source.parent):
        source = source.parent  # peft's weights without their settings have no scale
    if (source / PEFT_CONFIG).is_file():
        network = _network(tensor_files.keys(weights_of(source)), source)
        states = {network: read_peft(source, networks.get(network))}
        return _checked(states, networks, source), []
    folders = sorted(path.parent for path in source.glob(f"*/{PEFT_CONFIG}"))
    if folders:
        states = {f.name: read_peft(f, networks.get(f.name)) for f in folders}
        return _checked(states, networks, source), []
    file = next((source / name for name in FILES if (source / name).is_file()), source)
    if not file.is_file():
        raise UserError(
            f"{source} is nothing this command knows: expected store.json (an image store), "
            f"{PEFT_CONFIG} (peft) in it or in its folders, {DIFFUSERS_WEIGHTS} (diffusers), "
            f"{native.STATE_FILE} (jaxsynth), or a file of an adapter"
        )
    content = tensor_files.nested(file)
    if any(type(key) is int for key in content):
        why = f"{file} has networks by the width of layers, which a base tells"
        return {"unet": extract(read_hypernetwork(file, networks.need(why)["unet"]))}, []
    metadata = tensor_files.metadata_of(file)
    if native.is_state(metadata):
        state = native.read_state(file)
        states = split_networks(state) or {_network(list(state.arrays), file.parent): state}
        return _checked(states, networks, file), []
    # Trainings such as AnimateDiff's keep the adapter beside their own state.
    inside = type(content.get("state_dict")) is dict
    names = tensor_files.keys(file) if inside or not content else [str(key) for key in content]
    recognize.check_adapter(names, file)
    notes = []
    if words := recognize.bundled_names(names):
        notes.append(f"embeddings beside the adapter are left out: {', '.join(words)}")
        names = [name for name in names if name not in recognize.bundled(names)]
    if recognize.is_diffusers(names):
        notes += [] if METADATA in metadata else ["no configuration in the file: alpha = rank"]
        return _checked(read_diffusers(file), networks, file), notes
    family = recognize.family_of(names)
    what = f"a LoRA of {family}" if family else "in a spelling of kohya, LyCORIS or ComfyUI"
    models = read_layers(file, networks.need(f"{file} is {what}, whose layers a base tells"))
    notes += lycoris.conventions(tensor_files.load(file)[0])
    if comfyui.is_for_base_norms(metadata):
        notes = [note for note in notes if not note.startswith("DoRA")]
        notes.append("DoRA's magnitudes are for the base's norms, as its metadata says")
    return {name: extract(model) for name, model in models.items()}, notes


def write(
    target: str | Path, states: Mapping[str, AdapterState], to: str, networks: Networks
) -> list[str]:
    """Writes adapters by component in one of `formats.FORMATS`; returns what has become of them.

    A state of one network is a peft folder, of several a folder of those; all else is a file (or
    diffusers' folder). Raises ValueError or TypeError naming what the format has no form for, and
    UserError where it needs a base that is not given.
    """
    target = Path(target)
    if to == "jaxsynth":
        native.write_state(target, join_networks(states, mixed=True))
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
        write_diffusers(target, dict(states))
        return notes
    why = f"--to={to} needs the base's layers"
    models = {name: networks.attached(state, name, why) for name, state in states.items()}
    if to == "a1111":
        if list(models) != ["unet"]:
            raise ValueError(f"A1111's hypernetworks are a UNet's, found {', '.join(models)}")
        write_hypernetwork(target, models["unet"])
    elif to == "comfyui":
        comfyui.write_comfyui(target, models)
        if any(getattr(s.config, "decompose", "") == "output" for s in states.values()):
            notes.append("DoRA's magnitudes are for the base's norms, by which ComfyUI divides")
    else:
        lycoris.write_kohya(target, models, double=networks.is_double)
    return notes


def _as_lora(
    states: Mapping[str, AdapterState], to: str, networks: Networks
) -> tuple[dict[str, AdapterState], list[str]]:
    """The states as plain LoRA or DoRA, exactly, where they are another kind."""
    found, notes = {}, []
    for name, state in states.items():
        if not fits_diffusers(state.config):
            kinds = {
                type(part).__name__.removesuffix("Config") for part in configs_of(state.config)
            }
            kind = " and ".join(sorted(kinds))
            why = f"--to={to} makes LoRA of {kind}, for which the base is needed"
            state = extract(as_lora(networks.attached(state, name, why)))
            rank = max(part.rank for part in configs_of(state.config))
            notes.append(f"{name}: {kind} as LoRA of rank {rank}, exactly")
        found[name] = state
    return found, notes


def _network(names: Sequence[str], folder: Path) -> str:
    """The network that an adapter without a name is for, by its layers' names and its folder's."""
    if not any(".encoder.layers." in f".{name}" for name in names):
        return "unet"
    return SECOND if folder.name == SECOND else "text_encoder"


def _checked(
    states: dict[str, AdapterState], networks: Networks, source: Path
) -> dict[str, AdapterState]:
    """The states; UserError naming the file where one does not fit the base that is given."""
    family = recognize.family_of(f"{c}.{n}" for c, state in states.items() for n in state.arrays)
    model = ""
    if family and not networks.is_double:
        model = f" (the file is of {family}, and the base is not)"
    elif networks.is_double and not family:
        model = " (the base is SDXL, and nothing in the file says that it is for one)"
    for component, state in list(states.items()) if networks else ():
        network = networks.get(component)
        if network is None:
            raise UserError(
                f"{source}: holds an adapter of {component}, which the base lacks{model}"
            )
        try:
            with in_file("its configuration"):
                states[component] = _fitted(network, state)
                attach(network, states[component])
        except UserError as error:
            raise UserError(f"{source} ({component}): {error}{model}") from error
    return states


def _fitted(network: nnx.Module, state: AdapterState) -> AdapterState:
    """The state with the axes that its layers have: those of 1x1 convolutions, or of linear layers.

    UserError where a factor has another shape than its layer takes, both as in a file.
    """
    try:
        adapted = nnx.eval_shape(lambda: add(network, state.config, rngs=jax.random.key(0)))
    except (TypeError, ValueError):
        return state  # `attach` says what is wrong with the places
    arrays = dict(state.arrays)
    for name, variable in trainable_variables(adapted).items():
        if name not in arrays:
            continue
        found, wanted = arrays[name].shape, variable.get_value().shape
        if found == wanted:
            continue
        if _plain(found) != _plain(wanted):
            end = name.rpartition(".")[2]
            theirs = [factors.torch_shape(end, shape) for shape in (found, wanted)]
            raise UserError(
                f"{name} has shape {theirs[0]}, and the base's layer takes {theirs[1]}: the "
                "adapter is for another network"
            )
        arrays[name] = arrays[name].reshape(wanted)
    return AdapterState(arrays, state.config)


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without windows of one tap."""
    window = shape[:-2]
    return shape[-2:] if all(size == 1 for size in window) else shape
