"""Training of a CLIP as an image classifier: LoRA on both towers (DataDream, after DISEF).

A SigLIP trains in its place, by the same cross entropy over classes (`models.siglip`).

Images are real, synthetic or both, with the loss
`real_weight * CE(real) + (1 - real_weight) * CE(synthetic)` over a batch that holds a fixed number
of each (the official code divides by zero where one kind is missing). What it says of images is in
`clip_predictions`.

Beyond the published recipe, each off by default and all of them together where asked:

- `learns` "norms": the towers' layer norms learn in the place of an adapter, and `head_share`: for
  the last part of the steps the towers rest and a linear head learns, which begins as the classes'
  texts (2SFS, CVPR 2025, arXiv 2503.11609);
- `visual_head`: a second head, on the class token. The loss is the sum over both, and predictions
  are mixed by `fusion`, which validation images choose where it is left open (ImagineFSL, CVPR
  2025);
- `regions`: ProtoAug's two terms (`tasks.regions`), for each head;
- `real_weight_start`: the weight of the real part moves in a line from it to `real_weight`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int

from jaxsynth.adapters import optim_hooks, registry
from jaxsynth.adapters.inject import (
    Trainable,
    extract,
    freeze,
    load_state,
    mark_trainable,
    trainable_variables,
)
from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError
from jaxsynth.core.limits import BelowOne, Count, Finite, Natural, NotNegative, OneOf, Share
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.pipeline.augment import Augment, TrainTransform
from jaxsynth.data.pipeline.batches import Batch, mixed_batches, real_count, train_batches
from jaxsynth.models.shapes import is_abstract, transform
from jaxsynth.models.siglip import TwoTowers
from jaxsynth.tasks.clip_loss import Classification
from jaxsynth.tasks.clip_predictions import (
    class_features,
    embed,
    encode_text,
    has_visual_head,
    predict,
    with_best_share,
    with_class_head,
    with_share,
    with_visual_head,
)
from jaxsynth.tasks.regions import RegionConfig, find_regions, pixel_rows
from jaxsynth.training import sharding
from jaxsynth.training.config import SCHEDULES, Factors, TrainingConfig, aside
from jaxsynth.training.optim import unused_patterns
from jaxsynth.training.trainer import Streamed, Task, train
from jaxsynth.weights.adapters.native import STATE_FILE, read_state, write_state
from jaxsynth.weights.hf import Clip
from jaxsynth.weights.hub import write_json

# The layer norms of both towers, those before and after their blocks included.
NORMS = r".*(layer_?norm\d?|layrnorm)\.(scale|bias)"


@dataclass(frozen=True)
class ClassifyConfig(TrainingConfig):
    """How the classifier is trained.

    Rank, targets, rates and augmentation are the official code's. It leaves the number of epochs
    per data set unpublished; 50 is what followers use (ProtoAug). An epoch is as many images as the
    synthetic set holds, whatever the mode, so that every mode takes the same number of steps;
    `steps` overrides it. `real_fraction` is the share of real images in a batch of both kinds.
    `adapter` is what learns: LoRA, or any other kind. `rank`, `alpha` and `dropout` are settings of
    it; left open, the rank is 16, the dropout 0.1 and the scale 2, where the kind has them.

    `learns`: "norms" trains the towers' layer norms in the place of an adapter. `head_share`: the
    share of the steps, at the end, in which a linear head learns alone. `visual_head` adds a
    classifier of the class token; `fusion` is its share in predictions, left open the one that
    validation images choose, a half where there are none. `regions` has ProtoAug's terms.
    `real_weight_start` is the weight of the real part at the first step, `real_weight` that at the
    last; left open, it does not move.
    """

    rank: Count | None = None
    alpha: Finite | None = None
    dropout: BelowOne | None = None
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    epochs: Natural = 50
    warmup_epochs: Natural = 3
    batch_size: Count = 64
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "cosine"
    min_lr: NotNegative = 1e-8
    weight_decay: NotNegative = 1e-4
    real_weight: Share = 0.8
    real_weight_start: Share | None = None
    real_fraction: Share = 0.5
    mix_probability: Share = 0.2
    label_smoothing: BelowOne = 0.0
    learns: Annotated[str, OneOf("adapter", "norms")] = "adapter"
    head_share: BelowOne = 0.0
    visual_head: bool = False
    fusion: Share | None = None
    regions: RegionConfig = field(default_factory=RegionConfig)
    augment: Augment = field(default_factory=Augment)
    num_workers: Natural = aside(0)
    checkpoint_every: Count = aside(500)
    adapter: registry.AdapterChoice = field(default_factory=registry.AdapterChoice)

    def __post_init__(self):
        super().__post_init__()
        config = self.adapter_config()
        if self.fusion is not None and not self.visual_head:
            raise ValueError(
                f"fusion: {self.fusion}, but visual_head is false, so that there is one head"
            )
        if self.regions and self.accumulate > 1:
            raise ValueError(
                f"accumulate: {self.accumulate} parts, but regions compares all images of a batch; "
                "set one of them to its default"
            )
        if self.learns == "norms":
            plain = type(self).__dataclass_fields__
            given = {name: getattr(self, name) for name in ("rank", "alpha", "dropout")}
            given = {name: value for name, value in given.items() if value is not None}
            if self.targets != plain["targets"].default:
                given["targets"] = self.targets
            if self.adapter != registry.AdapterChoice():
                given["adapter"] = self.adapter.kind
            for name, value in given.items():
                raise ValueError(f"{name}: {value!r}, but learns is 'norms', which has no adapter")
        elif self.head_share and optim_hooks.has_own_optimizer(config):
            raise ValueError(
                f"head_share: {self.head_share}, but an adapter of kind {self.adapter.kind} has an "
                "optimizer of its own and cannot rest; choose another kind"
            )

    def adapter_config(self) -> Any:
        """The adapter on both towers."""
        return self.adapter.config(
            targets=self.targets,
            given={"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout},
            defaults={"rank": 16, "dropout": 0.1},
            scale=2.0,
        )

    @property
    def beyond_adapters(self) -> list[str]:
        """The settings by which more than an adapter learns, or that need both kinds of images."""
        found = {
            "learns": self.learns != "adapter",
            "head_share": bool(self.head_share),
            "visual_head": self.visual_head,
            "real_weight_start": self.real_weight_start is not None,
            "regions.discrepancy": bool(self.regions.discrepancy),
            "regions.robustness": bool(self.regions.robustness),
        }
        return [name for name, given in found.items() if given]


Regions = dict[str, Int[np.ndarray, " n"]]
# What a plan takes for the regions of images that are not there.
ANY_REGIONS: Regions = {kind: np.zeros(1, np.int32) for kind in ("real", "synthetic")}


def classifier_task(
    clip: Clip,
    prompts: Sequence[str],
    config: ClassifyConfig,
    *,
    seed: int,
    both: bool,
    start: Callable[[], Iterator[Batch]] | None = None,
    regions: Regions | None = None,
) -> Task:
    """Training of the CLIP on images of one kind, or of `both`, real and synthetic.

    `start` makes the iterator of batches; a plan needs none, and its `clip` may be of shapes.
    `regions` are those of the sets' images, needed where the config has a term of them.
    UserError where a batch of both kinds cannot be cut as `config` asks.
    """
    parts = jax.process_count()
    num_real = 0
    if both:
        num_real = real_count(config.batch_size, config.real_fraction)
        for what, rows in (("real", num_real), ("synthetic", config.batch_size - num_real)):
            if config.accumulate > 1 and rows % (parts * config.accumulate):
                raise UserError(
                    f"accumulate: {config.accumulate} parts, but a process's batch has "
                    f"{rows / parts:g} {what} images; expected a divisor"
                )
    init_key, step_key = jax.random.split(jax.random.key(seed))

    def prepared(base: TwoTowers) -> TwoTowers:
        if config.learns == "norms":
            model = mark_trainable(base, [NORMS])
        else:
            model = registry.add(base, config.adapter_config(), rngs=init_key)
        if not config.visual_head:
            return model
        return with_visual_head(
            model, len(prompts), 0.5 if config.fusion is None else config.fusion
        )

    model = transform(prepared, clip.model)
    ids = jnp.asarray(clip.tokenizer(list(prompts)))
    constants: dict[str, Any] = {
        "mean": np.asarray(clip.mean, np.float32),
        "std": np.asarray(clip.std, np.float32),
    }
    if any(path.startswith("text_") for path in trainable_variables(model)):
        constants["ids"] = ids
    else:
        encode = partial(jax.eval_shape, encode_text) if is_abstract(model) else encode_text
        constants["text"] = encode(clip.model, ids)
    compared = config.regions if regions is not None else RegionConfig()
    if compared:
        constants["regions"] = regions
        constants["synthetic"] = np.float32(len(regions["synthetic"]))
    moves = both and config.real_weight_start is not None
    if moves:
        constants["last"] = np.float32(max(config.steps - 1, 1))
    shapes = batch_shapes(
        clip.image_size, config.batch_size, both=both, numbered=bool(compared) or moves
    )
    return Task(
        model=model,
        loss=Classification(
            num_classes=len(prompts),
            num_real=num_real,
            real_weight=config.real_weight,
            label_smoothing=config.label_smoothing,
            mix_probability=config.mix_probability,
            accumulate=config.accumulate,
            remat=config.remat,
            real_weight_start=config.real_weight_start if moves else None,
            discrepancy=compared.discrepancy,
            robustness=compared.robustness,
        ),
        batches=Streamed(start, shapes),
        table=sharding.CLIP,
        key=step_key,
        constants=constants,
        identity={"base": clip.digest},
    )


def head_task(task: Task, clip: Clip, prompts: Sequence[str]) -> Task:
    """The training that follows a `task` whose model has been trained: of the heads alone.

    The linear head of the classes begins as the texts' features, and the real part's weight is the
    one that it ended with.
    """
    model: Any = task.model
    rows = class_features(model, jnp.asarray(clip.tokenizer(list(prompts))))
    towers = [path for path in trainable_variables(model) if not path.startswith("visual_head.")]
    left_out = ("ids", "text", "last")
    loss: Any = task.loss
    return replace(
        task,
        model=with_class_head(freeze(model, towers), rows),
        loss=replace(loss, real_weight_start=None, drops=False),
        constants={k: x for k, x in task.constants.items() if k not in left_out},
        key=jax.random.fold_in(task.key, 1),
        identity={**task.identity, "part": "head"},
    )


def _batches(
    clip: Clip,
    config: ClassifyConfig,
    seed: int,
    real: ImageSource | None,
    synthetic: ImageSource | None,
    numbered: bool,
) -> Iterator[Batch]:
    """This process's part of each batch, without end."""
    transform = TrainTransform(clip.image_size, config.augment)
    share = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "num_workers": config.num_workers,
        "numbered": numbered,
    }
    args = (config.batch_size, seed, transform)
    if real is not None and synthetic is not None:
        return mixed_batches(real, synthetic, *args, real_fraction=config.real_fraction, **share)
    source = real if synthetic is None else synthetic
    if source is None:
        raise ValueError("train_classifier: neither real nor synthetic images")
    return train_batches(source, *args, **share)


