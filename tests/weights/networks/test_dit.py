"""Transformer folders of diffusers both ways, and the authors' checkpoints."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxsynth.adapters.kinds.lora import LoRAConfig, add_lora
from jaxsynth.core.errors import UserError
from jaxsynth.models.diffusion.dit import DiT, DiTConfig, position_embedding
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.weights.models import describe, load_model, save_model
from jaxsynth.weights.networks.dit import SCHEDULER, DiTPipeline, load_dit, save_dit

diffusers = pytest.importorskip("diffusers")

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "sample_size": 8,
    "out_channels": 8,
    "num_embeds_ada_norm": 5,
}
VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 8,
}
COPY = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.weight"


def randomise(module):
    """Every tensor random; the embedders of all blocks the same, as in every trained network."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    blocks = getattr(module, "transformer_blocks", [])
    for block in blocks:
        block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    return module.eval()


@pytest.fixture(scope="module")
def peer():
    return randomise(diffusers.DiTTransformer2DModel(**DIT))


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    """A pipeline as diffusers writes it, and the class names of the published ones."""
    path = tmp_path_factory.mktemp("dit")
    vae = randomise(diffusers.AutoencoderKL(**VAE))
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    diffusers.DiTPipeline(peer, vae, scheduler).save_pretrained(path)
    index = json.loads((path / "model_index.json").read_text())
    index["id2label"] = {"0": "cock, rooster", "4": "fish"}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@jax.jit
def forward(model, x, t, labels):
    return model(x, t, labels)


def assert_same(model, peer):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
    t, labels = np.array([0, 500, 999]), np.array([0, 4, 5])
    with torch.no_grad():
        expected = peer(
            torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t), torch.from_numpy(labels)
        ).sample
    expected = expected.numpy().transpose(0, 2, 3, 1)
    found = forward(model, x, t, labels)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def equal(first: DiT, second: DiT):
    assert first.config == second.config
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(first)), nnx.to_flat_state(nnx.state(second)), strict=True
    ):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


def test_a_pipeline_of_diffusers_loads_and_computes_the_same(peer, folder):
    ours = load_dit(folder)
    assert_same(ours.transformer, peer)
    assert ours.vae.config.latent_channels == 4
    assert ours.scheduler_config["_class_name"] == "DDIMScheduler"
    assert ours.id2label == {0: "cock, rooster", 4: "fish"}
    assert ours.folder == folder and len(ours.digest) == 64
    # One table of labels, one timestep network, one stack of blocks.
    assert ours.transformer.class_embedder.embedding_table.embedding.shape == (6, 16)
    assert ours.transformer.transformer_blocks.attn1.to_q.kernel.shape == (3, 16, 16)


def test_a_transformers_folder_loads_alone(peer, folder, tmp_path):
    ours = load_dit(folder / "transformer")
    assert_same(ours.transformer, peer)
    assert ours.vae is None and ours.scheduler_config == SCHEDULER and ours.id2label == {}
    save_dit(ours, tmp_path / "alone")
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "alone")
    assert_same(ours.transformer, theirs)


def test_a_pipeline_goes_without_an_autoencoder(folder, tmp_path):
    """As diffusers saves one, and as the package's own comes, whose autoencoder lies elsewhere."""
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "vae")
    with pytest.raises(UserError, match="vae"):
        load_dit(tmp_path / "copy")
    where = tmp_path / "copy" / "model_index.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"vae": [None, None]}))
    found, whole = load_dit(tmp_path / "copy"), load_dit(folder)
    equal(found.transformer, whole.transformer)
    assert found.vae is None and found.digest not in ("", whole.digest)
    assert (found.scheduler_config, found.id2label) == (whole.scheduler_config, whole.id2label)


def test_the_class_that_diffusers_replaced_has_the_same_config(folder, tmp_path):
    copy = tmp_path / "transformer"
    shutil.copytree(folder / "transformer", copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "cross_attention_dim": None}
    config |= {"num_vector_embeds": None, "only_cross_attention": False}
    (copy / "config.json").write_text(json.dumps(config))
    equal(load_dit(copy).transformer, load_dit(folder).transformer)


