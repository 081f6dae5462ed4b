"""DiffScaler's condition tasks: a set of parameters that also follows a condition image.

The recipe is that of the data sets, on the same latents, classes and steps; the network merely
reads a condition image beside the latents (`diffscaler_recipes.with_condition`). What it makes of
it is measured twice: by the error of the noise on held-out images, with their own condition, with
that of another image of their class and with none; and on images drawn for held-out conditions, in
which the condition is found again (`quality.following`). The yardstick is the set of the same data
that learnt no condition.

Below the run's folder, for a data set and a kind of condition:

    conditions/<data set>/<kind>/maps        the conditions, 8 bits a value
    conditions/<data set>/<kind>/adapter     what was learnt, and its held-out errors
    conditions/<data set>/<kind>/images      images drawn for the held-out conditions
    conditions/<data set>/<kind>/following   how closely they follow, and some of them
"""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, UInt8

from jaxsynth.adapters.inject import Trainable, extract, load_state
from jaxsynth.core.io import write_json
from jaxsynth.data.conditions import (
    CHANNELS,
    WITH_PARTNER,
    as_bytes,
    as_fractions,
    known_map,
    source_condition,
)
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.store import ImageStore
from jaxsynth.generation.classes import ClassGenerator, ClassOf
from jaxsynth.generation.generate import fill_store
from jaxsynth.methods.diffscaler.recipes import adapted, first_label
from jaxsynth.models.diffusion.dit import DiT
from jaxsynth.models.diffusion.vae import decode_latents
from jaxsynth.quality.adherence import agreement
from jaxsynth.report.grids import write_grid
from jaxsynth.runs.stage import Artifact, run_stage
from jaxsynth.tasks.class_conditional import Latents, adapt, held_out_error
from jaxsynth.weights.adapters.native import read_state, write_state

if TYPE_CHECKING:
    from jaxsynth.methods.diffscaler.stages import Work

TRAINING = ".training"
# Of the grid of samples.
_LINES, _COLUMNS = 4, 3