def batch_shapes(
    size: int, rows: int, *, both: bool, numbered: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of images of `size` pixels, of one kind or `both`, or `numbered`."""
    shapes = {
        "image": jax.ShapeDtypeStruct((rows, size, size, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((rows,), np.int32),
    }
    if numbered:
        shapes |= {name: jax.ShapeDtypeStruct((rows,), np.int32) for name in ("index", "step")}
    return shapes | ({"is_real": jax.ShapeDtypeStruct((rows,), np.bool_)} if both else {})


def train_classifier(
    clip: Clip,
    prompts: Sequence[str],
    config: ClassifyConfig,
    folder: Path,
    *,
    images: int,
    seed: int,
    real: ImageSource | None = None,
    synthetic: ImageSource | None = None,
    validation: ImageSource | None = None,
    mesh: Mesh | None = None,
    description: str = "classify",
) -> TwoTowers:
    """The CLIP with what it learned; resumes from `folder/checkpoints`.

    An epoch is `images` images. With both `real` and `synthetic` the loss is weighted; with one of
    them it is plain. The result is the last step's, or the one that does best on `validation` (the
    first of equals), which is looked at every `config.evaluate_every` steps, by default after every
    epoch, and kept in `folder/best`. A head that learns alone does so in `folder/head`, after the
    best step of what came before. UserError where `steps` are too few for both, or a pattern of
    `rates` or `decays` matches nothing that learns.
    """
    sized = config.sized(images)
    last = round(config.head_share * sized.steps)
    if config.head_share and not 0 < last < sized.steps:
        raise UserError(
            f"head_share: {config.head_share} of {sized.steps} steps is {last}, expected at least "
            "one for the head and one before it"
        )
    both = real is not None and synthetic is not None
    regions = None
    if config.regions and synthetic is not None:
        regions = _regions(clip, config, folder, seed, len(prompts), real, synthetic)
    numbered = regions is not None or (both and config.real_weight_start is not None)
    run = partial(
        _train_best, clip, prompts, validation, mesh=mesh, description=description,
        per_epoch=max(sized.steps // max(config.epochs, 1), 1),
    )  # fmt: skip
    first = _shortened(sized, sized.steps - last)
    task = classifier_task(
        clip,
        prompts,
        first,
        seed=seed,
        both=both,
        start=partial(_batches, clip, config, seed, real, synthetic, numbered),
        regions=regions,
    )
    if not last:
        return run(task, first, folder)
    _check_patterns(config, task)
    model = run(task, _matching(first, task), folder)
    task = head_task(replace(task, model=model), clip, prompts)
    return run(task, _matching(_shortened(sized, last), task), folder / "head")


def _train_best(
    clip: Clip,
    prompts: Sequence[str],
    validation: ImageSource | None,
    task: Task,
    config: ClassifyConfig,
    folder: Path,
    *,
    per_epoch: int,
    mesh: Mesh | None,
    description: str,
) -> TwoTowers:
    """The task's model after its last step, or after the one that does best on `validation`."""
    if validation is None:
        return train(task, config, folder, mesh=mesh, description=description)
    best = _Best(folder / "best", clip, prompts, validation, choose=config.fusion is None)
    sized = replace(config, evaluate_every=config.evaluate_every or per_epoch)
    train(replace(task, evaluate=best), sized, folder, mesh=mesh, description=description)
    return best.model(task.model)


