"""Checkpoints as transformers writes them give its logits, and what does not fit is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxsynth.core.errors import UserError
from jaxsynth.robustness.attacks.gradient import fgsm
from jaxsynth.weights import hub, preprocessing
from jaxsynth.weights.networks.classifiers import load_classifier, save_classifier
from jaxsynth.weights.preprocessing import Preprocessing
from jaxsynth.weights.safetensors import opened
from tests.models.torch_parity import nchw, randomise, relative_error
from tests.weights import make_timm_golden

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GOLDEN = json.loads(make_timm_golden.GOLDEN.read_text())
CLASSES = 5
VIT = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
}
CASES = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {**VIT, "intermediate_size": 20}),
    "DeiT": (
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        {**VIT, "intermediate_size": 20, "num_hidden_layers": 1},
    ),
    "ResNet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 2]},
    ),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [6, 10], "depths": [1, 2], "num_stages": 2, "patch_size": 2},
    ),
    # 9 patches a side for windows of 4: filled up to 12, merged to 5, filled up to 8.
    "Swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 18, "patch_size": 2, "embed_dim": 6, "depths": [2, 2],
            "num_heads": [1, 2], "window_size": 4,
        },
    ),
    # Positions for 4 x 4 patches, images of 6 x 6.
    "DINOv2": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**VIT, "mlp_ratio": 2, "use_swiglu_ffn": True},
    ),
    "registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {**VIT, "mlp_ratio": 2, "num_register_tokens": 2},
    ),
}  # fmt: skip
# transformers' classifier reads the mean patch, and not what attention pools (below).
CASES["SigLIP"] = (
    "SiglipForImageClassification",
    "SiglipConfig",
    {"vision_config": {**VIT, "intermediate_size": 20}},
)
SIZES = {"Swin": 18, "ResNet": 40, "ConvNeXt": 15, "DINOv2": 24, "registers": 24}
PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 20},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
}


def peer(name: str):
    """A torch network of random weights, and its images' side."""
    network, config, values = CASES[name]
    config = getattr(transformers, config)(**values, num_labels=CLASSES)
    module = randomise(getattr(transformers, network)(config))
    generator = torch.Generator().manual_seed(2)
    for key, value in module.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return module, SIZES.get(name, 16)


def write_preprocessing(folder, size: int, **changes) -> None:
    values = {**PREPROCESSING, "crop_size": {"height": size, "width": size}, **changes}
    if "size" not in changes:
        values["size"] = {"shortest_edge": size + 4}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Saves a case once and gives its folder, module and images in [0, 1]."""
    made = {}

    def get(name: str):
        if name not in made:
            module, size = peer(name)
            folder = tmp_path_factory.mktemp(name)
            module.save_pretrained(folder)
            write_preprocessing(folder, size)
            images = np.random.default_rng(0).random((3, size, size, 3), np.float32)
            made[name] = folder, module, images
        return made[name]

    return get


def normalised(images) -> np.ndarray:
    return (images - np.float32([0.4, 0.5, 0.6])) / np.float32([0.2, 0.25, 0.3])


def logits_of(module, images) -> np.ndarray:
    with torch.no_grad():
        return module(nchw(normalised(images))).logits.numpy()


@jax.jit
def _ask(predict, images):
    return predict(images)


def jit(classifier, images):
    return _ask(classifier.predict, images)


@pytest.mark.parametrize("name", CASES)
def test_a_transformers_folder_gives_its_logits(name, folder_of):
    folder, module, images = folder_of(name)
    classifier = load_classifier(folder)
    found = jit(classifier, images)
    assert relative_error(found, logits_of(module, images)) < 2e-5
    assert (classifier.num_classes, classifier.image_size) == (CLASSES, images.shape[1])
    assert found.dtype == jnp.float32 and classifier.class_names == ()


@pytest.mark.parametrize("name", GOLDEN)
def test_a_timm_folder_gives_its_logits(name, tmp_path):
    """timm's own answers, stored by make_timm_golden.py, which needs timm installed."""
    case = write_timm(tmp_path, name)
    classifier = load_classifier(tmp_path)
    pixels = make_timm_golden.images(case["size"])
    images = pixels * np.float32(classifier.preprocessing.std) + np.float32(
        classifier.preprocessing.mean
    )
    assert relative_error(jit(classifier, images), case["logits"]) < 2e-5
    pretrained = case["config"]["pretrained_cfg"]
    assert classifier.image_size == pretrained["input_size"][1]
    assert classifier.preprocessing.resize == int(
        classifier.image_size / pretrained["crop_pct"] + 1e-9
    )


