"""The shipped `tiny` base: a Stable Diffusion and a CLIP at 32x32, trained on two CPU cores.

    jaxsynth run --config=configs/tiny_base.py --workdir=runs/tiny_base \
        --config.corpus.photos.path=cifar10/

reads a folder of class folders (`cifar10/train/<class>/*.jpg`); with
`--config.corpus.photos.source=tfds --config.corpus.photos.name=cifar10` the same photos come from
TFDS. Four of CIFAR-10's classes (automobile, bird, deer, ship) are left out: they stay unseen
targets for the few-shot experiments. The run is resumable at any moment.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"configs/tiny_base.py:{arg}: expected no variant or 'smoke'")
    smoke = arg == "smoke"

    def train(steps: int, batch_size: int, learning_rate: float) -> ConfigDict:
        return ConfigDict(
            {
                "steps": 4 if smoke else steps,
                "batch_size": 8 if smoke else batch_size,
                "learning_rate": learning_rate,
                "warmup_steps": 2 if smoke else 500,
                "weight_decay": 0.01,
                "ema_decay": 0.999,
            }
        )

    return ConfigDict(
        {
            "method": "tiny_base",
            "seed": 0,
            "corpus": {
                "photos": {
                    "source": "folder",
                    "name": "",
                    "path": "",
                    "class_names": ("airplane", "cat", "dog", "frog", "horse", "truck"),
                },
                "digits": 40 if smoke else 30_000,
                "shapes": 20 if smoke else 10_000,
                "image_size": 32,
            },
            "vocab_size": 1024,
            "max_length": 16,
            "width": 128,
            "vision_layers": 6,
            "text_layers": 3,
            "patch_size": 8,
            "clip": train(6_000, 64, 1e-3),
            "vae_channels": (16, 32, 64),
            "latent_channels": 4,
            "kl_weight": 1e-3,
            "vae": train(5_000, 16, 1e-3),
            "unet_channels": (64, 128),
            "unet_heads": 4,
            "unet": train(10_000, 32, 1e-3),
            "caption_dropout": 0.1,
            "snr_gamma": 5.0,
            "preview_images": 2 if smoke else 10,
            "preview_steps": 2 if smoke else 25,
        }
    )
