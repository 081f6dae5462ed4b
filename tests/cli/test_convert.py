"""`jaxsynth convert` through the command: both kinds of source, and what it refuses."""

import jax
import numpy as np
import pytest

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.inject import AdapterState
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.adapters.registry import attach
from jaxsynth.cli import main as cli
from jaxsynth.data.store import Entry, StoreWriter
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.weights.adapters.components import join_networks, split_networks
from jaxsynth.weights.adapters.diffusers import read_diffusers
from jaxsynth.weights.adapters.native import read_state, write_state
from jaxsynth.weights.adapters.peft import read_peft, write_peft
from jaxsynth.weights.hf import load_pipeline
from tests.adapters.nets import scrambled


def adapter(*paths: str) -> AdapterState:
    rng = np.random.default_rng(len(paths[0]))
    arrays = {}
    for path in paths:
        arrays[f"{path}.lora_A"] = rng.normal(size=(6, 2)).astype(np.float32)
        arrays[f"{path}.lora_B"] = rng.normal(size=(2, 8)).astype(np.float32)
    targets = tuple({path.rsplit(".", 1)[-1] for path in paths})
    return AdapterState(arrays, LoRAConfig(rank=2, alpha=3.0, targets=targets))


UNET = adapter("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
TEXT = adapter("text_model.encoder.layers.0.self_attn.q_proj")


def same(a: AdapterState, b: AdapterState) -> None:
    assert a.arrays.keys() == b.arrays.keys() and a.config.alpha == b.config.alpha
    for name, value in a.arrays.items():
        np.testing.assert_array_equal(value, b.arrays[name])


def test_adapters_go_to_diffusers_and_back(tmp_path, capfd):
    write_peft(tmp_path / "in" / "unet", UNET)
    write_peft(tmp_path / "in" / "text_encoder", TEXT)
    lora, back = tmp_path / "lora", tmp_path / "back"
    assert cli.main(["convert", str(tmp_path / "in"), str(lora), "--to=diffusers"]) == 0
    assert "text_encoder (2 arrays), unet (2 arrays)" in capfd.readouterr().out
    states = read_diffusers(lora)
    same(states["unet"], UNET)
    same(states["text_encoder"], TEXT)
    assert cli.main(["convert", str(lora), str(back), "--to", "peft"]) == 0
    same(read_peft(back / "unet"), UNET)
    same(read_peft(back / "text_encoder"), TEXT)


@pytest.mark.parametrize(("state", "name"), [(UNET, "unet"), (TEXT, "text_encoder")])
def test_the_network_of_one_peft_folder_is_seen_from_its_layers(tmp_path, state, name):
    write_peft(tmp_path / "in", state)
    file = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(tmp_path / "in"), str(file), "--to=diffusers"]) == 0
    same(read_diffusers(file)[name], state)
    assert cli.main(["convert", str(file), str(tmp_path / "back"), "--to=peft"]) == 0
    same(read_peft(tmp_path / "back"), state)


def test_an_image_store_becomes_an_image_folder(tmp_path, capfd):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    entries = [
        Entry(label=i % 2, class_name="cat/dog"[: 3 + 4 * (i % 2)], index=i) for i in (0, 1, 2)
    ]
    StoreWriter(tmp_path / "store", ["cat", "cat/dog"], 3).write_shard(0, list(images), entries)
    target = tmp_path / "folder"
    assert cli.main(["convert", str(tmp_path / "store"), str(target), "--to=imagefolder"]) == 0
    assert "3 images to" in capfd.readouterr().out
    assert len(list(target.glob("*/*.png"))) == 3
    assert cli.main(["convert", str(tmp_path / "store"), str(tmp_path / "x"), "--to=peft"]) == 1
    assert "is an image store: --to=peft does not apply" in capfd.readouterr().err


def test_refusals_name_what_is_wrong(tmp_path, capfd):
    write_peft(tmp_path / "in", UNET)
    (tmp_path / "note").write_text("Read me first.")
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF\0\1")
    for argv, message in [
        ((tmp_path / "gone", tmp_path / "x", "--to=peft"), "gone does not exist"),
        ((tmp_path / "in", tmp_path / "in", "--to=peft"), "in already exists"),
        ((tmp_path / "in", tmp_path / "x", "--to=kohia"), "--to=kohia: expected one of peft"),
        ((tmp_path / "in", tmp_path / "x", "--to=kohia"), "parquet; did you mean kohya?"),
        ((tmp_path / "in", tmp_path / "note" / "x", "--to=peft"), "note is a file, expected a"),
        ((tmp_path / "note", tmp_path / "x", "--to=peft"), "note: is a text, not a safetensors"),
        ((tmp_path / "a.jpg", tmp_path / "x", "--to=peft"), "a.jpg: is a JPEG picture, not a"),
        ((tmp_path / "in", tmp_path / "x", "--to=parquet"), "is an adapter: --to=parquet does"),
        ((tmp_path, tmp_path / "x", "--to=peft"), None),
    ]:
        code = cli.main(["convert", *map(str, argv)])
        err = capfd.readouterr().err
        if message is None:  # the parent of one peft folder is read as a folder of networks
            assert code == 0
        else:
            assert code in (1, 2) and message in err and err.count("\n") == 1, err
    (tmp_path / "empty").mkdir()
    assert cli.main(["convert", str(tmp_path / "empty"), str(tmp_path / "y"), "--to=peft"]) == 1
    assert "is nothing this command knows: expected store.json" in capfd.readouterr().err