def test_a_pipeline_of_ours_loads_in_diffusers(folder, tmp_path):
    ours = load_dit(folder)
    save_dit(ours, tmp_path / "out")
    theirs = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    assert_same(ours.transformer, theirs.transformer)
    assert theirs.labels == {"cock": 0, "rooster": 0, "fish": 4}
    again = load_dit(tmp_path / "out")
    equal(again.transformer, ours.transformer)
    assert (
        again.id2label == ours.id2label
        and again.scheduler_config.items() >= {"clip_sample": False}.items()
    )
    theirs.set_progress_bar_config(disable=True)
    # One guided step would ask for row 1000 of the table, which diffusers takes for "no label".
    image = theirs([4], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert np.isfinite(image).all()
    keys = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors").keys()
    wanted = theirs.transformer.state_dict().keys()
    assert keys == wanted


def test_a_new_network_loads_in_diffusers(tmp_path):
    """Nothing in a folder may depend on a config that came from the peers."""
    rngs = nnx.Rngs(0)
    ours = DiTPipeline(
        DiT(DiTConfig.from_dict(DIT), rngs=rngs),
        AutoencoderKL(AutoencoderKLConfig.from_dict(VAE), rngs=rngs),
    )
    save_dit(ours, tmp_path)
    theirs = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert type(theirs.scheduler) is diffusers.DDPMScheduler
    assert theirs.scheduler.config.variance_type == "learned_range"
    assert theirs.labels == {}
    equal(load_dit(tmp_path).transformer, ours.transformer)


def test_what_diffusers_lacks_survives_a_round_trip(tmp_path):
    config = DiTConfig.preset("DiT-S/4", sample_size=8, num_layers=2, condition_channels=1)
    ours = DiTPipeline(DiT(config, rngs=nnx.Rngs(0)))
    save_dit(ours, tmp_path)
    equal(load_dit(tmp_path).transformer, ours.transformer)
    assert load_dit(tmp_path).transformer.config == config


def edited(folder, tmp_path, change):
    copy = tmp_path / "broken"
    shutil.copytree(folder / "transformer", copy)
    path = copy / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return copy


def test_copies_that_differ_are_named(folder, tmp_path):
    broken = edited(folder, tmp_path, lambda t: t[COPY.format(2)].__setitem__((0, 0), 9.0))
    with pytest.raises(UserError, match=r"transformer_blocks\.\d\..*linear_1\.weight differs from"):
        load_dit(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(COPY.format(1)), rf"key '{COPY.format(1)}' missing"),
        (
            lambda t: t.pop("transformer_blocks.2.attn1.to_k.bias"),
            r"key 'transformer_blocks\.2\.attn1\.to_k\.bias' missing",
        ),
        (
            lambda t: t.update({"transformer_blocks.3.attn1.to_k.bias": np.zeros(16, np.float32)}),
            r"unknown key 'transformer_blocks\.3\.attn1\.to_k\.bias'",
        ),
        (
            lambda t: t.update({"transformer_blocks.1.ff.net.2.bias": np.zeros(15, np.float32)}),
            r"ff\.net\.2\.bias: shape \(15,\), expected \(16,\)",
        ),
        (
            lambda t: t.update({"time_embedder.linear_1.bias": np.zeros(16, np.float32)}),
            r"unknown key 'time_embedder\.linear_1\.bias'",
        ),
    ],
    ids=["copy", "layer", "extra-layer", "shape", "own-name"],
)
def test_blocks_are_read_strictly(folder, tmp_path, change, message):
    with pytest.raises(UserError, match=rf"broken/.*safetensors: .*{message}"):
        load_dit(edited(folder, tmp_path, change))


