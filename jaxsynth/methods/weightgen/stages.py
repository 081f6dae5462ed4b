"""Denoised neural weights (Gong et al. 2024, arXiv 2407.11966): initial weights made from a text.

A small image editor (E2GAN) learns a few concepts by their texts and is frozen. Many concepts get a
LoRA around it, all trained together from one shared start, and a diffusion model learns to make
such LoRAs from texts. For unseen concepts what it makes is fine-tuned, and so are the rivals that
the paper leaves out: the mean LoRA, the nearest concept's, ridge regression from the text, and the
nearest one with noise.

Below the run's folder, for each seed, which also decides what is unseen:

    seed<k>/base                the editor, trained on some of the concepts
    seed<k>/collection          LoRAs of the training concepts, as blocks
    seed<k>/generators/<name>   a generator of weights for each of `generators`
    seed<k>/levers              what each of them is worth on validation concepts
    seed<k>/comparison          curves from every kind of initial weights
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxsynth.adapters.flatten import Layout, canonical
from jaxsynth.adapters.inject import AdapterState
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.core.records import to_json
from jaxsynth.data.load import load_dataset
from jaxsynth.data.procedural.concepts import Concept, read_concepts, save_concepts, split_concepts
from jaxsynth.methods.weightgen import plan as weightgen_plan
from jaxsynth.methods.weightgen import report as weightgen_report
from jaxsynth.methods.weightgen.baselines import with_noise
from jaxsynth.methods.weightgen.collection import (
    WeightCollection,
    read_collection,
    write_collection,
)
from jaxsynth.methods.weightgen.config import Config, Variant
from jaxsynth.methods.weightgen.editors import Editors
from jaxsynth.methods.weightgen.edits import Edits
from jaxsynth.methods.weightgen.scores import (
    CONTROLS,
    GENERATED,
    Curves,
    described,
    trained,
    unexplained,
)
from jaxsynth.report.grids import write_grid
from jaxsynth.runs.stage import Artifact, run_stage
from jaxsynth.tasks.weight_generator import (
    Generated,
    Rivals,
    TextReader,
    WeightGenerator,
    load_generator,
    save_generator,
    train_generator,
)
from jaxsynth.training.planning import Plan
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.hf import load_pipeline

TRAINING = ".training"
# Prompts that name nothing that was learnt; in turn.
RANDOM_TEXTS = ("the tax law of 1873", "seven ounces of rice", "an email about trains")
PICTURES = 4


def run(config: Config, workdir: Path) -> Path:
    """Every stage of every seed, then the page; returns the page's path."""
    for seed in config.seeds:
        _Seed(config, Path(workdir) / f"seed{seed}", seed).compare()
    return report(Path(workdir))


def plan(config: Config, mesh: Mesh) -> list[Plan]:
    """What each program of a run needs on `mesh`; compiled, and not run."""
    return weightgen_plan.plans(config, mesh)


def report(workdir: Path) -> Path:
    """Writes results.json and report.html from the finished stages below `workdir`."""
    if jax.process_index():
        return weightgen_report.page_of(Path(workdir))
    return weightgen_report.write(Path(workdir))