def _shortened(config: ClassifyConfig, steps: int) -> ClassifyConfig:
    return replace(config, steps=steps, warmup_steps=min(config.warmup_steps, steps))


def _check_patterns(config: ClassifyConfig, task: Task) -> None:
    """UserError for a pattern that matches nothing that learns in either part of a training."""
    head = {"class_head": {"rows": 0}}
    for name in ("rates", "decays"):
        unused = unused_patterns(getattr(config, name), nnx.state(task.model, Trainable))
        if lost := [pattern for pattern in unused if unused_patterns(((pattern, 1.0),), head)]:
            raise UserError(f"{name}: {lost[0]!r} matches no parameter that learns")


def _matching(config: ClassifyConfig, task: Task) -> ClassifyConfig:
    """The config without patterns for what learns in the other part of the training."""
    values = nnx.state(task.model, Trainable)

    def matching(factors: Factors) -> Factors:
        unused = unused_patterns(factors, values)
        return tuple(pair for pair in factors if pair[0] not in unused)

    return replace(config, rates=matching(config.rates), decays=matching(config.decays))


def _regions(
    clip: Clip,
    config: ClassifyConfig,
    folder: Path,
    seed: int,
    classes: int,
    real: ImageSource | None,
    synthetic: ImageSource,
) -> Regions:
    """The region of each image of both sets."""
    sources = [source for source in (real, synthetic) if source is not None]
    if config.regions.space == "pixels":
        rows = [pixel_rows(source, clip.image_size) for source in sources]
    else:
        rows = [embed(clip, clip.model, source) for source in sources]
    found = find_regions(rows, config.regions, num_classes=classes, seed=seed, folder=folder)
    return {"real": found[0] if real is not None else ANY_REGIONS["real"], "synthetic": found[-1]}


