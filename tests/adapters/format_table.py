"""The table of kinds and file formats: what is written here, and what its readers make of it.

Run as a program it writes the table into the README of the room:

    python -m tests.adapters.format_table

A kind is put on one layer of a small UNet with random values, written in a format, and read by the
tool whose format it is: diffusers, peft and LyCORIS by the libraries themselves, kohya's and
ComfyUI's by their conventions in NumPy. A cell says what came out.
"""

import copy
import functools
import tempfile
from pathlib import Path

import diffusers
import jax
import numpy as np
import peft
import torch
from flax import nnx
from lycoris.wrapper import create_lycoris_from_weights
from safetensors.numpy import load_file

from jaxsynth.adapters import inject, registry
from jaxsynth.core.errors import UserError
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.weights.adapters import io
from jaxsynth.weights.adapters.lycoris import write_networks
from jaxsynth.weights.layout import to_file
from jaxsynth.weights.models import describe
from tests.adapters.nets import scrambled

README = Path(__file__).parents[2] / "jaxsynth" / "adapters" / "README.md"
MARKS = "<!-- formats: made by tests/adapters/format_table.py -->", "<!-- end of formats -->"
UNET = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
TARGET = f"{BLOCK}.attn2.to_k"
KEYS_AND_VALUES = (TARGET, f"{BLOCK}.attn2.to_v")
# Settings by kind: the first that a format takes counts, as formats mean different things by one
# name. alpha is another number than the rank.
RANKED = ({"rank": 2, "alpha": 3.0},)
SETTINGS: dict[str, tuple[dict, ...]] = {
    "lokr": ({"rank": 1, "alpha": 3.0, "factor": 2},),
    "dokr": ({"rank": 1, "alpha": 3.0, "factor": 2},),
    "vera": ({"rank": 2},),
    "adalora": ({"rank": 2, "alpha": 3.0, "target_rank": 1},),
    "delta_lora": ({"rank": 2, "alpha": 3.0, "ratio": 0.5},),
    "glora": ({"rank": 2, "alpha": 3.0}, {"rank": 2, "form": "hadamard"}),
    "oft": ({"block_size": 4},),
    "boft": ({"block_size": 4, "butterfly": 0, "rescale": True}, {"block_size": 4}),
    "ia3": (
        {"targets": (TARGET,), "feedforward": ()},
        {"targets": (TARGET,), "feedforward": (), "scales_bias": False},
    ),
    "full": ({},),
    "affiner": ({"rank": 2},),
    "prefix": ({"targets": KEYS_AND_VALUES, "tokens": 2},),
    "hypernetwork": ({"targets": KEYS_AND_VALUES, "activation": "tanh"},),
}
HEADS = {
    "diffusers": "diffusers", "peft": "peft", "kohya": "kohya", "lycoris": "LyCORIS",
    "comfyui": "ComfyUI", "a1111": "A1111", "jaxsynth": "jaxsynth",
}  # fmt: skip
YES, AS_LORA, WRITTEN, NO = "yes", "as LoRA", "ours", "-"


@functools.cache
def base() -> nnx.Module:
    plain = describe(UNet2DCondition, UNet2DConditionConfig.from_dict(UNET))
    graphdef, state = nnx.split(plain)
    generator = np.random.default_rng(0)
    values = jax.tree.map(lambda x: generator.standard_normal(x.shape).astype("f4") / 4, state)
    return nnx.merge(graphdef, jax.tree.map(jax.numpy.asarray, values))


@functools.cache
def _torch_base() -> torch.nn.Module:
    model = diffusers.UNet2DConditionModel(**UNET)
    model.load_state_dict({key: torch.tensor(x) for key, x in to_file(base()).items()})
    return model.eval()


def torch_base() -> torch.nn.Module:
    return copy.deepcopy(_torch_base())


def adapted(kind: str, settings: dict) -> nnx.Module:
    config = registry.make_config(kind, **{"targets": (TARGET,)} | settings)
    model = registry.add(base(), config, rngs=jax.random.key(0))
    state = inject.extract(model)
    moved = scrambled(state, 1).arrays
    arrays = {name: value + moved[name] for name, value in state.arrays.items()}
    if kind == "hypernetwork":  # the format has one network for all layers of a width
        arrays = dict(state.arrays)
    return inject.load_state(model, inject.AdapterState(arrays, config))


