"""How robust classifiers are, after the study of synthetic clones (Singh et al. 2024, 2405.20469).

    jaxsynth run --config=configs/robustness.py:tiny --workdir=runs/robustness

`tiny` asks the shipped CLIP as it is, and after training on drawn shapes on their own backgrounds
and on any background. The first learns the backgrounds, and its BG-Gap, CB_k and the accuracy on
mixed backgrounds show it; within five minutes on two cores. A CLIP of your own, or the shipped one
with a peft adapter (a classifier's `best`, where it kept shots for validation), is one more model:

    --config.models.mine.clip=FOLDER --config.models.mine.adapter=FOLDER

Variants: `tiny`; `full` with AutoAttack and more pictures; `smoke`, a few pictures and steps, for
the tests. `--config.mode=paper` follows the published code, faults included.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "tiny") -> ConfigDict:
    if arg not in ("tiny", "full", "smoke"):
        raise ValueError(f"variant {arg!r}, expected tiny, full or smoke")
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
