"""InstantID's files: what is written is read again and by diffusers, and what is none is named."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx

from jaxsynth.core.errors import UserError
from jaxsynth.models.diffusion.image_prompt import ImageProjection, ProjectionConfig
from jaxsynth.weights.adapters import tensor_files
from jaxsynth.weights.adapters.identities import FILE, NET, read_identity, write_identity
from jaxsynth.weights.adapters.image_prompts import write_image_adapter
from jaxsynth.weights.hf import load_pipeline
from jaxsynth.weights.torch_files.writer import write_pickled
from tests.generation.identities import random_identity
from tests.methods.small_base import random_network


@pytest.fixture(scope="module")
def bases(deeper_folder, sdxl_folder):
    return {"sd": load_pipeline(deeper_folder).unet, "sdxl": load_pipeline(sdxl_folder).unet}


@pytest.fixture(scope="module")
def folders(bases, tmp_path_factory):
    found = {}
    for name, unet in bases.items():
        found[name] = tmp_path_factory.mktemp("instantid") / name
        write_identity(found[name], random_identity(unet))
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_what_is_written_is_read_again(bases, folders, tmp_path, name):
    """As .bin and as .safetensors; the numbers in the file are those of down, up and middle."""
    expected = random_identity(bases[name])
    content = tensor_files.nested(folders[name] / FILE)
    count = len(expected.adapter.kernels)
    assert set(content["ip_adapter"]) == {
        f"{2 * i + 1}.to_{x}_ip.weight" for i in range(count) for x in "kv"
    }
    assert list(expected.adapter.kernels)[-1].startswith("mid_block")
    shutil.copytree(folders[name] / NET, tmp_path / NET)
    write_image_adapter(tmp_path / "ip-adapter.safetensors", expected.adapter)
    for folder in (folders[name], tmp_path):
        again = read_identity(folder, bases[name])
        for path, pair in expected.adapter.kernels.items():
            np.testing.assert_array_equal(again.adapter.kernels[path], pair)
        for part in ("adapter.projection", "net"):
            one, other = expected, again
            for step in part.split("."):
                one, other = getattr(one, step), getattr(other, step)
            assert one.config == other.config
            for (path, value), (_, found) in zip(
                nnx.to_flat_state(nnx.state(one)), nnx.to_flat_state(nnx.state(other)), strict=True
            ):
                np.testing.assert_array_equal(value.get_value(), found.get_value(), err_msg=path)
        assert again.width == expected.width


def test_an_instantid_of_another_base_is_named(bases, folders):
    for own, other, words in (
        ("sdxl", "sd", r"is an InstantID of SDXL \(.*\), and the base is Stable Diffusion 1 or 2"),
        ("sd", "sdxl", r"is an InstantID of Stable Diffusion 1 or 2 \(.*\), and the base is SDXL"),
    ):
        with pytest.raises(UserError, match=words) as error:
            read_identity(folders[own], bases[other])
        assert "\n" not in str(error.value) and str(folders[own]) in str(error.value)


@pytest.mark.heavy
def test_what_is_no_instantid_for_this_base_is_named(bases, folders, tmp_path):
    unet = bases["sd"]

    def edited(name: str, change=None, config=None):
        folder = tmp_path / name
        shutil.copytree(folders["sd"], folder)
        if change is not None:
            content = tensor_files.nested(folder / FILE)
            parts = {part: dict(content[part]) for part in ("image_proj", "ip_adapter")}
            change(parts)
            write_pickled(folder / FILE, parts)
        if config:
            path = folder / NET / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    def wrong_order(parts):
        kernels = parts["ip_adapter"]
        for x in "kv":
            one, other = f"3.to_{x}_ip.weight", f"7.to_{x}_ip.weight"
            kernels[one], kernels[other] = kernels[other], kernels[one]

    def even_numbers(parts):
        parts["ip_adapter"] = {
            f"{int(key.split('.')[0]) - 1}.{key.partition('.')[2]}": value
            for key, value in parts["ip_adapter"].items()
        }

    linear = tmp_path / "linear"
    shutil.copytree(folders["sd"], linear)
    adapter = random_identity(unet).adapter
    width = unet.config.cross_attention_dim
    projection = random_network(ImageProjection, ProjectionConfig(12, width), 0)
    write_image_adapter(linear / FILE, type(adapter)(projection, adapter.kernels))
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folders["sd"] / FILE, alone / FILE)
    net = tmp_path / "net"
    shutil.copytree(folders["sd"] / NET, net / NET)
    for folder, words in (
        (edited("order", wrong_order), r"ip_adapter\.3\.to_k_ip\.weight \(up_blocks"),
        (edited("even", even_numbers), r"is for 4 cross-attentions \(0, 2, 4, \.\.\., 6\)"),
        (edited("grey", config={"conditioning_channels": 1}), "conv_in"),
        (edited("class", config={"_class_name": "UNet"}), "_class_name 'UNet', expected Contr"),
        (linear, "makes tokens by one linear layer, expected the resampler of an InstantID"),
        (alone, f"no {NET}/config.json here, which an InstantID's folder has"),
        (net, "no IP-Adapter here"),
        (tmp_path / "nowhere", "no such folder, expected one with ip-adapter.bin"),
    ):
        with pytest.raises(UserError, match=words):
            read_identity(folder, unet)