def test_half_precision_storage(folder, tmp_path):
    half = load_dit(folder, jax.numpy.bfloat16, compute_dtype=jax.numpy.float32)
    kernel = half.transformer.transformer_blocks.attn1.to_q.kernel
    assert kernel.dtype == jax.numpy.bfloat16 and half.transformer.dtype == jax.numpy.float32
    save_dit(half, tmp_path)
    equal(load_dit(tmp_path, jax.numpy.bfloat16).transformer, half.transformer)


def test_parts_that_do_not_fit_are_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    for change, message in (
        ({"_class_name": "StableDiffusionPipeline"}, "expected 'DiTPipeline'"),
        ({"id2label": {"5": "none"}}, r"id2label: '5', expected numbers below .* 5"),
        ({"id2label": ["fish"]}, "id2label: expected an object, got list"),
    ):
        (copy / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(UserError, match=rf"model_index\.json: .*{message}"):
            load_dit(copy)
    ours = load_dit(folder)
    narrow = DiT(DiTConfig.from_dict({**DIT, "in_channels": 3}), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="in_channels is 3, but vae latent_channels is 4"):
        save_dit(DiTPipeline(narrow, ours.vae), tmp_path / "out")
    adapted = add_lora(ours.transformer, LoRAConfig(targets=("to_q",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="belongs to an adapter layer"):
        save_dit(DiTPipeline(adapted), tmp_path / "out")
    with pytest.raises(ValueError, match=r"config is for a \.pt file"):
        load_dit(folder, config=ours.transformer.config)


class OfficialBlock(torch.nn.Module):
    """A block as the authors define it, written from the paper's figure 3 and their names."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn = torch.nn.ModuleDict(
            {"qkv": torch.nn.Linear(width, 3 * width), "proj": torch.nn.Linear(width, width)}
        )
        self.mlp = torch.nn.ModuleDict(
            {"fc1": torch.nn.Linear(width, 4 * width), "fc2": torch.nn.Linear(4 * width, width)}
        )
        self.adaLN_modulation = torch.nn.Sequential(
            torch.nn.SiLU(), torch.nn.Linear(width, 6 * width)
        )

    def forward(self, x, c):
        a, b, g, d, e, h = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        norm = torch.nn.functional.layer_norm
        y = norm(x, x.shape[-1:], eps=1e-6) * (1 + b) + a
        n, t, w = y.shape
        q, k, v = self.attn["qkv"](y).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + g * self.attn["proj"](y.transpose(1, 2).reshape(n, t, w))
        y = norm(x, x.shape[-1:], eps=1e-6) * (1 + e) + d
        gelu = torch.nn.functional.gelu(self.mlp["fc1"](y), approximate="tanh")
        return x + h * self.mlp["fc2"](gelu)


class Official(torch.nn.Module):
    """The whole network in the authors' names, 4 x 4 patches of 2 x 2."""

    def __init__(self, width=384, heads=6, depth=2, classes=5):
        super().__init__()
        linear = torch.nn.Linear
        self.x_embedder = torch.nn.ModuleDict({"proj": torch.nn.Conv2d(4, width, 2, 2)})
        layers = [linear(256, width), torch.nn.SiLU(), linear(width, width)]
        self.t_embedder = torch.nn.ModuleDict({"mlp": torch.nn.Sequential(*layers)})
        table = torch.nn.Embedding(classes + 1, width)
        self.y_embedder = torch.nn.ModuleDict({"embedding_table": table})
        positions = torch.from_numpy(position_embedding(4, 4, width, 4))
        self.pos_embed = torch.nn.Parameter(positions[None], requires_grad=False)
        self.blocks = torch.nn.ModuleList(OfficialBlock(width, heads) for _ in range(depth))
        last = torch.nn.Sequential(torch.nn.SiLU(), linear(width, 2 * width))
        self.final_layer = torch.nn.ModuleDict(
            {"adaLN_modulation": last, "linear": linear(width, 2 * 2 * 8)}
        )
        generator = torch.Generator().manual_seed(0)
        for name, value in self.named_parameters():
            if name != "pos_embed":
                value.data = torch.randn(value.shape, generator=generator) * 0.05

    def forward(self, x, t, labels):
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        frequencies = 10000.0 ** (-torch.arange(128) / 128)
        angles = t[:, None] * frequencies
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], -1))
        c = c + self.y_embedder["embedding_table"](labels)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        x = self.final_layer["linear"](x).view(-1, 4, 4, 2, 2, 8)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 8, 8, 8)