@pytest.mark.parametrize("file", ["pytorch_model.bin", "weights.pth"])
def test_a_timm_folder_with_torchs_own_file(file, tmp_path):
    """Among a training's other files."""
    write_timm(tmp_path, "resnet18")
    expected = load_classifier(tmp_path)
    tensors = {
        key: torch.from_numpy(x)
        for key, x in load_file(tmp_path / hub.TRANSFORMERS_WEIGHTS).items()
    }
    torch.save(tensors, tmp_path / file)
    (tmp_path / hub.TRANSFORMERS_WEIGHTS).unlink()
    if file == "pytorch_model.bin":
        torch.save({}, tmp_path / "optimizer.pt")
    found = load_classifier(tmp_path)
    for a, b in zip(*(jax.tree.leaves(nnx.state(c.model)) for c in (expected, found)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_swins_older_layout_is_the_same_network(tmp_path):
    """timm before 0.9, and the authors: patches merge at a stage's end, and buffers are stored."""
    case = write_timm(tmp_path, "swin_tiny_patch4_window7_224")
    tensors = {
        key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): value
        for key, value in make_timm_golden.draw(case["shapes"]).items()
    }
    tensors["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((4, 4), np.float32)
    tensors["layers.0.blocks.1.attn_mask"] = np.zeros((16, 4, 4), np.float32)
    new = load_classifier(tmp_path)
    hub.write_tensors(tmp_path / "model.safetensors", tensors)
    old = load_classifier(tmp_path)
    for a, b in zip(jax.tree.leaves(new.model), jax.tree.leaves(old.model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert new.digest != old.digest


def test_a_file_of_a_resnet_tells_its_shape(tmp_path):
    """torchvision's names, data parallelism's prefix, and ImageNet-SD's head without a bias."""
    case = GOLDEN["resnet50"]
    tensors = make_timm_golden.draw(case["shapes"])
    bias = tensors.pop("fc.bias")
    state = {f"module.{key}": torch.from_numpy(value) for key, value in tensors.items()}
    path = tmp_path / "imagenet_1k_sd.pth"
    torch.save({"epoch": 100, "state_dict": state}, path)
    with pytest.raises(UserError, match="does not tell size, crop, interpolation, mean and std"):
        load_classifier(path)
    classifier = load_classifier(path, preprocess=preprocessing.IMAGENET)
    assert not classifier.model.config.head_bias and classifier.num_classes == 4
    pixels = make_timm_golden.images(case["size"])
    images = pixels * np.float32(preprocessing.IMAGENET_STD) + np.float32(
        preprocessing.IMAGENET_MEAN
    )
    assert relative_error(jit(classifier, images) + bias, case["logits"]) < 2e-5
    # In a folder its config.json says it all.
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    assert load_classifier(tmp_path).preprocessing.resize == 235
    torch.save({"backbone.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="no ResNet in torchvision's names"):
        load_classifier(path, preprocess=preprocessing.IMAGENET)


@pytest.mark.parametrize(("times", "taken"), [(1, 0), (5, 4)])
def test_a_dinov2_heads_width_says_what_it_reads(times, taken, tmp_path):
    """The class token; or four layers' class tokens and the mean patch. Two are transformers'."""
    config = transformers.Dinov2Config(**{**VIT, "num_hidden_layers": 4, "hidden_size": 6})
    module = randomise(transformers.Dinov2Model(config))
    module.save_pretrained(tmp_path)
    write_preprocessing(tmp_path, 16)
    weight = np.random.default_rng(3).standard_normal((CLASSES, 6 * times)).astype(np.float32)
    bias = np.arange(CLASSES, dtype=np.float32)
    torch.save({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}, tmp_path / "h")
    (tmp_path / "h").rename(tmp_path / "linear_head.pth")
    classifier = load_classifier(tmp_path, tmp_path / "linear_head.pth")
    assert classifier.model.config.head_layers == taken
    images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    with torch.no_grad():
        states = module(nchw(normalised(images)), output_hidden_states=True).hidden_states
        states = [module.layernorm(x).numpy() for x in states]
    parts = [x[:, 0] for x in states[-max(taken, 1) :]]
    parts += [states[-1][:, 1:].mean(1)] if taken else []
    expected = np.concatenate(parts, 1) @ weight.T + bias
    assert relative_error(jit(classifier, images), expected) < 2e-5


@pytest.mark.parametrize("kind", ["SiglipModel", "SiglipVisionModel"])
def test_siglips_tower_takes_a_head_on_what_attention_pools(kind, tmp_path):
    """From a folder of both towers or of one."""
    vision = {**VIT, "intermediate_size": 20, "image_size": 17}
    text = {**VIT, "vocab_size": 9, "max_position_embeddings": 4}
    del text["image_size"], text["patch_size"]
    config = {"vision_config": vision, "text_config": text} if kind == "SiglipModel" else vision
    made = getattr(transformers, kind.replace("Model", "Config"))(**config)
    module = randomise(getattr(transformers, kind)(made))
    module.save_pretrained(tmp_path, max_shard_size="8KB")
    write_preprocessing(tmp_path, 17)
    with pytest.raises(UserError, match=r"a siglip.* without a classifier: give its head"):
        load_classifier(tmp_path)
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((CLASSES, 12)).astype(np.float32)
    hub.write_tensors(tmp_path / "head.safetensors", {"weight": weight})
    (tmp_path / "head.safetensors").rename(tmp_path.parent / f"{kind}.safetensors")
    classifier = load_classifier(tmp_path, tmp_path.parent / f"{kind}.safetensors")
    images = rng.random((2, 17, 17, 3), np.float32)
    tower = module.vision_model if kind == "SiglipModel" else module
    with torch.no_grad():
        expected = tower(nchw(normalised(images))).pooler_output.numpy() @ weight.T
    assert relative_error(jit(classifier, images), expected) < 2e-5
    with pytest.raises(ValueError, match=r"siglip.* has no vision_use_head other than False"):
        save_classifier(classifier, tmp_path / "saved")
    without = load_classifier(tmp_path, headless=True)
    assert without.num_classes == 0 and not hasattr(without.model, "classifier")
    naflex = {**json.loads((tmp_path / "config.json").read_text()), "model_type": "siglip2"}
    (tmp_path / "config.json").write_text(json.dumps(naflex))
    with pytest.raises(UserError, match=r"'siglip2': SigLIP 2's NaFlex .* take a checkpoint of a"):
        load_classifier(tmp_path)


def test_mae_takes_a_head_with_its_batch_norm(tmp_path):
    config = transformers.ViTMAEConfig(
        **VIT, intermediate_size=20, mask_ratio=0.0, decoder_hidden_size=8,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=8,
    )  # fmt: skip
    module = randomise(transformers.ViTMAEForPreTraining(config))
    module.save_pretrained(tmp_path)
    write_preprocessing(tmp_path, 16)
    with pytest.raises(UserError, match="a vit_mae without a classifier: give its head"):
        load_classifier(tmp_path)
    norm = torch.nn.BatchNorm1d(12, affine=False, eps=1e-6)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    head = torch.nn.Sequential(norm, torch.nn.Linear(12, CLASSES)).eval()
    torch.save({f"head.{k}": v for k, v in head.state_dict().items()}, tmp_path / "lp.pth")
    classifier = load_classifier(tmp_path, tmp_path / "lp.pth")
    images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    with torch.no_grad():
        tokens = module.vit(nchw(normalised(images))).last_hidden_state
        expected = head(tokens[:, 0]).numpy()
    assert relative_error(jit(classifier, images), expected) < 2e-5


def test_predict_can_be_attacked(folder_of):
    folder, _, images = folder_of("ViT")
    classifier = load_classifier(folder)
    labels = np.asarray(jit(classifier, images)).argmax(1)
    moved = fgsm(classifier.predict, images, labels, jax.random.key(0), eps=0.1)
    before, after = (
        np.take_along_axis(np.asarray(jax.nn.log_softmax(jit(classifier, x))), labels[:, None], 1)
        for x in (images, moved)
    )
    assert (after < before).all()
    assert np.abs(np.asarray(moved) - images).max() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_what_was_saved_is_read_the_same_here_and_by_transformers(name, folder_of, tmp_path):
    folder, module, images = folder_of(name)
    names = ("cat", "dog", "bird", "car", "LABEL_4")
    classifier = dataclasses.replace(load_classifier(folder), class_names=names)
    save_classifier(classifier, tmp_path)
    again = load_classifier(tmp_path)
    assert (again.class_names, again.preprocessing) == (names, classifier.preprocessing)
    assert again.model.config == classifier.model.config
    peer, found = type(module).from_pretrained(tmp_path, output_loading_info=True)
    # transformers gives every DINOv2 the token of masked patches, which no classifier reads.
    missing = {key for key in found["missing_keys"] if not key.endswith("mask_token")}
    assert not missing and not found["unexpected_keys"] and not found["mismatched_keys"]
    assert relative_error(logits_of(peer.eval(), images), logits_of(module, images)) < 1e-6
    assert peer.config.id2label[1] == "dog"


def test_what_transformers_does_not_have_is_not_saved(tmp_path):
    for name, field in (
        ("deit3_small_patch16_224", "layer_scale"),
        ("vit_small_patch14_dinov2", "head_layers"),
    ):
        write_timm(tmp_path, name)
        with pytest.raises(ValueError, match=f"has no {field} other than"):
            save_classifier(load_classifier(tmp_path), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_keys_too_many_and_too_few_are_all_named(folder_of, tmp_path):
    folder, _, _ = folder_of("ViT")
    copy(folder, tmp_path)
    path = tmp_path / "model.safetensors"
    with opened(path) as file:
        tensors = {key: file.read_any(key) for key in file.keys}
    tensors["vit.layer_scale"] = tensors.pop("vit.layernorm.bias")
    tensors["stem.weight"] = tensors.pop("classifier.bias")
    hub.write_tensors(path, tensors)
    with pytest.raises(
        UserError,
        match=r"model.safetensors: does not fit the network: unexpected 2 \(stem.weight, "
        r"vit.layer_scale\); missing 2 \(classifier.bias, vit.layernorm.bias\)",
    ):
        load_classifier(tmp_path)


def test_what_does_not_fit_is_refused(folder_of, tmp_path):
    folder, _, _ = folder_of("ViT")
    copy(folder, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config.json: missing: it tells size, crop"):
        load_classifier(tmp_path)
    given = Preprocessing(32, 36, False, "bicubic", (0.5,) * 3, (0.5,) * 3, "round")
    with pytest.raises(UserError, match="gives 32 pixels a side, the network takes 16"):
        load_classifier(tmp_path, preprocess=given)
    write_preprocessing(tmp_path, 16)
    head = tmp_path / "head.safetensors"
    hub.write_tensors(head, {"weight": np.ones((3, 7), np.float32)})
    with pytest.raises(UserError, match=r"head.safetensors: .*shape \(3, 7\), expected \(3, 12\)"):
        load_classifier(tmp_path, head)
    hub.write_tensors(head, {"weight": np.ones((3, 12), np.float32), "q": np.ones(3)})
    with pytest.raises(UserError, match=r"head.safetensors: key 'q': expected a linear layer's"):
        load_classifier(tmp_path, head)
    for change, message in (
        ({"model_type": "beit"}, "model_type 'beit', expected one of convnext, deit"),
        ({"hidden_act": "snake"}, "ViTConfig.hidden_act: 'snake'"),
        ({"relative": True}, "unknown field 'relative'"),
        ({"image_size": [16, 32]}, "image_size: .16, 32., expected a square"),
        ({"id2label": {"0": "a", "2": "b"}}, "labels: expected the indices 0 to 1"),
    ):
        rewrite(tmp_path / "config.json", folder / "config.json", **change)
        with pytest.raises(UserError, match=message):
            load_classifier(tmp_path)
    deit, _, _ = folder_of("DeiT")
    with pytest.raises(UserError, match="a distilled DeiT has two heads"):
        hub.write_tensors(head, {"weight": np.ones((3, 12), np.float32)})
        load_classifier(deit, head)


def test_timm_arguments_that_are_not_known_are_refused(tmp_path):
    write_timm(tmp_path, "resnet18")
    config = GOLDEN["resnet18"]["config"]
    own = tmp_path / "config.json"
    for change, message in (
        ({"architecture": "resnet50d"}, "architecture 'resnet50d' is not known, only vit_, deit_"),
        *(
            # SigLIP's pooling by attention, and sizes that are not here.
            ({"architecture": name, "global_pool": pool}, f"architecture '{name}' is not known")
            for name, pool in (
                ("vit_base_patch16_siglip_224", "map"),
                ("vit_base_patch16_plus_clip_240", "token"),
                ("deit_base_patch16_clip_224", "token"),
                ("vit_so400m_patch14_siglip_384", "map"),
                ("eva02_base_patch14_448", "avg"),
            )
        ),
        ({"model_args": {"act_layer": "silu"}}, "model_args: unknown 'act_layer'"),
        (
            {"architecture": "vit_tiny_patch16_224", "global_pool": "token"}
            | {"model_args": {"act_layer": "silu"}},
            "act_layer: 'silu', expected one of gelu, quick_gelu",
        ),
        ({"model_args": {"global_pool": "max"}}, "global_pool: expected 'avg', found 'max'"),
        ({"pretrained_cfg": {"mean": [0, 0, 0]}}, "pretrained_cfg has no input_size, crop_pct"),
    ):
        own.write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            load_classifier(tmp_path)


def write_timm(folder, name: str) -> dict:
    """A folder as timm exports it."""
    case = GOLDEN[name]
    (folder / "config.json").write_text(json.dumps(case["config"]))
    hub.write_tensors(folder / "model.safetensors", make_timm_golden.draw(case["shapes"]))
    return case


def copy(source, target) -> None:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def rewrite(path, source, **changes) -> None:
    path.write_text(json.dumps({**json.loads(source.read_text()), **changes}))
