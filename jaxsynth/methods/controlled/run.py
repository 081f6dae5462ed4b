"""Following condition images: adapters inside Stable Diffusion against a ControlNet beside it.

DiffScaler (Nair et al. 2024, arXiv 2404.09976) learns conditional tasks without a second network
and without zero convolutions, by new parameters in every layer, and names ControlNet (arXiv
2302.05543) as what it is to be held against: about 7 million parameters against 300. Both start as
the same base and see the same images, noise, times and prompts at every step
(`tasks.controlled`). What they learnt is measured twice: by the error of the noise on held-out
images, with their own condition, with another image's and with none; and on images drawn for
held-out conditions, in which the condition is found again (`quality.adherence`).

Below the run's folder:

    triples                        latents, conditions and prompts of the data set
    ways/<way>/<rate>-seed<n>      what was learnt, its errors, and images drawn with it
"""

import dataclasses
from functools import partial
from pathlib import Path

from jaxsynth.methods.controlled import stages
from jaxsynth.methods.controlled.config import Config
from jaxsynth.methods.controlled.plan import plan
from jaxsynth.methods.controlled.report import report
from jaxsynth.runs.run import keep_record, record_made
from jaxsynth.runs.sources import condition_files, data_source, pipeline_source
from jaxsynth.runs.stage import Artifact
from jaxsynth.runs.sweep import sweep
from jaxsynth.weights.hf import PIPELINES

__all__ = ["Config", "make", "plan", "report", "run"]


def run(config: Config, workdir: Path) -> Path:
    """Every stage of the run, then its page; returns the page's path."""
    make(config, workdir)
    record_made(Path(workdir), config)
    return report(Path(workdir))


def make(config: Config, workdir: Path) -> None:
    """Every way at every rate, then every seed."""
    folder, mesh = Path(workdir), config.mesh.make()
    base = pipeline_source(config.base, kinds=PIPELINES)
    data = data_source(config.data)
    triples = stages.encode(
        folder / "triples", stages.Encoding(config.kind), label="triples", base=base, data=data,
        files=condition_files(data, config.condition_folder),
    )  # fmt: skip
    keep_record(folder, config)

    def train(way: str, rate: float, seed: int) -> Artifact:
        slice_ = stages.WayTraining(
            config.way(way, seed), dataclasses.replace(config.train, learning_rate=rate),
            config.error_repeats, config.images, config.generate, config.seeds[0],
        )  # fmt: skip
        return stages.train_way(
            folder / "ways" / way / f"{rate:g}-seed{seed}", slice_,
            label=f"{way}: rate {rate:g}, seed {seed}", mesh=mesh, base=base, triples=triples,
        )  # fmt: skip

    for way in config.ways:
        sweep(config.rates_of(way), config.seeds, partial(train, way))
