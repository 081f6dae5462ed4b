"""Every method's programs are planned, at the size of its smoke config, on two devices and eight.

Of a plan on a mesh no program may gather a batch: each device works on its own rows.
"""

import math
import re
from pathlib import Path

import jax
import pytest

from jaxsynth.cli.main import METHODS, method_module
from jaxsynth.core.config import load_config, override, to_dataclass
from jaxsynth.core.errors import UserError
from jaxsynth.training.sharding import make_mesh

CONFIGS = Path(__file__).parents[2] / "configs"

# What is set besides, and the programs that a plan has.
PROGRAMS = {
    "controlled": (
        ("ways=controlnet,affiner",),
        ("controlnet", "draw, controlnet", "affiner", "draw, affiner"),
    ),
    "customize": (
        (),
        ("textual_inversion", "draw, base", "draw, customised"),
    ),
    "datadream": (
        ("modes=dset,cls",),
        ("fine-tune dset", "fine-tune 10 classes", "generate, dset", "generate, cls", "classify"),
    ),
    "diffscaler": ((), ()),
    "robustness": ((), ()),
    "scaling": (
        (),
        ("adapter", "images", "training, real", "training, synthetic", "clone synclr"),
    ),
    "tiny_base": ((), ("clip", "vae", "unet")),
    "weightgen": (
        (),
        (
            "base", "6 LoRAs", "generator x0 on ridge", "one fine-tuning",
            "weights of one concept, x0 on ridge",
        ),
    ),
}  # fmt: skip


def configured(name: str, base: Path | str, *assignments: str):
    values = load_config(f"{CONFIGS / name}.py:smoke")
    for field, value in values.items():
        if value in ("tiny", "tiny/clip"):
            values[field] = value.replace("tiny", str(base))
    values = override(values, [tuple(one.split("=", 1)) for one in assignments])
    module = method_module(name)
    if "method" not in module.Config.__dataclass_fields__:
        del values["method"]
    return module, to_dataclass(module.Config, values)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_program_is_planned(name, deeper_folder):
    assignments, names = PROGRAMS[name]
    module, config = configured(name, deeper_folder, *assignments)
    live = sum(x.nbytes for x in jax.live_arrays())
    programs = module.plan(config, make_mesh(devices=jax.devices()[:2]))
    plans = [one.compile() for one in programs]
    assert [one.name for one in plans] == [one.name for one in programs] and plans
    assert not names or tuple(one.name for one in plans) == names
    for one in plans:
        assert one.flops > 0 and one.moved > 0 and 0 <= one.frozen <= one.arguments + one.unread, (
            one.name
        )
    assert sum(x.nbytes for x in jax.live_arrays()) < live + 2**22


@pytest.mark.slow
def test_no_program_gathers_a_batch():
    """Of a base whose latents are larger than what XLA gathers without a thought."""
    mesh, batches = make_mesh(), ("finetune.batch_size=8", "classify.batch_size=16")
    batches = (*batches, "generate.batch_size=16")
    module, config = configured("datadream", "tiny", *batches, "modes=dset")
    for program in module.plan(config, mesh):
        plan = program.compile()
        assert plan.collectives, program.name
        gathered = dict(plan.largest).get("all-gather", "s32[0]")
        dims = re.findall(r"\d+", gathered.partition("[")[2])
        # Keys, labels and numbers of rows; a row of pixels or latents has far more.
        assert math.prod(map(int, dims)) <= 2 * plan.images, (program.name, gathered)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "parameters", "programs"),
    [
        ("imagenet", 85.9e6, ("images", "training, real", "training, synthetic")),
        ("imagenet,network=vit_s16", 21.7e6, ("images", "training, real", "training, synthetic")),
        ("imagenet,network=resnet50", 23.7e6, ("images", "training, real", "training, synthetic")),
        ("datadream", 85.9e6, ("adapter", "images", "training, real", "training, synthetic")),
    ],
)
def test_full_size_studies_are_planned_from_their_configs_alone(variant, parameters, programs):
    """Networks, batches and lengths of full size; the base's config alone is a small one's."""
    values = override(load_config(f"{CONFIGS / 'scaling.py'}:{variant}"), [("base", "tiny")])
    module = method_module("scaling")
    found = module.plan(to_dataclass(module.Config, values), make_mesh(devices=jax.devices()[:2]))
    assert tuple(one.name for one in found) == programs
    training = found[-1]
    plan = training.compile()
    # 100 classes are assumed. Of every parameter there are two moments, all in float32; a device's
    # half of the batch is bytes.
    state = plan.arguments - plan.images // 2 * 224**2 * 3
    assert 0.99 < state / (3 * 4 * parameters) < 1.03
    assert "100 classes" in plan.note and training.updates(training.batch) > 50_000
    assert plan.flops > 6 * parameters * plan.images / 2


def test_a_method_without_training_has_nothing_to_plan():
    module, config = configured("robustness", "tiny", "models.original.train_on=")
    with pytest.raises(UserError, match="none is trained here"):
        module.plan(config, make_mesh())
