"""Scaling studies: what synthetic images are worth, by their number, prompts and mixtures.

    jaxsynth run --config=configs/scaling.py:tiny --workdir=runs/scaling

After Fan et al. (CVPR 2024, arXiv 2312.04567) and the ablations of Singh et al. (2024, arXiv
2405.20469). Vision transformers are trained from scratch on growing sets of synthetic images, of
real ones and of both, and the page fits error against number of images, says what each set was
worth in real images, and which of the studies' claims hold here.

Variants:
- `tiny`: scikit-learn's handwritten digits and the shipped base, images from prompts alone and from
  an adapter that learned 8 shots, five sizes, three seeds.
- `smoke`: every stage in a few steps, for the tests.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "tiny") -> ConfigDict:
    variants = {"tiny": _tiny, "smoke": _smoke}
    if arg not in variants:
        raise ValueError(f"variant {arg!r}, expected one of {', '.join(variants)}")
    return variants[arg]()


def _tiny() -> ConfigDict:
    return ConfigDict(
        {
            "method": "scaling",
            "base": "tiny",
            "data": {},  # digits
            "sources": {
                "prompts": {"prompts": {"weights": {"template": 1.0}}},
                "adapted": {"prompts": {"weights": {"template": 1.0}}, "shots": 8},
            },
            "sizes": (2, 4, 8, 16, 32),
            "real_sizes": (2, 4, 8, 16, 32),
            "added_real": 8,
            "mixed_size": 16,
            "fractions": (0.25, 0.5, 0.75),
            "real_weight": 1.0,
            "seeds": (0, 1, 2),
            "clones": {
                name: {"method": name, "steps": 200, "augment": _augment(0.3)} | more
                for name, more in (
                    ("simclr", {"temperature": 0.2}),
                    ("stablerep", {}),
                    ("synclr", {"temperature": 0.08, "ema_decay": 0.99}),
                    ("synclip", {}),
                )
            },
            "clone_source": "adapted",
            "probe": {"batch_size": 256},
            "judge": {
                "sizes": (32,),
                "attacks": ("FGSM",),
                "corruptions": {
                    "names": ("gaussian_noise", "motion_blur", "contrast", "pixelate"),
                    "severities": (1, 3, 5),
                },
            },
            "finetune": {
                "steps": 200,
                "warmup_steps": 20,
                "learning_rate": 2e-3,
                "clip_norm": 1.0,
            },
            "generate": {
                "images_per_class": 32,
                "guidance_scale": 2.0,
                "num_inference_steps": 10,
                "batch_size": 64,
                "batches_per_shard": 5,
            },
            "network": {"width": 48, "layers": 3, "heads": 4, "patch_size": 8},
            "train": {
                "steps": 120,
                "batch_size": 32,
                "learning_rate": 2e-3,
                "warmup_steps": 30,
                "augment": _augment(0.6),
            },
        }
    )


def _augment(smallest: float) -> dict:
    """Crops alone: a turned, mirrored or recolored digit is another one, or of other data."""
    return {
        "randaugment_ops": 0,
        "crop_scale": (smallest, 1.0),
        "flip_p": 0.0,
        "jitter_p": 0.0,
        "gray_p": 0.0,
        "blur_p": 0.0,
        "solarize_p": 0.0,
    }


def _smoke() -> ConfigDict:
    config = _tiny()
    config.data = ConfigDict({"class_names": ("1", "4", "7", "8")})
    config.sources.adapted.shots = 2
    config.sizes = (1, 2, 3, 4)
    config.real_sizes = (1, 2, 3, 4)
    config.added_real = 2
    config.mixed_size = 4
    config.fractions = (0.5,)
    config.seeds = (0, 1)
    config.resamples = 100
    for name in ("simclr", "stablerep", "synclip"):
        del config.clones[name]
    config.clones.synclr.update(
        {"steps": 2, "captions": 4, "per_caption": 2, "batch_size": 8, "local_crops": 1}
    )
    config.clones.synclr.heads = ConfigDict({"hidden": 16, "outputs": 8, "prototypes": 16})
    config.probe.update({"epochs": 2, "head_rates": (0.1, 0.2)})
    config.judge.sizes = (4,)
    config.judge.corruptions = ConfigDict({"names": ("contrast", "pixelate"), "severities": (1,)})
    config.finetune.steps = 2
    config.finetune.warmup_steps = 1
    config.finetune.batch_size = 8
    config.generate.images_per_class = 4
    config.generate.num_inference_steps = 2
    config.generate.batch_size = 12
    config.generate.batches_per_shard = 1
    config.network = ConfigDict({"width": 16, "layers": 1, "heads": 2, "patch_size": 16})
    config.train.steps = 4
    config.train.warmup_steps = 1
    config.train.batch_size = 8
    return config
