"""Customisation: a text-to-image model learns a subject, a style or motion from a few examples.

One technique a run (`config.TECHNIQUES`), each with every seed: Textual Inversion (Gal et al. 2022,
arXiv 2208.01618), DreamBooth (Ruiz et al. 2023, arXiv 2208.12242), LoRA on captioned images,
IP-Adapter (Ye et al. 2023, arXiv 2308.06721), which draws each prompt like each of some images, and
InstantID (Wang et al. 2024, arXiv 2401.07519), which draws each prompt with each of some people,
and the motion modules of AnimateDiff and LoRA on them (Guo et al. 2023, arXiv 2307.04725), which
learn from clips and draw animations. The customised model and the untouched base draw the same
prompts, which were not trained on, from the same noise; a CLIP says how alike their images are to
photos that were not trained on, and phase correlation how animations move.

Below the run's folder:

    base-seed<n>        images of the untouched base, whose prompts name the subject's class
    faces, judge        face encoders, and embeddings and keypoints of all faces
    class-seed<n>       images of the class, which DreamBooth keeps the prior by
    learned-seed<n>     the embedding or the adapter
    images-seed<n>      images of the customised model, or strips of its animations
    measured-seed<n>    similarities, or how animations move, and a grid
"""

import dataclasses
from pathlib import Path

from jaxsynth.data.decode import check_square
from jaxsynth.methods.customize import films, stages
from jaxsynth.methods.customize.config import Config
from jaxsynth.methods.customize.faces import Recognizing, recognize
from jaxsynth.methods.customize.motion import with_domain
from jaxsynth.methods.customize.plan import plan
from jaxsynth.methods.customize.report import report
from jaxsynth.methods.customize.techniques import check, class_prompt, filled, name_of
from jaxsynth.runs.run import keep_record, record_made
from jaxsynth.runs.sources import (
    adapter_source,
    clip_source,
    condition_files,
    data_source,
    face_source,
    image_encoder_source,
    motion_source,
    pipeline_source,
)
from jaxsynth.runs.stage import Artifact
from jaxsynth.tasks.motion import ClipConfig

__all__ = ["Config", "make", "plan", "report", "run"]


def run(config: Config, workdir: Path) -> Path:
    """Every stage with every seed, then the page; returns the page's path."""
    make(config, workdir)
    record_made(Path(workdir), config)
    return report(Path(workdir))


def make(config: Config, workdir: Path) -> None:
    """Every stage with every seed.

    What can be wrong with data, words and weights is found before the first long stage.
    """
    folder, mesh, dtype = Path(workdir), config.mesh.make(), config.dtype
    base, clip = pipeline_source(config.base, dtype), clip_source(config.clip)
    data, training = data_source(config.data), config.training
    modules = motion_source(config.motion, base, dtype) if config.motion else None
    check(config, data.value, base.value, modules and modules.value)
    domain = None
    if config.domain_adapter:
        domain = adapter_source(config.domain_adapter, config.base)
        with_domain(base.value, domain.value)  # an adapter of another base is named here
    encoder, faces, judge = None, None, None
    if config.faces:
        faces = face_source(config.faces)
        for source in (data.value.train, data.value.test):
            faces.value.of(source, config.faces)
            check_square(source, "keypoints")
    elif config.sees_images and not config.sees_faces:
        encoder = image_encoder_source(config.image_encoder or config.clip)
    keep_record(folder, config)
    if config.face_encoder is not None:
        faces, judge = (
            recognize(
                folder / name,
                Recognizing(config.face_encoder, (config.seeds[0] + i) % 2**32),
                label=name, mesh=mesh, data=data,
            )
            for i, name in enumerate(("faces", "judge"))
        )  # fmt: skip

    def animate(name: str, seed: int, learned: Artifact | None = None) -> Artifact:
        assert isinstance(training, ClipConfig)
        return films.animate(
            folder / f"{name}-seed{seed}",
            films.Animating(
                config.prompts, config.generate, seed, dtype, training.frames, training.norm,
                config.image_size,
            ),
            label=f"{name}, seed {seed}", base=base, modules=modules, learned=learned,
        )  # fmt: skip

    def draw(
        name: str, seed: int, prompts: tuple[str, ...], learned: Artifact | None = None, count=0
    ) -> Artifact:
        images = config.generate
        if count:
            images = dataclasses.replace(images, images_per_class=count)
        references = 0 if name == "class" else config.references
        return stages.draw(
            folder / f"{name}-seed{seed}",
            stages.Drawing(prompts, images, seed, dtype, references, config.image_size),
            label=f"{name}, seed {seed}", base=base, learned=learned,
            data=data if references else None, encoder=encoder if learned else None,
            faces=faces if learned else None,
        )  # fmt: skip

    named = filled(config.prompts, name_of(training, config.word))
    plain = filled(config.prompts, config.word)
    for seed in config.seeds:
        others = None
        if text := class_prompt(training, config.word, data.value.template):
            others = draw("class", seed, (text,), count=training.class_images)
        learned = stages.learn(
            folder / f"learned-seed{seed}",
            stages.Learning(
                training, config.word, config.shots, seed, dtype, config.image_size
            ),
            label=f"{config.technique}, seed {seed}", mesh=mesh, data=data, base=base,
            others=others, encoder=encoder, faces=faces,
            masks=condition_files(data, config.mask_folder), modules=modules, domain=domain,
        )  # fmt: skip
        if isinstance(training, ClipConfig):
            films.measure_motion(
                folder / f"measured-seed{seed}",
                films.Filming(
                    config.prompts, training.frames, training.stride, config.shots, seed
                ),
                label=f"motion, seed {seed}", data=data, clip=clip,
                untouched=animate("base", seed), drawn=animate("images", seed, learned),
            )  # fmt: skip
            continue
        untouched = draw("base", seed, plain)
        drawn = draw("images", seed, named, learned)
        stages.measure(
            folder / f"measured-seed{seed}",
            stages.Measuring(plain, config.shots, seed, config.references),
            label=f"similarity, seed {seed}", data=data, clip=clip, untouched=untouched,
            drawn=drawn, judge=judge,
        )  # fmt: skip
