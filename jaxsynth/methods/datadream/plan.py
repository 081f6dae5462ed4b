"""What each program of a DataDream run needs on a mesh, from its config alone.

The tasks and the sampler are those that the stages run, of shapes: no weights are read. Of data
that is not here a size is assumed and named.
"""

import jax
from jax.sharding import Mesh

from jaxsynth.adapters import registry
from jaxsynth.generation.planning import plan_images
from jaxsynth.methods.datadream.config import Config
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.runs.sources import count_data
from jaxsynth.tasks.clip_classifier import classifier_task
from jaxsynth.tasks.text_to_image import planned_task
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan
from jaxsynth.weights.hf import describe_clip, describe_pipeline


def plan(config: Config, mesh: Mesh) -> list[Plan]:
    """Fine-tuning in each mode, generating, and the classifier; the largest number of shots.

    UserError as `trainer.train`, and where the configs of base or CLIP are not at hand.
    """
    classes, _, note = count_data(config.data)
    shots, finetune = max(config.shots), config.finetuning
    dtypes = {"dtype": config.dtype, "compute_dtype": config.dtype}
    base, clip = describe_pipeline(config.base, **dtypes), describe_clip(config.clip, **dtypes)
    together = config.classes_at_once or classes
    plans = []

    def adapt(model: TextToImage) -> TextToImage:
        return registry.add(model, finetune.adapter_config(), rngs=jax.random.key(0))

    for mode in config.modes:
        images = shots * classes if mode == "dset" else shots
        task = planned_task(base, finetune, images=images)
        count = together if mode == "cls" else 0
        name = "fine-tune dset" if mode == "dset" else f"fine-tune {count} classes"
        sized = finetune.sized(images)
        plans.append(trainer.plan(name, task, sized, mesh, count=count, note=note))
    kept = config.dtype != "float32"  # merged into 16-bit weights, an adapter would be rounded
    for mode in config.modes:
        adapters = classes if mode == "cls" else int(kept)
        name = f"generate, {mode}" if adapters else "generate"
        plans.append(
            plan_images(
                name, base, config.generate, mesh, prompts=classes, adapt=adapt,
                adapters=adapters, note=note,
            )
        )  # fmt: skip
    images = config.generate.images_per_class * classes
    prompts = ["a photo"] * classes
    task = classifier_task(clip, prompts, config.classify, seed=0, both=True)
    sized = config.classify.sized(images)
    plans.append(trainer.plan("classify", task, sized, mesh, note=note))
    return plans
