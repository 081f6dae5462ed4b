"""The scheduler of a pipeline's folder, as diffusers' text-to-image pipeline takes it.

A pipeline does not take scheduler_config.json at its word: the class is the one that
model_index.json names, and options that old or hand-made configs left at their class's defaults are
corrected, because Stable Diffusion was not trained for them (`StableDiffusionPipeline.__init__` of
diffusers 0.42; `skip_prk_steps` as its inpainting pipeline does).
"""

from collections.abc import Mapping
from typing import Any

from jaxsynth.diffusion.schedules import FIELDS


def corrected(
    config: Mapping[str, Any], class_name: str | None = None, *, text_to_image: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """The config as the pipeline uses it, and what was changed that may change an image.

    `class_name` is model_index.json's. A pipeline that is not for text to image corrects the class
    alone.
    """
    found, notes = dict(config), []
    stated = found.get("_class_name")
    if class_name and class_name != stated:
        found["_class_name"] = class_name
        if stated:
            notes.append(f"the class is {class_name}, as model_index.json says, not {stated}")
    if not text_to_image:
        return found, notes
    unset = set(found.get("_use_default_values", ()))
    defaults = FIELDS.get(found.get("_class_name", ""), {})
    given = {name: value for name, value in found.items() if name not in unset}
    options = {**defaults, **given}

    def correct(name: str, value: Any, *, matters: bool = True) -> None:
        was = found[name] if name in given else f"{options[name]} (the default)"
        found[name] = value
        unset.discard(name)
        if matters:
            notes.append(f"{name} is {value}, not {was}")

    if options.get("steps_offset", 1) != 1:
        correct("steps_offset", 1, matters=options.get("timestep_spacing") == "leading")
    if options.get("clip_sample", False) is True:
        correct("clip_sample", False)
    if options.get("skip_prk_steps", True) is False:
        correct("skip_prk_steps", True)
    if "_use_default_values" in found:
        found["_use_default_values"] = sorted(unset)
    return found, notes
