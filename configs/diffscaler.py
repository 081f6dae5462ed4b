"""DiffScaler (Nair et al. 2024): one frozen diffusion transformer, many data sets.

    jaxsynth run --config=configs/diffscaler.py:tiny --workdir=runs/diffscaler

Variants:
- `tiny`: the shipped small DiT, which knows printed digits, shapes and six classes of photos, is
  given handwritten digits (real), textures (drawn) and patches of two photos (real); the main
  recipes, one seed, in minutes on two CPU cores.
- `study`: the same with every recipe, the rates swept for each, three seeds.
- `conditions`: the same base; edges and low resolution of the digits, depth and segmentation of
  drawn scenes, each learnt as condition images. `tiny` learns the digits' edges alone.
- `xl2`: DiT-XL/2 at 256 pixels, the published recipe. `xl2,dataset=NAME` is a data set of TFDS,
  `xl2,path=FOLDER` one of class folders. `--config.base=` takes the authors' .pt
  (DiT-XL-2-256x256.pt) or a diffusers folder. On all TPUs or GPUs there are: a batch is cut over
  them, and `--config.mesh.fsdp=4` cuts the weights four ways.
- `base,path=FOLDER`: trains the shipped DiT (`jaxsynth/assets/tiny/dit`) on printed digits, shapes
  and six of CIFAR-10's classes; FOLDER holds train/ and test/ with class folders. Forty minutes
  on one core.
- `smoke`: every stage of `tiny` in a few steps, on a base of its own, for the tests.

Any kind of adapter on all layers is a further recipe, and that of the sets:
`--config.adapter=lokr --config.adapter.rank=4`.

The paper publishes neither rank nor rates, steps or batch: those of `xl2` are Diff-Tuning's for the
same transfer (24,000 steps, batch 32, rate 1e-4) and a rank of 8.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "tiny") -> ConfigDict:
    name, *assignments = arg.split(",")
    variants = {
        "base": _base,
        "tiny": _tiny,
        "study": _study,
        "conditions": _conditions,
        "smoke": _smoke,
        "xl2": _xl2,
    }
    if name not in variants:
        raise ValueError(f"variant {name!r}, expected one of {', '.join(variants)}")
    config = variants[name]()
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        known = {"xl2": ("dataset", "path"), "base": ("path",)}.get(name, ())
        if key not in known or not value:
            takers = "xl2,dataset=NAME, xl2,path=FOLDER or base,path=FOLDER"
            raise ValueError(f"{assignment!r}: expected {takers}")
        data = config.data.target if name == "xl2" else config.base_data.photos
        data.source = {"dataset": "tfds", "path": "folder"}[key]
        data["name" if key == "dataset" else "path"] = value
    return config


def _train(steps: int, batch_size: int, **more) -> dict:
    return {"steps": steps, "batch_size": batch_size, "steps_per_call": 20, **more}


PRINTED = {"source": "builtin", "name": "printed", "images_per_class": 500}


def _base() -> ConfigDict:
    """1.3 million parameters on the 16 tokens of the tiny autoencoder's latents."""
    photos = {"class_names": ("airplane", "cat", "dog", "frog", "horse", "truck")}
    return ConfigDict(
        {
            "method": "diffscaler",
            "vae": "tiny",
            "base_data": {"printed": PRINTED, "photos": {"source": "folder", "path": "", **photos}},
            "mirror": (),
            "pretrain": {
                "width": 128,
                "layers": 4,
                "heads": 4,
                "patch_size": 2,
                "train": _train(
                    16_000, 64, learning_rate=1e-3, schedule="cosine", warmup_steps=200,
                    clip_norm=1.0, ema_decay=0.999,
                ),
            },
            "seeds": (0,),
        }
    )  # fmt: skip