class _Best:
    """What has learned with the highest validation accuracy so far, on disk: a restart knows it.

    With `choose` the share of a visual head is the one that does best at that step.
    """

    def __init__(
        self,
        folder: Path,
        clip: Clip,
        prompts: Sequence[str],
        source: ImageSource,
        *,
        choose: bool,
    ):
        self._folder, self._clip, self._prompts, self._source = folder, clip, prompts, source
        self._choose = choose

    def __call__(self, model: TwoTowers, step: int) -> dict[str, float]:
        share = {}
        if has_visual_head(model):
            if self._choose:
                model = with_best_share(self._clip, model, self._prompts, self._source)
            share = {"share": float(model.visual_head.share[...])}
        logits = predict(self._clip, model, self._prompts, self._source)
        accuracy = float((logits.argmax(-1) == np.asarray(self._source.labels)).mean())
        known = read_json(self._folder / "best.json", optional=True)
        # A resumed run looks again at steps it had seen: the same result is no better.
        better = not known or accuracy > known["accuracy"]
        if better and jax.process_index() == 0:
            write_state(self._folder / STATE_FILE, extract(model))
            write_json(self._folder / "best.json", {"step": step, "accuracy": accuracy, **share})
        return {"accuracy": accuracy, **share}

    def model(self, start: TwoTowers) -> TwoTowers:
        """The best one; `start` is the network before it learned."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("best adapter written")
        found = load_state(start, read_state(self._folder / STATE_FILE))
        if not has_visual_head(found):
            return found
        return with_share(found, read_json(self._folder / "best.json", dict)["share"])