def weight_by(reader: str, target: Path) -> np.ndarray | None:
    """The layer's weight as a reader has it; None where it does not read the file."""
    if reader == "diffusers":
        pipe = diffusers.StableDiffusionPipeline(
            vae=None, text_encoder=None, tokenizer=None, unet=torch_base(), scheduler=None,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.load_lora_weights(target)
        pipe.fuse_lora(components=["unet"])
        return pipe.unet.state_dict()[f"{TARGET}.base_layer.weight"].numpy()
    if reader == "peft":
        model = peft.PeftModel.from_pretrained(torch_base(), target)
        return model.merge_and_unload().state_dict()[f"{TARGET}.weight"].numpy()
    if reader == "lycoris":
        model = torch_base()
        try:
            network, _ = create_lycoris_from_weights(1.0, str(target), model)
        except TypeError:  # it gives (IA)^3 an argument too many
            return None
        network.apply_to()
        layer = model.get_submodule(TARGET)
        with torch.no_grad():
            return layer(torch.eye(UNET["cross_attention_dim"])).T.numpy()
    if reader in ("kohya", "comfyui"):
        return by_convention(load_file(target), reader == "comfyui")
    return None


def by_convention(tensors: dict[str, np.ndarray], comfyui: bool) -> np.ndarray | None:
    """kohya's scripts, or ComfyUI: alpha / rank times the update, DoRA over the base's norms."""
    own = {key.split(".", key.count(".") - _tail(key))[-1]: x for key, x in tensors.items()}
    weight = to_file(base())[f"{TARGET}.weight"]
    down, up = (own.get(f"lora_{n}.weight") for n in ("A", "B") if comfyui) if comfyui else (
        own.get(f"lora_{n}.weight") for n in ("down", "up"))  # fmt: skip
    known = {"alpha"}
    if down is not None and up is not None:
        change, rank = up @ down, len(down)
        known |= {f"lora_{n}.weight" for n in ("A", "B", "down", "up")}
    elif comfyui and "hada_w1_a" in own:
        change = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        rank = len(own["hada_w1_b"])
        known |= {f"hada_w{i}_{n}" for i in "12" for n in "ab"}
    elif comfyui and "lokr_w1" in own and "lokr_w2_a" in own:
        change = np.kron(own["lokr_w1"], own["lokr_w2_a"] @ own["lokr_w2_b"])
        rank = len(own["lokr_w2_b"])
        known |= {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}
    elif comfyui and "diff" in own:
        change, rank, known = own["diff"], 1, {"diff"}
    else:
        return None
    scaled = own.get("alpha", rank) / rank * change
    if comfyui and "dora_scale" in own:
        known |= {"dora_scale"}
        return (weight + scaled) * own["dora_scale"] / np.linalg.norm(weight, axis=1)[:, None]
    return weight + scaled if own.keys() <= known else None


def _tail(key: str) -> int:
    """How many dots the end of a key has: "lora_down.weight" has one."""
    return 1 if key.endswith(".weight") and ".lora_" in key else 0


def cell(kind: str, to: str) -> str:
    """What becomes of a kind in a format; AssertionError where a reader computes something else."""
    networks = io.Networks(lambda: {"unet": base()})
    for settings in SETTINGS.get(kind, RANKED):
        model = adapted(kind, settings)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / ("adapter.pt" if to == "a1111" else "adapter.safetensors")
            target = target.with_suffix("") if to == "peft" else target
            try:
                notes = io.write(target, {"unet": inject.extract(model)}, to, networks)
            except (TypeError, ValueError, UserError):
                continue
            if to == "lycoris":  # the library's own prefix, which is all that it reads
                write_networks(target.with_stem("library"), {"lycoris": model})
            mergeable = inject.can_merge(model)
            states, _ = io.read(target, networks) if kind != "prefix" or to != "peft" else ({}, [])
            if mergeable:
                expected = to_file(inject.merge(model))[f"{TARGET}.weight"]
                back = registry.attach(base(), states["unet"])
                _same(to_file(inject.merge(back))[f"{TARGET}.weight"], expected, kind, to, "ours")
                read = target.with_stem("library") if to == "lycoris" else target
                found = weight_by(to, read)
                if found is None and to != "jaxsynth":
                    return WRITTEN
                if found is not None:
                    _same(found, expected, kind, to, "its reader's")
            elif states:
                for name, value in inject.extract(model).arrays.items():
                    np.testing.assert_allclose(states["unet"].arrays[name], value, atol=1e-6)
            if not mergeable and to != "jaxsynth":
                return WRITTEN
            return AS_LORA if any(" as LoRA of rank " in note for note in notes) else YES
    return NO


def _same(found: np.ndarray, expected: np.ndarray, kind: str, to: str, whose: str) -> None:
    plain = to_file(base())[f"{TARGET}.weight"]
    assert np.abs(expected - plain).max() > 1e-2, kind
    bound = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=bound, err_msg=f"{kind} in {to}, {whose}")


def row(kind: str) -> str:
    cells = [cell(kind, to) for to in HEADS]
    return f"| {kind} | {' | '.join(cells)} |"


def committed() -> dict[str, str]:
    """The rows in the README by kind."""
    text = README.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    return {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}


def main() -> None:
    head = [f"| kind | {' | '.join(HEADS.values())} |", "|---" * (len(HEADS) + 1) + "|"]
    rows = "\n".join([*head, *map(row, registry.KINDS)])
    before, _, rest = README.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    README.write_text(f"{before}{MARKS[0]}\n{rows}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