@pytest.fixture(scope="module")
def official():
    return Official()


def assert_same_official(model, official):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
    t, labels = np.array([0, 500, 999]), np.array([0, 4, 5])
    with torch.no_grad():
        expected = official(
            torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t), torch.from_numpy(labels)
        )
    expected = expected.numpy().transpose(0, 2, 3, 1)
    assert np.abs(forward(model, x, t, labels) - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_checkpoint_of_the_authors_loads_and_computes_the_same(official, tmp_path):
    path = tmp_path / "DiT-S-2.pt"
    torch.save(official.state_dict(), path)
    ours = load_dit(path)
    assert ours.transformer.config == DiTConfig.preset(
        "DiT-S/2", sample_size=8, num_layers=2, num_embeds_ada_norm=5
    )
    assert ours.scheduler_config == SCHEDULER and ours.vae is None and len(ours.digest) == 64
    assert_same_official(ours.transformer, official)
    # Through a folder of ours nothing changes, the timestep's frequencies included.
    save_dit(ours, tmp_path / "folder")
    assert_same_official(load_dit(tmp_path / "folder").transformer, official)
    random = {k: v if k == "pos_embed" else v + 1 for k, v in official.state_dict().items()}
    torch.save({"model": random, "ema": official.state_dict()}, path)
    equal(load_dit(path).transformer, ours.transformer)


def test_other_widths_need_a_config(tmp_path):
    small = Official(width=24, heads=3)
    path = tmp_path / "small.pt"
    torch.save(small.state_dict(), path)
    with pytest.raises(UserError, match=r"small\.pt: width 24 is none of the published"):
        load_dit(path)
    config = DiTConfig.preset(
        "DiT-S/2",
        sample_size=8,
        num_layers=2,
        num_embeds_ada_norm=5,
        num_attention_heads=3,
        attention_head_dim=8,
    )
    assert_same_official(load_dit(path, config=config).transformer, small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=torch.ones(2)), "unknown key 'extra'"),
        (lambda t: t.pop("blocks.1.mlp.fc1.bias"), "key 'blocks.1.mlp.fc1.bias' missing"),
        (
            lambda t: t.update({"blocks.0.attn.qkv.bias": torch.ones(36)}),
            r"blocks\.0\.attn\.qkv\.bias: shape \(12,\), expected \(384,\)",
        ),
        (
            lambda t: t.update({"t_embedder.mlp.0.bias": torch.ones(384, dtype=torch.int32)}),
            r"t_embedder\.mlp\.0\.bias: int32, expected floats",
        ),
        (lambda t: t.update(pos_embed=t["pos_embed"] + 0.1), "pos_embed .* not the sines"),
        (lambda t: t.clear(), r"key 'blocks\.0\..* missing and 21 more"),
    ],
    ids=["extra", "missing", "shape", "dtype", "positions", "empty"],
)
def test_checkpoints_are_read_strictly(official, tmp_path, change, message):
    tensors = dict(official.state_dict())
    change(tensors)
    torch.save(tensors, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=rf"bad\.pt: .*{message}"):
        load_dit(tmp_path / "bad.pt")


def test_networks_with_stacked_blocks_go_through_the_plain_functions(tmp_path):
    config = DiTConfig.from_dict(DIT)
    model = DiT(config, rngs=nnx.Rngs(0))
    save_model(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == (
        "DiTTransformer2DModel"
    )
    equal(load_model(DiT, DiTConfig, tmp_path), model)
    assert nnx.split(describe(DiT, config))[0] == nnx.split(model)[0]
