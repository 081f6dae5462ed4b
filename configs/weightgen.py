"""Denoised neural weights (Gong et al., ECCV 2024): initial weights made from a text.

    jaxsynth run --config=configs/weightgen.py:tiny --workdir=runs/weightgen

Variants:
- `tiny`: 16-pixel squares of two real photos, procedurally edited; an editor of 111,491 parameters,
  LoRAs of 128 concepts with parts in common by the words of their texts (of which the second factor
  alone is trained), generators in three settings, 8 unseen concepts with 16 pairs of images each,
  one seed; within 20 minutes on two CPU cores.
- `study`: the same with more unseen concepts, more settings (prediction, residual, normalisation)
  and three seeds.
- `factors`: `tiny` with both factors of every LoRA trained, nothing in common, as published, and
  taken as they are, as balanced ones or as those next to the first concept's.
- `full`: the published size: 256 pixels, 7.06 million parameters, blocks of 256, 1000 concepts of a
  file or a language model, photos of a folder, edited procedurally or, with `edits.kind=diffusion`
  and `edits.model`, by an InstructPix2Pix model. On GPUs or TPUs, over all devices.
- `smoke`: every stage of `tiny` in a few steps, for the tests.

The paper gives neither the widths of its networks nor rates, steps, batch or the number of
concepts: those of `full` are pix2pix's where it has them, and otherwise ours.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "tiny") -> ConfigDict:
    variants = {
        "tiny": _tiny,
        "study": _study,
        "factors": _factors,
        "full": _full,
        "smoke": _smoke,
    }
    if arg not in variants:
        raise ValueError(f"variant {arg!r}, expected one of {', '.join(variants)}")
    return variants[arg]()


def _gan(steps: int, batch_size: int, **more) -> dict:
    return {"steps": steps, "batch_size": batch_size, "loss": "lsgan", **more}


def _generator(
    prediction: str, residual: str, *, steps: int = 400, t: int = -1, canonical: str = "none"
) -> dict:
    """A small denoiser of blocks of 64 weights."""
    return {
        "t": t,
        "canonical": canonical,
        "generator": {
            "network": {
                "patch_size": 16,
                "block_out_channels": (64, 96),
                "attention_head_dim": 32,
                "norm_num_groups": 8,
            },
            "train": {
                "steps": steps,
                "batch_size": 128,
                "learning_rate": 2e-3,
                "warmup_steps": 50,
                "steps_per_call": 50,
                "prediction_type": prediction,
                "noise_bias": 3.0 if t < 0 else 0.0,
            },
            "per": "array",
            "residual": residual,
        },
    }


def _tiny() -> ConfigDict:
    return ConfigDict(
        {
            "method": "weightgen",
            "text": "tiny",
            "data": {
                "source": "builtin", "name": "patches", "image_size": 16, "images_per_class": 128,
                "test_fraction": 0.25,
            },
            "photos": 256,
            "held_out": 32,
            "concepts": {"train": 128, "validation": 6, "unseen": 8, "base": 16},
            "editor": {
                "generator": {"widths": (16, 32), "kernel_size": 3, "num_attention_heads": 2},
                "discriminator": {"ndf": 12, "n_layers": 2, "norm": "instance"},
                "pix2pix": {"num_downs": 3, "ngf": 12, "norm": "instance", "dropout": 0.0},
                "base": _gan(3000, 8, learning_rate=2e-3, schedule="cosine"),
                "together": _gan(300, 2, learning_rate=1e-2, schedule="cosine"),
                "tune": _gan(100, 4, learning_rate=1e-2),
                "scratch": _gan(800, 4, learning_rate=2e-3),
                "every": 20,
                "share": "words",
                "train_down": False,
                "pairs": 16,
                "tune_at": (0, 5, 10, 20, 50, 100),
                "scratch_at": (0, 50, 100, 200, 400, 800),
            },
            "rank": 8,
            "checkpoints": 2,
            "block": 64,
            "generators": {
                "noise at 500": _generator("epsilon", "mean", t=500),
                "x0": _generator("sample", "mean", steps=800),
                "x0 on ridge": _generator("sample", "ridge"),
            },
            "few_steps": 4,
            "ablation_at": (0, 5, 20),
            "seeds": (0,),
        }
    )  # fmt: skip


def _study() -> ConfigDict:
    config = _tiny()
    config.concepts.unseen = 16
    config.generators["v"] = ConfigDict(_generator("v_prediction", "mean", steps=800))
    config.generators["x0 on nearest"] = ConfigDict(_generator("sample", "nearest"))
    for per in ("group", "value"):
        config.generators[f"x0, per {per}"] = ConfigDict(_generator("sample", "mean"))
        config.generators[f"x0, per {per}"].generator.per = per
    config.seeds = (0, 1, 2)
    return config


def _factors() -> ConfigDict:
    config = _tiny()
    config.editor.train_down, config.editor.share = True, "none"
    config.generators = ConfigDict(
        {f"x0, {kind}": _generator("sample", "none", canonical=kind)
         for kind in ("none", "svd", "aligned")}
    )  # fmt: skip
    config.generators["x0 on ridge, aligned"] = ConfigDict(
        _generator("sample", "ridge", canonical="aligned")
    )
    return config


def _smoke() -> ConfigDict:
    config = _tiny()
    config.editor.train_down = True
    config.data.image_size = 8
    config.data.images_per_class = 8
    config.photos, config.held_out = 8, 4
    config.concepts = ConfigDict({"train": 6, "validation": 2, "unseen": 2, "base": 2})
    config.editor.generator.widths = (4,)
    config.editor.discriminator.ndf, config.editor.discriminator.n_layers = 4, 1
    config.editor.pix2pix.num_downs, config.editor.pix2pix.ngf = 2, 4
    for name in ("base", "together", "tune", "scratch"):
        config.editor[name].steps, config.editor[name].batch_size = 4, 2
    config.editor.base.batch_size = 8
    config.editor.every, config.checkpoints = 1, 2
    config.editor.pairs, config.rank = 4, 2
    config.editor.tune_at, config.editor.scratch_at = (0, 2, 4), (0, 4)
    config.generators = ConfigDict(
        {"x0 on ridge": _generator("sample", "ridge", canonical="aligned")}
    )
    generator = config.generators["x0 on ridge"].generator
    generator.network.block_out_channels, generator.network.attention_head_dim = (16, 16), 16
    generator.train.steps = generator.train.steps_per_call = 2
    config.ablation_at, config.few_steps = (0, 2), 2
    return config


def _full() -> ConfigDict:
    config = _tiny()
    config.text = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.data = ConfigDict({"source": "folder", "path": "", "image_size": 256})
    config.photos, config.held_out = 1000, 100
    config.concepts = ConfigDict(
        {"source": "file", "path": "concepts.json", "train": 1000, "validation": 20, "unseen": 30,
         "base": 20}
    )  # fmt: skip
    config.editor = ConfigDict(
        {
            "base": _gan(50_000, 16),
            "together": _gan(20_000, 4),
            "tune": _gan(5_000, 4),
            "scratch": {"steps": 50_000, "batch_size": 4},
            "every": 500,
            "tune_at": (0, 50, 100, 250, 500, 1000, 2000, 5000),
            "scratch_at": (0, 1000, 5000, 10_000, 20_000, 50_000),
        }
    )
    config.rank = 4
    config.checkpoints, config.block = 8, 256
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    train = {
        "steps": 100_000, "batch_size": 2048, "learning_rate": 1e-4, "warmup_steps": 1000,
        "ema_decay": 0.9999,
    }  # fmt: skip
    config.generators = ConfigDict(
        {
            name: {"generator": {"train": {**train, "prediction_type": prediction}}, "t": t}
            for name, prediction, t in (
                ("noise at 500", "epsilon", 500),
                ("x0", "sample", -1),
                ("v", "v_prediction", -1),
            )
        }
    )
    return config