class _Seed:
    """One seed's concepts, networks and stages."""

    def __init__(self, config: Config, folder: Path, seed: int):
        self.config, self.folder, self.seed = config, folder, seed
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def concepts(self) -> dict[str, list[Concept]]:
        """Train, validation and unseen concepts; a language model is asked once only."""
        wanted, path = self.config.concepts, self.folder / "concepts.json"
        if wanted.source == "server" and path.is_file():
            found = read_concepts(path)
        else:
            found = wanted.load(self.seed)
            save_concepts(path, found)
        rest = wanted.validation + wanted.unseen
        train, others = split_concepts(found, wanted.train, rest, seed=self.seed)
        return {
            "train": train,
            "validation": others[: wanted.validation],
            "unseen": others[wanted.validation :],
        }

    @cached_property
    def everything(self) -> list[Concept]:
        """Train, validation, unseen, in this order."""
        return [concept for part in self.concepts.values() for concept in part]

    def rows(self, part: str) -> range:
        """Where a part's concepts are among all."""
        sizes = {name: len(own) for name, own in self.concepts.items()}
        start = {"train": 0, "validation": sizes["train"]}.get(
            part, sizes["train"] + sizes["validation"]
        )
        return range(start, start + sizes[part])

    @cached_property
    def read(self) -> TextReader:
        pipeline = load_pipeline(self.config.text)
        return TextReader(pipeline.text_encoder, pipeline.tokenizer)

    @cached_property
    def edits(self) -> Edits:
        """What makes the pairs of images."""
        return Edits(self.config.edits, self.folder / "edited", seed=self.seed)

    @cached_property
    def editors(self) -> Editors:
        """The networks and their data."""
        dataset = load_dataset(self.config.data)
        rng = np.random.default_rng(self.seed)
        photos = []
        for source, count in (
            (dataset.train, self.config.photos),
            (dataset.test, self.config.held_out),
        ):
            if count > len(source):
                raise ValueError(f"photos: {count} asked for, the data set has {len(source)}")
            order = rng.permutation(len(source))[:count]
            photos.append(np.stack([source[int(i)].image for i in order]))
        return Editors(
            self.config.editor, self.config.lora, self.read, self.everything, *photos,
            self.edits, seed=self.seed,
        )  # fmt: skip

    @cached_property
    def mesh(self) -> Mesh | None:
        """None on one device, where a mesh would change nothing."""
        sizes = dataclasses.asdict(self.config.mesh)
        return None if set(sizes.values()) == {1} else make_mesh(**sizes)

    @cached_property
    def base(self) -> Artifact:
        """The editor, trained with text on the first concepts."""
        config = self.config
        count, editor = config.concepts.base, config.editor
        networks = {"generator": editor.generator, "discriminator": editor.discriminator}
        return run_stage(
            f"seed {self.seed}: base",
            self.folder / "base",
            {"data": config.data, "photos": config.photos, "text": config.text,
             "concepts": [c.prompt for c in self.everything[:count]],
             "edits": self.edits.identity, "networks": networks, "train": editor.base,
             "seed": self.seed},
            {},
            lambda folder: self.editors.train_base(folder, count),
            unlisted=(f"{TRAINING}/*",),
        )  # fmt: skip

    @cached_property
    def layout(self) -> Layout:
        """Where the values of a LoRA lie in blocks."""
        return Layout.of(self.editors.start(self.base.path), self.config.block)

    @cached_property
    def collection(self) -> Artifact:
        """LoRAs of the training concepts, from one start."""
        config, concepts = self.config, self.concepts["train"]

        def build(folder: Path) -> dict:
            base = self.base
            states, errors = self.editors.train_together(
                base.path, self.rows("train"), folder / TRAINING, keep=config.checkpoints,
                mesh=self.mesh,
            )  # fmt: skip
            texts = [concept.texts for concept in concepts]
            families = [concept.family for concept in concepts]
            found = WeightCollection.of(states, texts, families, self.layout, base.digest)
            if not jax.process_index():
                write_collection(folder / "collection.safetensors", found)
            return {
                "concepts": len(concepts),
                "checkpoints": config.checkpoints,
                "blocks": self.layout.num_blocks,
                "values": self.layout.num_values,
                "l1": float(np.mean(errors)),
            }

        return run_stage(
            f"seed {self.seed}: collection",
            self.folder / "collection",
            {"concepts": [c.prompt for c in concepts], "lora": config.lora,
             "every": config.editor.every, "group": config.editor.group,
             "train_down": config.editor.train_down, "share": config.editor.share,
             "own": config.editor.own, "train": config.editor.together,
             "checkpoints": config.checkpoints, "block": config.block, "seed": self.seed},
            {"base": self.base},
            build,
            unlisted=(f"{TRAINING}/*",),
        )  # fmt: skip

    def _read(self, kind: str) -> WeightCollection:
        path = self.collection.path / "collection.safetensors"
        found = read_collection(path, self.layout, self.base.digest)
        return found if kind == "none" else self._canonical(found, kind)

    def _canonical(self, found: WeightCollection, kind: str) -> WeightCollection:
        """The same LoRAs in other factors."""
        layout = self.layout
        first = jnp.asarray(self._read("none").blocks[0, -1])
        reference = canonical(layout.from_blocks(first)) if kind == "aligned" else None

        @jax.jit
        def turn(blocks):
            one = lambda x: layout.to_blocks(canonical(layout.from_blocks(x), reference))  # noqa: E731
            return jax.lax.map(one, blocks)

        flat = found.blocks.reshape(-1, *found.blocks.shape[2:])
        blocks = np.asarray(turn(jnp.asarray(flat))).reshape(found.blocks.shape)
        return dataclasses.replace(found, blocks=blocks)

    def rivals(self, kind: str) -> Rivals:
        """The plain predictors over the training concepts, in one choice of factors."""
        if kind not in self._rivals:
            self._rivals[kind] = Rivals(self._read(kind), self.read)
        return self._rivals[kind]

    @cached_property
    def _rivals(self) -> dict[str, Rivals]:
        return {}

    def generator(self, name: str) -> Artifact:
        """One generator of weights."""
        if name not in self._generators:
            self._generators[name] = self._train_generator(name)
        return self._generators[name]

    @cached_property
    def _generators(self) -> dict[str, Artifact]:
        return {}

    def _train_generator(self, name: str) -> Artifact:
        variant = self.config.generators[name]

        def build(folder: Path) -> dict:
            rivals = self.rivals(variant.canonical)
            made = train_generator(
                rivals.collection, self.read, variant.generator, folder / TRAINING,
                seed=self.seed, rivals=rivals, mesh=self.mesh, description=name,
            )  # fmt: skip
            save_generator(made, folder)
            size = sum(x.size for x in jax.tree.leaves(made.model))
            return {
                "parameters": size,
                "features": rivals.features,
                "ridge_left_out": unexplained(rivals.left_out("ridge"), rivals),
            }

        return run_stage(
            f"seed {self.seed}: generator {name}",
            self.folder / "generators" / name,
            {"variant": variant, "seed": self.seed},
            {"collection": self.collection},
            build,
            unlisted=(f"{TRAINING}/*",),
        )

    def load(self, name: str) -> WeightGenerator:
        """A finished generator."""
        rivals = self.rivals(self.config.generators[name].canonical)
        stage = self.generator(name)
        return load_generator(stage.path, rivals.collection, self.read, rivals=rivals)

    def prompts(self, part: str) -> list[str]:
        return [concept.prompt for concept in self.concepts[part]]

    def levers(self) -> Artifact:
        """Every generator, and the plain predictors, on validation concepts."""
        config = self.config
        made = {name: self.generator(name) for name in config.generators}

        def build(folder: Path) -> dict:
            texts, found = self.prompts("validation"), {}
            plain = self.rivals("none")
            for kind in ("mean", "nearest", "ridge"):
                found[kind] = self._judged(plain.predict(kind, texts))
            for name, variant in config.generators.items():
                for label, how in self._ways(variant):
                    one = self.load(name)(texts, seed=self.seed, **how)
                    replaced = float(one.replaced.mean())
                    found[f"{name}, {label}"] = self._judged(one.blocks, replaced)
            own = {key: value for key, value in found.items() if ", " in key}
            chosen = min(own, key=lambda key: np.mean(own[key]["l1"]))
            table = {"steps": list(config.levers_at), "variants": found, "chosen": chosen}
            write_json(folder / "levers.json", to_json(table))
            return {"chosen": chosen}

        settings = {"concepts": self.prompts("validation"), "levers_at": config.levers_at,
                    "few_steps": config.few_steps, "tune": config.editor.tune,
                    "pairs": config.editor.pairs, "seed": self.seed}  # fmt: skip
        return run_stage(f"seed {self.seed}: levers", self.folder / "levers", settings, made, build)

    def _ways(self, variant: Variant) -> list[tuple[str, dict[str, Any]]]:
        """One step and a few."""
        t = None if variant.t < 0 else variant.t
        return [("one step", {"t": t}), ("few steps", {"steps": self.config.few_steps})]

    def _judged(self, blocks: np.ndarray, replaced: float = 0.0) -> dict:
        curves = self.editors.tune(
            self.base.path, self.rows("validation"), self._states(blocks), self.config.levers_at
        )
        return {"l1": curves.l1.mean(0), "replaced": replaced}

    def _states(self, blocks: Float[np.ndarray, "m n v"]) -> list[AdapterState]:
        return [self.layout.from_blocks(jnp.asarray(own)) for own in blocks]

    def compare(self) -> Artifact:
        """Unseen concepts from every kind of initial weights."""
        levers = self.levers()
        return run_stage(
            f"seed {self.seed}: comparison",
            self.folder / "comparison",
            {"concepts": self.prompts("unseen"), "tune": self.config.editor.tune,
             "at": self.config.editor.tune_at, "scratch": self.config.editor.scratch,
             "scratch_at": self.config.editor.scratch_at, "pairs": self.config.editor.pairs,
             "noise": self.config.noise, "seed": self.seed},
            {"levers": levers, "collection": self.collection},
            lambda folder: self._compare(folder, read_json(levers.path / "levers.json")),
        )  # fmt: skip

    def _compare(self, folder: Path, levers: dict) -> dict:
        name, texts = levers["chosen"].rpartition(", ")[0], self.prompts("unseen")
        variant = self.config.generators[name]
        made = self._initial(self.load(name), variant, texts)
        inits, pictures = self._curves(made)
        result = {
            "seed": self.seed,
            "unseen": texts,
            "families": [concept.family for concept in self.concepts["unseen"]],
            "levers": levers,
            "inits": inits,
            "targets": {key: inits[key]["l1"][:, -1] for key in ("scratch", "default")},
            "weights": self._described(made, variant.canonical),
            "costs": self._costs(name),
            "sizes": {**self.collection.counts, **self.generator(name).counts},
        }
        write_json(folder / "comparison.json", to_json(result))
        self._grid(folder, pictures)
        return {key: float(one["l1"][:, 0].mean()) for key, one in inits.items()}

    def _curves(self, made: dict[str, "_Made"]) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
        """Fine-tuning from all kinds of weights, what they draw before, and pix2pix's training."""
        editors, base, rows = self.editors, self.base.path, self.rows("unseen")
        inits, pictures = {}, {}
        for key, one in made.items():
            states = self._states(one.blocks)
            curves = editors.tune(base, rows, states, self.config.editor.tune_at, fd=True)
            inits[key] = _record(curves, one.seconds, one.replaced)
            pictures[key] = editors.draw(base, rows[:PICTURES], states[:PICTURES])
        # All LoRAs are trained by one program: what their steps' times differ by is the machine's.
        step = float(np.median([one["step"] for one in inits.values()]))
        inits = {key: one | {"step": step} for key, one in inits.items()}
        inits["scratch"] = _record(editors.scratch(rows, fd=True), 0.0, 0)
        return inits, pictures

    def _described(self, made: dict[str, "_Made"], kind: str) -> dict[str, dict[str, float]]:
        """Where the weights lie, each in the factors that they are made in."""
        own = (*GENERATED, *CONTROLS)
        return {
            key: described(one.blocks, self.rivals(kind if key in own else "none"))
            for key, one in made.items()
        } | {"trained": trained(self.rivals("none"))}

    def _initial(
        self, generator: WeightGenerator, variant: Variant, texts: list[str]
    ) -> dict[str, "_Made"]:
        """Every kind of initial weights but pix2pix's, for unseen concepts."""
        rivals, rng = self.rivals("none"), np.random.default_rng(self.seed)
        ways = dict(self._ways(variant))

        def noisy(names: Sequence[str]) -> np.ndarray:
            return with_noise(
                rivals.predict("nearest", names), rivals.spread, self.config.noise, rng
            )

        def from_texts(how: str, order: Callable[[list[str]], list[str]] = list) -> Callable:
            return lambda names: generator(order(names), seed=self.seed, **ways[how])

        start = np.asarray(self.layout.to_blocks(self.editors.start(self.base.path)))
        found = {"default": _Made(np.repeat(start[None], len(texts), axis=0))}
        ways_to: dict[str, Callable[[list[str]], Generated | np.ndarray]] = {
            "mean": lambda names: rivals.predict("mean", names),
            "nearest": lambda names: rivals.predict("nearest", names),
            "noise": noisy,
            "ridge": lambda names: rivals.predict("ridge", names),
            "one_step": from_texts("one step"),
            "few_steps": from_texts("few steps"),
            # Each concept gets the weights of the next one's text.
            "shuffled": from_texts("one step", lambda names: names[1:] + names[:1]),
            "random": from_texts("one step", lambda names: [
                RANDOM_TEXTS[i % len(RANDOM_TEXTS)] for i in range(len(names))
            ]),
        }  # fmt: skip
        for key, make in ways_to.items():
            own, seconds = make(texts), _seconds(make, texts[:1])
            found[key] = (
                _Made(own.blocks, seconds, int(own.replaced.sum()))
                if isinstance(own, Generated)
                else _Made(own, seconds)
            )
        return found

    def _costs(self, name: str) -> dict[str, float]:
        return {
            "base": self.base.manifest["seconds"],
            "collection": self.collection.manifest["seconds"],
            "generator": self.generator(name).manifest["seconds"],
        }

    def _grid(self, folder: Path, pictures: dict[str, np.ndarray]) -> None:
        rows = self.rows("unseen")[:PICTURES]
        source, target = self.editors.examples(rows)
        shown = ("default", "nearest", "ridge", "one_step")
        lines = [
            [source[i], target[i], *(pictures[key][i] for key in shown)] for i in range(len(rows))
        ]
        names = [self.everything[row].prompt for row in rows]
        headings = ["photo", "edited", "default", "nearest", "ridge", "1 step"]
        write_grid(folder / "samples.png", lines, names, headings=headings)


@dataclass(frozen=True)
class _Made:
    """Initial weights of concepts, the seconds that one's take, how many the guard replaced."""

    blocks: Float[np.ndarray, "m n v"]
    seconds: float = 0.0
    replaced: int = 0


def _record(curves: Curves, seconds: float, replaced: int) -> dict[str, Any]:
    return {
        "steps": list(curves.steps),
        "l1": curves.l1,
        "fd": curves.fd,
        "prepare": seconds,
        "step": curves.step,
        "replaced": replaced,
    }


def _seconds(make: Callable[[list[str]], Any], texts: list[str], repeats: int = 3) -> float:
    """The median time to make one concept's weights, compiled before."""
    make(texts)
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        make(texts)
        spent.append(time.perf_counter() - began)
    return float(np.median(spent))