class ConditionTask:
    """One kind of condition on one data set of a run."""

    def __init__(self, work: Work, name: str, kind: str):
        self.work, self.name, self.kind = work, name, kind
        self.folder = work.folder / "conditions" / name / kind

    def run(self, rate: float, plain: Artifact, drawn: Artifact) -> Artifact:
        """Every stage. `plain` holds the data set's parameters without a condition, `drawn` images
        of them."""
        adapter = self.train(rate, plain)
        return self.measure(self.draw(adapter), drawn)

    def maps(self) -> Artifact:
        """The condition of every training and test image, of the images' size."""
        config = self.work.config
        folder = config.condition_folders.get(self.kind) if self.kind in WITH_PARTNER else None
        data = config.data[self.name]

        def build(path: Path) -> dict:
            counts = {}
            for part, source in self._sources.items():
                size = source[0].image.shape[0]
                made = [
                    as_bytes(source_condition(source, i, self.kind, size, folder))
                    for i in range(len(source))
                ]
                np.savez_compressed(path / f"{part}.npz", condition=np.stack(made))
                counts[part] = len(made)
            return counts

        settings = {"data": data, "kind": self.kind, "files": folder or ""}
        return run_stage(self._label("maps"), self.folder / "maps", settings, {}, build)

    @cached_property
    def _sources(self) -> dict[str, ImageSource]:
        sources = self.work.sources(self.name)
        return {part: sources[part] for part in ("train", "test")}

    def pixels(self, part: str) -> UInt8[np.ndarray, "n size size k"]:
        """The conditions of "train" or "test" in 255ths."""
        with np.load(self.maps().path / f"{part}.npz", allow_pickle=False) as file:
            return file["condition"]

    def latents(self, part: str) -> Latents:
        """The data set's latents of "train" or "test" with their conditions."""
        return self.work.latents(self.name, part).conditioned(self.pixels(part))

    def train(self, rate: float, plain: Artifact) -> Artifact:
        """The run's recipe for data sets, with the condition beside the latents."""
        work, config = self.work, self.work.config
        train = dataclasses.replace(config.sets_train, learning_rate=rate)
        seed = config.seeds[0]
        settings = {
            "recipe": config.sets_recipe,
            "kind": self.kind,
            "rank": config.rank,
            "lora_rank": config.lora_rank,
            "train": train,
            "seed": seed,
            "rows": work.rows,
            "error_repeats": config.error_repeats,
            "base": work.pipeline.digest,
            "dtype": config.dtype,
            **work.choice(config.sets_recipe),
        }

        def build(folder: Path) -> dict:
            model = adapt(
                self._model(), self.latents("train"), work.schedule, train, folder / TRAINING,
                seed=seed, kept=work.kept(train), description=f"{self.kind} of {self.name}",
            )  # fmt: skip
            write_state(folder / "adapter.safetensors", extract(model))
            return self._errors(model, work.set_model(self.name, plain))

        inputs = {"latents": work.encode(self.name), "maps": self.maps(), "plain": plain}
        return run_stage(
            self._label("condition"),
            self.folder / "adapter",
            settings,
            inputs,
            build,
            unlisted=(f"{TRAINING}/*",),
        )

    def _model(self) -> DiT:
        config = self.work.config
        channels = CHANNELS[self.kind] * self.work.vae.config.downscale**2
        return adapted(
            self.work.dit, config.sets_recipe, self.work.rows, rank=config.rank,
            lora_rank=config.lora_rank, seed=config.seeds[0], adapter=config.adapter,
            condition_channels=channels,
        )  # fmt: skip

    def _errors(self, model: DiT, plain: DiT) -> dict:
        repeats = self.work.config.error_repeats
        error = partial(held_out_error, schedule=self.work.schedule, seed=0, repeats=repeats)
        test = self.latents("test")

        def told(condition: np.ndarray | None) -> Latents:
            return dataclasses.replace(test, condition=condition)

        return {
            "own": error(model, test),
            "another": error(model, told(test.condition[others(test.labels)])),
            "none": error(model, told(np.zeros_like(test.condition))),
            "plain": error(plain, told(None)),
            "trainable": _size(model),
            "trainable_plain": _size(plain),
        }

    def draw(self, adapter: Artifact) -> Artifact:
        """Image i of a class has the condition of that class's held-out image i, in turn."""
        work, config = self.work, self.work.config

        def build(folder: Path) -> dict:
            model = load_state(self._model(), read_state(adapter.path / "adapter.safetensors"))
            test, first = self.latents("test"), first_label(work.dit)
            classes = work.classes(self.name)
            titles = [f"{self.name} {title}" for title in classes]

            def conditions(numbers: np.ndarray, indices: np.ndarray) -> np.ndarray:
                return test.condition[rows_of(test.labels - first, numbers, indices), 0]

            generator = ClassGenerator(
                [model],
                work.vae,
                work.scheduler_config,
                [ClassOf(0, first + label) for label in range(len(titles))],
                config.generate,
                seed=config.seeds[0],
                conditions=conditions,
            )
            count = fill_store(
                generator, folder, classes, titles, config.generate, seed=config.seeds[0],
                datasets=[self.name] * len(classes), description=f"draw by {self.kind}",
            )  # fmt: skip
            return {"images": count}

        settings = {"generate": config.generate, "seed": config.seeds[0]}
        inputs = {"adapter": adapter, "maps": self.maps()}
        return run_stage(self._label("images"), self.folder / "images", settings, inputs, build)

    def measure(self, images: Artifact, plain: Artifact) -> Artifact:
        """What is found again in the images; photos do not tell what only files know of them."""

        def build(folder: Path) -> dict:
            real = self._sources["test"]
            classes = self.work.classes(self.name)
            store = ImageStore(images.path).of_dataset(self.name, classes)
            labels = np.asarray(store.labels)
            # The store has the images of a class in the order of their numbers.
            rows = rows_of(np.asarray(real.labels), labels, ranks(labels))
            given = as_fractions(self.pixels("test"))
            write_grid(
                folder / "samples.png",
                *self._grid(store, rows, given),
                headings=["condition", "drawn", "real"] * _COLUMNS,
            )
            found = {}
            if self.kind not in WITH_PARTNER or known_map(real, 0, self.kind) is not None:
                unconditioned = ImageStore(plain.path).of_dataset(self.name, classes)
                found = self._found(store, unconditioned, rows, given)
            write_json(folder / "following.json", {**found, "images": len(store)})
            return found

        inputs = {"images": images, "plain": plain, "maps": self.maps()}
        inputs["latents"] = self.work.encode(self.name)
        return run_stage(
            self._label("following"), self.folder / "following", {"format": 1}, inputs, build
        )

    def _found(self, drawn, plain, rows: np.ndarray, given: np.ndarray) -> dict[str, float]:
        """Mean agreements of images with a condition; `rows` are the held-out images of `drawn`."""
        real = np.asarray(self._sources["test"].labels)
        wrong = others(real)
        labels = np.asarray(plain.labels)
        plain_rows = rows_of(real, labels, ranks(labels))
        used = np.unique(rows)
        # What the autoencoder does to a photo, no drawn image can undo.
        latents = self.work.latents(self.name, "test").mean[used, 0]
        decoded = decode_latents(self.work.vae, latents, self.work.config.generate.batch_size)
        images = np.stack([record.image for record in drawn])
        pairs = {
            "own": (images, rows),
            "another": (images, wrong[rows]),
            "plain": (np.stack([record.image for record in plain]), plain_rows),
            "autoencoder": (decoded, used),
        }
        return {
            name: float(agreement(self.kind, pixels, given[where]).mean())
            for name, (pixels, where) in pairs.items()
        }

    def _grid(self, store, rows: np.ndarray, given: np.ndarray) -> tuple[list, list[str]]:
        """Lines of condition, drawn image and real image, and what each line shows."""
        labels = np.asarray(store.labels)
        names, lines = self.work.classes(self.name), []
        shown = range(min(_LINES, len(names)))
        for label in shown:
            line = []
            for place in np.flatnonzero(labels == label)[:_COLUMNS]:
                picture = as_bytes(given[rows[place]])
                line.append(picture[..., 0] if picture.shape[-1] == 1 else picture)
                line += [store[int(place)].image, self._sources["test"][int(rows[place])].image]
            lines.append(line)
        return lines, [f"{self.name} {names[label]}" for label in shown]

    def _label(self, stage: str) -> str:
        return f"{stage}: {self.kind} of {self.name}"