@pytest.fixture(scope="module")
def states(base_folder):
    """A LoKr and a DoRA of both networks, none of whose values are where they started."""
    pipeline = load_pipeline(base_folder)
    model = TextToImage(pipeline.unet, pipeline.text_encoder)
    found = {}
    for kind, settings in (("lokr", {"rank": 1, "factor": 2, "alpha": 3}), ("dora", {"rank": 2})):
        config = registry.make_config(kind, targets=("conv_in", "to_v", "q_proj"), **settings)
        state = inject.extract(registry.add(model, config, rngs=jax.random.key(0)))
        moved = scrambled(state, 1).arrays
        arrays = {key: value + 0.3 * moved[key] for key, value in state.arrays.items()}
        found[kind] = AdapterState(arrays, state.config)
    return model, found


def kernels(model, state):
    """The merged kernels of the adapted layers."""
    merged = inject.layers(inject.merge(attach(model, state)))
    names = {name.rpartition(".")[0] for name in state.arrays}
    return {name: np.asarray(merged[name].kernel[...]) for name in sorted(names)}


def run(*argv):
    return cli.main(["convert", *map(str, argv)])


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "through", "says"),
    [
        ("lokr", "lycoris", ""),
        ("lokr", "comfyui", ""),
        ("lokr", "peft", ""),
        ("lokr", "kohya", "unet: LoKr as LoRA of rank"),
        ("lokr", "diffusers", "text_encoder: LoKr as LoRA of rank"),
        ("dora", "lycoris", ""),
        ("dora", "comfyui", "for the base's norms, by which ComfyUI divides"),
        ("dora", "diffusers", ""),
    ],
)
def test_any_format_is_what_was_trained(states, base_folder, tmp_path, capfd, kind, through, says):
    model, found = states
    expected = kernels(model, found[kind])
    write_state(tmp_path / "in" / "adapter.safetensors", found[kind])
    name = "there" if through == "peft" else "there.safetensors"
    based = f"--base={base_folder}"
    assert run(tmp_path / "in", tmp_path / name, f"--to={through}", based) == 0
    assert says in capfd.readouterr().out
    assert run(tmp_path / name, tmp_path / "back.safetensors", "--to=jaxsynth", based) == 0
    out = capfd.readouterr().out
    if through in ("lycoris", "comfyui") and kind == "dora":
        side = "for the base's norms, as" if through == "comfyui" else "are of outputs, by their"
        assert f"DoRA's magnitudes {'are ' if through == 'comfyui' else ''}{side}" in out
    back = kernels(model, read_state(tmp_path / "back.safetensors"))
    assert back.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(back[name], value, atol=5e-6 * np.abs(value).max())
    if through not in ("peft", "diffusers"):
        assert run(tmp_path / "there.safetensors", tmp_path / "x", "--to=peft") == 1
        assert "say which by --base=FOLDER" in capfd.readouterr().err


@pytest.mark.heavy
def test_hypernetworks_and_what_has_no_form(base_folder, tmp_path, capfd):
    unet = load_pipeline(base_folder).unet
    config = registry.make_config("hypernetwork", activation="tanh")
    state = inject.extract(registry.add(unet, config, rngs=jax.random.key(0)))
    write_state(tmp_path / "in.safetensors", state)
    based = f"--base={base_folder}"
    assert run(tmp_path / "in.safetensors", tmp_path / "net.pt", "--to=a1111", based) == 0
    assert run(tmp_path / "net.pt", tmp_path / "back.safetensors", "--to=jaxsynth", based) == 0
    back = read_state(tmp_path / "back.safetensors").arrays
    for name, value in state.arrays.items():
        np.testing.assert_array_equal(back[f"unet.{name}"], value)
    capfd.readouterr()
    for to, message in (
        ("peft", "peft has no Hypernetwork, only LORA, LOHA"),
        ("lycoris", "a hypernetwork layer has no form in LyCORIS' files"),
        ("diffusers", "a hypernetwork layer adds no kernel, and is no LoRA"),
    ):
        assert run(tmp_path / "in.safetensors", tmp_path / "x", f"--to={to}", based) == 1
        assert message in capfd.readouterr().err
    assert not (tmp_path / "x").exists()


def test_networks_are_joined_with_the_places_that_each_names():
    one = registry.make_config(
        "ia3", targets=("^a.to_k$", "ff"), feedforward=("^a.ff$",), scales_bias=False
    )
    two = registry.make_config("ia3", targets=("q_proj",), feedforward=(), scales_bias=False)
    states = {
        "unet": AdapterState({"a.to_k.ia3_l": np.ones(2), "a.ff.ia3_l": np.ones(2)}, one),
        "text_encoder": AdapterState({"b.q_proj.ia3_l": np.ones(2)}, two),
    }
    joined = join_networks(states)
    assert joined.config.targets == (r"^unet\.a.to_k$", "ff", "q_proj")
    assert joined.config.feedforward == (r"^unet\.a.ff$",)
    parts = split_networks(joined)
    assert parts["unet"].config == one and parts["text_encoder"].config.targets == ("q_proj",)
    ranks = {
        name: AdapterState({"x.lora_A": np.ones(2)}, LoRAConfig(rank=rank, targets=("x",)))
        for name, rank in (("unet", 2), ("text_encoder", 3))
    }
    with pytest.raises(ValueError, match="unet and text_encoder have adapters of different"):
        join_networks(ranks)
    config = join_networks(ranks, mixed=True).config
    for path, rank in (("unet.x", 2), ("text_encoder.x", 3)):
        assert (config.rank_at(path), config.scaling_at(path)) == (rank, 1)
