"""The comparison of initial weights: how they are made, fine-tuned and described.

For unseen concepts what a generator makes is fine-tuned, and so are the baselines that the paper
(Gong et al. 2024, arXiv 2407.11966) leaves out: the mean LoRA, the nearest concept's, ridge
regression from the text, and the nearest one with noise.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsynth.adapters.flatten import Layout
from jaxsynth.adapters.inject import AdapterState
from jaxsynth.methods.weightgen.baselines import with_noise
from jaxsynth.methods.weightgen.config import Variant
from jaxsynth.methods.weightgen.editors import Editors, Scratch
from jaxsynth.methods.weightgen.generator import Baselines, Generated, WeightGenerator
from jaxsynth.methods.weightgen.scores import CONTROLS, GENERATED, Curves, described, trained
from jaxsynth.report.grids import write_grid
from jaxsynth.tasks.gan import GANConfig

# Prompts that name nothing that was learnt; in turn.
RANDOM_TEXTS = ("the tax law of 1873", "seven ounces of rice", "an email about trains")
PICTURES = 4


@dataclass(frozen=True)
class Made:
    """Initial weights of concepts, the seconds that one's take, how many the guard replaced."""

    blocks: Float[np.ndarray, "m n v"]
    seconds: float = 0.0
    replaced: int = 0


def ways(variant: Variant, few_steps: int) -> dict[str, dict[str, Any]]:
    """How a generator is asked: one step, and a few."""
    t = None if variant.t < 0 else variant.t
    return {"one step": {"t": t}, "few steps": {"steps": few_steps}}


def compare(
    folder: Path,
    editors: Editors,
    layout: Layout,
    generator: WeightGenerator,
    plain: Baselines,
    variant: Variant,
    *,
    tune: GANConfig,
    at: tuple[int, ...],
    pairs: int,
    scratch: Scratch,
    few_steps: int,
    noise: float,
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """What the comparison of one seed found, and the seconds that it took by kind of weights.

    "prepare" is those of making one concept's initial weights, "step" those of a training step. A
    grid of pictures goes to `folder`.
    """
    texts, seed = editors.scene.prompts, editors.scene.seed
    made = initial_weights(
        generator, plain, ways(variant, few_steps), texts, noise=noise, seed=seed,
        start=np.asarray(layout.to_blocks(editors.start)),
    )  # fmt: skip
    rows = editors.scene.rows[:PICTURES]
    inits: dict[str, dict] = {}
    pictures, steps = {}, []
    for key, one in made.items():
        states = _states(layout, one.blocks)
        curves = editors.tune(tune, states, at, pairs=pairs, fd=True)
        inits[key] = _record(curves, one.replaced)
        pictures[key] = editors.draw(rows, states[:PICTURES])
        steps.append(curves.step)
    alone = editors.scratch(scratch, pairs=pairs, fd=True)
    inits["scratch"] = _record(alone, 0)
    times = {
        "prepare": {key: one.seconds for key, one in made.items()} | {"scratch": 0.0},
        # All LoRAs are trained by one program: what their steps' times differ by is the machine's.
        "step": dict.fromkeys(made, float(np.median(steps))) | {"scratch": alone.step},
    }
    _write_grid(folder, editors, rows, pictures)
    own = (*GENERATED, *CONTROLS)
    found = {
        "seed": seed,
        "unseen": texts,
        "families": [concept.family for concept in editors.scene.concepts],
        "inits": inits,
        "targets": {key: inits[key]["l1"][:, -1] for key in ("scratch", "default")},
        # Where the weights lie, each in the factors that they are made in.
        "weights": {
            key: described(one.blocks, generator.baselines if key in own else plain)
            for key, one in made.items()
        }
        | {"trained": trained(plain)},
    }
    return found, times


def initial_weights(
    generator: WeightGenerator,
    plain: Baselines,
    how: Mapping[str, dict[str, Any]],
    texts: list[str],
    *,
    start: Float[np.ndarray, "n v"],
    noise: float,
    seed: int,
) -> dict[str, Made]:
    """Every kind of initial weights but pix2pix's, for the concepts of `texts`."""
    rng = np.random.default_rng(seed)

    def noisy(names: Sequence[str]) -> np.ndarray:
        return with_noise(plain.predict("nearest", names), plain.spread, noise, rng)

    def from_texts(way: str, order: Callable[[list[str]], list[str]] = list) -> Callable:
        return lambda names: generator(order(names), seed=seed, **how[way])

    found = {"default": Made(np.repeat(start[None], len(texts), axis=0))}
    makers: dict[str, Callable[[list[str]], Generated | np.ndarray]] = {
        "mean": lambda names: plain.predict("mean", names),
        "nearest": lambda names: plain.predict("nearest", names),
        "noise": noisy,
        "ridge": lambda names: plain.predict("ridge", names),
        "one_step": from_texts("one step"),
        "few_steps": from_texts("few steps"),
        # Each concept gets the weights of the next one's text.
        "shuffled": from_texts("one step", lambda names: names[1:] + names[:1]),
        "random": from_texts(
            "one step",
            lambda names: [RANDOM_TEXTS[i % len(RANDOM_TEXTS)] for i in range(len(names))],
        ),
    }
    for key, make in makers.items():
        own, seconds = make(texts), _seconds(make, texts[:1])
        found[key] = (
            Made(own.blocks, seconds, int(own.replaced.sum()))
            if isinstance(own, Generated)
            else Made(own, seconds)
        )
    return found


def _states(layout: Layout, blocks: Float[np.ndarray, "m n v"]) -> list[AdapterState]:
    return [layout.from_blocks(jnp.asarray(own)) for own in blocks]


def _record(curves: Curves, replaced: int) -> dict[str, Any]:
    return {"steps": list(curves.steps), "l1": curves.l1, "fd": curves.fd, "replaced": replaced}


def _seconds(make: Callable[[list[str]], Any], texts: list[str], repeats: int = 3) -> float:
    """The median time to make one concept's weights, compiled before."""
    make(texts)
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        make(texts)
        spent.append(time.perf_counter() - began)
    return float(np.median(spent))


def _write_grid(
    folder: Path, editors: Editors, rows: Sequence[int], pictures: dict[str, np.ndarray]
) -> None:
    source, target = editors.examples(rows)
    shown = ("default", "nearest", "ridge", "one_step")
    lines = [[source[i], target[i], *(pictures[key][i] for key in shown)] for i in range(len(rows))]
    names = editors.scene.prompts[: len(rows)]
    headings = ["photo", "edited", "default", "nearest", "ridge", "1 step"]
    write_grid(folder / "samples.png", lines, names, headings=headings)