def others(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Another row for each, of the same label where there is one, every row once in its label."""
    rows = np.arange(len(labels))
    found = np.roll(rows, -1)
    for label in np.unique(labels):
        members = rows[labels == label]
        if len(members) > 1:
            found[members] = np.roll(members, -1)
    return found


def ranks(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many rows before each have its label."""
    return np.array([(labels[:row] == label).sum() for row, label in enumerate(labels)], np.int64)


def rows_of(
    labels: Int[np.ndarray, " n"], numbers: Int[np.ndarray, " b"], indices: Int[np.ndarray, " b"]
) -> Int[np.ndarray, " b"]:
    """The row of the image `indices` of label `numbers`; after a label's last comes its first.

    Raises ValueError for a label that no row has.
    """
    members = {number: np.flatnonzero(labels == number) for number in np.unique(numbers)}
    if empty := [int(number) for number, rows in members.items() if not len(rows)]:
        raise ValueError(f"conditions: no held-out image of class {empty[0]}")
    return np.array(
        [members[n][i % len(members[n])] for n, i in zip(numbers, indices, strict=True)], np.int64
    )


def _size(model: nnx.Module) -> int:
    leaves: list[Array] = jax.tree.leaves(nnx.state(model, Trainable))
    return sum(leaf.size for leaf in leaves)
