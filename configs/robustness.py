"""How robust classifiers are, after the study of synthetic clones (Singh et al. 2024, 2405.20469).

    jaxsynth run --config=configs/robustness.py:tiny --workdir=runs/robustness

`tiny` asks the shipped CLIP as it is, and after training on drawn shapes on their own backgrounds
and on any background. The first learns the backgrounds, and its BG-Gap, CB_k and the accuracy on
mixed backgrounds show it; within six minutes on two cores. A CLIP of your own, or the shipped one
with a peft adapter (a classifier's `best`, where it kept shots for validation), is one more model:

    --config.models.mine.clip=FOLDER --config.models.mine.adapter=FOLDER

So is a checkpoint in transformers' or timm's layout, with its head's file if it has none inside
(DINOv2, MAE), whose classes are those of the sets:

    --config.models.mine.checkpoint=FOLDER --config.models.mine.head=FILE

Variants: `tiny`, with the ten corruptions of the study; `full` with AutoAttack, all corruptions and
more pictures; `smoke`, a few pictures and steps, for the tests; `imagenet`, a CLIP on published
sets in folders (`jaxsynth.data.robustness_sets` says how they are laid out):

    jaxsynth run --config=configs/robustness.py:imagenet --workdir=runs/imagenet \\
        --config.sets.clean.path=imagenet/val --config.sets.classes=imagenet_class_index.json \\
        --config.sets.shifted.R.source=folder --config.sets.shifted.R.path=imagenet-r \\
        --config.sets.ood.textures.source=folder --config.sets.ood.textures.path=dtd/images \\
        --config.sets.context.source=folder --config.sets.context.path=focus

ImageNet-C's own pictures instead of those made here, and 3DCC's, and a tenth of the clean images:

        --config.corruptions.names=() --config.sets.clean.count=5000 \\
        --config.sets.corrupted.c.source=folder --config.sets.corrupted.c.path=imagenet-c \\
        --config.sets.corrupted.3d.source=folder --config.sets.corrupted.3d.path=imagenet-3dcc

With `--config.mode=paper` the published code's figures come first, faults included; the page has
both modes.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "tiny") -> ConfigDict:
    if arg not in ("tiny", "full", "smoke", "imagenet"):
        raise ValueError(f"variant {arg!r}, expected tiny, full, smoke or imagenet")
    if arg == "imagenet":
        return _imagenet()
    smoke, full = arg == "smoke", arg == "full"
    models = {
        "zero-shot": {"clip": "tiny/clip"},
        "original": {"clip": "tiny/clip", "train_on": "original"},
        "mixed": {"clip": "tiny/clip", "train_on": "mixed_rand"},
    }
    return ConfigDict(
        {
            "method": "robustness",
            "models": {"original": models["original"]} if smoke else models,
            "per_class": 2 if smoke else 100 if full else 24,
            "train_per_class": 2 if smoke else 64,
            "autoattack": full,
            "corruptions": {
                "names": ("contrast", "fog_3d") if smoke else ("all",) if full else ("paper",),
                "severities": (1, 5) if smoke else (1, 2, 3, 4, 5),
            },
            "baseline": "original" if smoke else "zero-shot",
            "resamples": 100 if smoke else 2000,
            "batch_size": 16 if smoke else 64,
            "classify": {
                "steps": 2 if smoke else 300,
                "warmup_epochs": 0,
                "batch_size": 8 if smoke else 32,
                "learning_rate": 1e-3,
                "mix_probability": 0.0,
            },
        }
    )


def _imagenet() -> ConfigDict:
    return ConfigDict(
        {
            "method": "robustness",
            "models": {"clip": {"clip": "openai/clip-vit-base-patch16"}},
            "sets": {"clean": {"source": "folder"}},
            "corruptions": {"names": ("imagenet_c",), "released": True},
            "baseline": "alexnet",
        }
    )
