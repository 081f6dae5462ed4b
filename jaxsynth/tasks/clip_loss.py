"""The loss of a CLIP classifier's training (`tasks.clip_classifier` says what its parts are)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxsynth.adapters.inject import seed_dropout
from jaxsynth.data.pipeline.mixing import mix_batch, one_hot
from jaxsynth.data.pipeline.normalize import normalize_pixels
from jaxsynth.models.siglip import TwoTowers
from jaxsynth.tasks.clip_predictions import class_features, head_logits
from jaxsynth.tasks.regions import region_terms


@dataclass(frozen=True)
class Classification:
    """Cross entropy over a batch {"image", "label", "is_real"}, and what is asked for beside it.

    Its constants are the classes' token ids, or their text features where no part of the text tower
    learns, and the mean and deviation of pixels. `num_real` of a batch's images are real; 0 where
    all are of one kind. With `discrepancy` or `robustness` a batch has "index" too, each image's
    place in its set, and the constants "regions", those of each set's images, and "synthetic", how
    many synthetic ones there are. With `real_weight_start` it has "step", and the constants "last".
    """

    num_classes: int
    num_real: int
    real_weight: float
    label_smoothing: float
    mix_probability: float
    accumulate: int
    remat: str | None
    real_weight_start: float | None = None
    discrepancy: float = 0.0
    robustness: float = 0.0
    drops: bool = True

    def __call__(self, model: TwoTowers, constants: dict[str, Any], batch: dict, key: Array):
        keys = [jax.random.fold_in(key, i) for i in range(2)]
        num_real = self.num_real // self.accumulate
        if num_real:  # each process's part has its own real images first
            order = jnp.argsort(~batch["is_real"], stable=True)
            batch = {name: values[order] for name, values in batch.items()}
        labels = one_hot(batch["label"], self.num_classes, self.label_smoothing)
        pixels = normalize_pixels(batch["image"], constants["mean"], constants["std"])
        images, labels = mix_batch(
            keys[0], pixels, labels, num_real=num_real, probability=self.mix_probability
        )
        if self.drops:
            model = seed_dropout(model, keys[1])
        text = constants.get("text")
        if text is None:
            text = class_features(model, constants.get("ids"), remat=self.remat)
        by_head = head_logits(model, text, images, remat=self.remat)
        each = optax.softmax_cross_entropy(by_head[0], labels)
        for logits in by_head[1:]:
            each = each + optax.softmax_cross_entropy(logits, labels)
        right = (by_head[0].argmax(-1) == batch["label"]).astype(jnp.float32)
        metrics = {"accuracy": right.mean()}
        value = each.mean()
        if num_real:
            weight = self._real_weight(constants, batch)
            value = weight * each[:num_real].mean() + (1 - weight) * each[num_real:].mean()
        if self.discrepancy or self.robustness:
            index, regions = batch["index"], constants["regions"]
            own = jnp.concatenate(
                [regions["real"][index[:num_real]], regions["synthetic"][index[num_real:]]]
            )
            terms = [region_terms(x, own, num_real, constants["synthetic"]) for x in by_head]
            discrepancy, robustness = (sum(parts) for parts in zip(*terms, strict=True))
            value = value + self.discrepancy * discrepancy + self.robustness * robustness
            metrics |= {"discrepancy": discrepancy, "robustness": robustness}
        return value, metrics

    def _real_weight(self, constants: dict[str, Any], batch: dict) -> Array | float:
        if self.real_weight_start is None:
            return self.real_weight
        # Every image of a batch carries its number.
        done = batch["step"][0] / constants["last"]
        return self.real_weight_start + (self.real_weight - self.real_weight_start) * done
