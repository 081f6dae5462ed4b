"""Writes timm_golden.json, which the tests of timm's checkpoints compare with.

    pip install timm && python tests/weights/make_timm_golden.py

For each case: the config.json that timm itself exports, the keys and shapes of its state dict, and
its logits of fixed images. The weights are drawn anew from a seed in the order of the keys
(`draw`), so that no tensor needs to be stored.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("timm_golden.json")
CLASSES = 4
# Two heads of 8 channels, 3 x 3 patches.
VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4, "img_size": 12}
CASES = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "vit_base_patch16_clip_224": VIT,
    "vit_base_patch32_clip_quickgelu_224": VIT,
    "vit_small_patch16_224": VIT
    | {"init_values": 0.1, "qkv_bias": False, "act_layer": "quick_gelu", "drop_path_rate": 0.1},
    "deit3_base_patch16_224": VIT | {"init_values": None, "act_layer": "gelu_tanh"},
    "vit_small_patch14_dinov2": VIT,
    "vit_small_patch14_reg4_dinov2": VIT,
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (4, 8, 8, 8)},
    "resnet50": {"layers": (1, 2, 1, 1), "channels": (4, 4, 8, 8)},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (6, 10, 10, 12)},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 6, "depths": (2, 2), "num_heads": (1, 2), "window_size": 2, "patch_size": 2,
        "img_size": 16,
    },
}  # fmt: skip


def draw(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights for the keys in their order: of variance 1 / inputs, factors and variances near 1."""
    rng = np.random.default_rng(0)
    tensors = {}
    for key, shape in shapes.items():
        noise = rng.standard_normal(shape).astype(np.float32)
        if len(shape) > 1 and not key.endswith(("embed", "token", "table")):
            noise /= np.sqrt(np.prod(shape[1:]))
        elif key.endswith("running_var"):
            noise = 0.5 + np.abs(noise)
        elif len(shape) == 1 and key.endswith("weight"):
            noise = 1 + 0.2 * noise
        else:
            noise *= 0.3
        tensors[key] = noise.astype(np.float32)
    return tensors


def images(size: int) -> np.ndarray:
    """Two normalised images (2, size, size, 3)."""
    return np.random.default_rng(1).standard_normal((2, size, size, 3)).astype(np.float32)


def golden(name: str) -> dict:
    import timm
    import torch
    from timm.models._hub import save_config_for_hf

    args = CASES[name]
    model = timm.create_model(name, num_classes=CLASSES, **args).eval()
    shapes = {
        key: list(value.shape)
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    tensors = {key: torch.from_numpy(value) for key, value in draw(shapes).items()}
    found = model.load_state_dict(tensors, strict=False)
    assert not found.unexpected_keys
    size = args.get("img_size", 32)
    with torch.no_grad():
        logits = model(torch.from_numpy(images(size)).permute(0, 3, 1, 2)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(model, str(path), model_args=args)
        config = json.loads(path.read_text())
    return {
        "timm": timm.__version__,
        "config": config,
        "size": size,
        "shapes": shapes,
        "logits": [[round(float(x), 6) for x in row] for row in logits],
    }


def write() -> None:
    """One line for each case."""
    lines = [f"{json.dumps(name)}: {json.dumps(golden(name))}" for name in CASES]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    write()