def _tiny() -> ConfigDict:
    """Two cores, minutes."""
    return ConfigDict(
        {
            "method": "diffscaler",
            "base": "tiny/dit",
            "vae": "tiny",
            "dtype": "float32",
            "base_data": {"printed": PRINTED},
            "data": {
                "digits": {"source": "digits"},
                "textures": {"source": "builtin", "name": "textures", "images_per_class": 200},
                "patches": {"source": "builtin", "name": "patches", "images_per_class": 200},
            },
            "mirror": ("patches",),
            "study": ("digits",),
            "recipes": ("full", "lora_all", "affiner_all", "affiner_zero"),
            "rates": {"whole": (3e-3,), "adapter": (1e-2,)},
            # Equal in parameters: the Affiner's scale and shift count like one rank more.
            "rank": 3,
            "lora_rank": 4,
            "train": _train(600, 32, schedule="cosine", warmup_steps=20),
            "seeds": (0,),
            "sets_recipe": "affiner_zero",
            "sets_steps": 2000,
            "together": True,
            "draw": ("full",),
            "generate": {
                "images_per_class": 40,
                "guidance_scale": 1.5,
                "num_inference_steps": 25,
                "batch_size": 60,
                "batches_per_shard": 4,
            },
            "features": "tiny/clip",
            "conditions": {"digits": ("edges",)},
        }
    )  # fmt: skip


def _study() -> ConfigDict:
    config = _tiny()
    del config.recipes  # all of them
    config.rates = ConfigDict(
        {
            "whole": (1e-3, 3e-3),
            "bitfit": (3e-3, 1e-2),
            "difffit": (3e-3, 1e-2),
            "adapter": (1e-2, 3e-2),
        }
    )
    config.seeds = (0, 1, 2)
    return config


def _conditions() -> ConfigDict:
    config = _tiny()
    scenes = {"source": "builtin", "name": "scenes", "images_per_class": 200}
    config.data = ConfigDict({"digits": {"source": "digits"}, "scenes": scenes})
    config.mirror, config.recipes, config.draw = ("scenes",), ("affiner_zero",), ()
    config.conditions = ConfigDict(
        {"digits": ("edges", "low_resolution"), "scenes": ("depth", "segmentation")}
    )
    return config


def _smoke() -> ConfigDict:
    config = _tiny()
    config.base_data.printed.images_per_class = 5
    config.base = ""
    config.pretrain = {"width": 32, "layers": 2}
    config.pretrain.train = ConfigDict(_train(20, 4, learning_rate=1e-3, ema_decay=0.9))
    del config.data.textures
    config.data.patches.images_per_class = 8
    config.train = ConfigDict(_train(20, 4))
    config.sets_steps = 0
    config.generate.images_per_class = 4
    config.generate.num_inference_steps = 2
    config.generate.batch_size = 16
    config.generate.batches_per_shard = 1
    config.error_repeats = 1
    config.quality = ConfigDict({"precision_k": 1, "coverage_k": 1, "repeats": 2, "kid_subsets": 2})
    return config


def _xl2() -> ConfigDict:
    return ConfigDict(
        {
            "method": "diffscaler",
            "base": "DiT-XL-2-256x256.pt",
            "vae": "stabilityai/sd-vae-ft-ema",
            "dtype": "bfloat16",
            "base_data": {
                "imagenet": {"source": "tfds", "name": "imagenet2012", "image_size": 256}
            },
            "data": {"target": {"source": "folder", "name": "", "path": "", "image_size": 256}},
            "mirror": ("target",),
            "study": ("target",),
            "recipes": ("affiner_all",),
            "rates": {"adapter": (1e-4,)},
            "rank": 8,
            "lora_rank": 9,
            "train": {
                "steps": 24_000,
                "batch_size": 32,
                "ema_decay": 0.9999,
                "remat": "block",
                "checkpoint_every": 1000,
            },
            "seeds": (0,),
            "sets_recipe": "affiner_all",
            "together": False,
            "draw": (),
            "generate": {
                "images_per_class": 100,
                "guidance_scale": 1.5,
                "num_inference_steps": 250,
                "sampler": "ancestral",
                "batch_size": 32,
            },
            "features": "tiny/clip",
        }
    )
