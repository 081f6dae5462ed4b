"""How much disk a training takes, from its shapes alone."""

import jax
from flax import nnx
from jaxtyping import PyTree

from jaxsynth.adapters import optim_hooks
from jaxsynth.adapters.inject import Trainable, config_of
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.optim import Rate, make_optimizer
from jaxsynth.training.step import init_state

# Names, shapes, places and digests that a checkpoint keeps of each array.
_NOTES = 2_000
# A new checkpoint is written before the old one goes.
_CHECKPOINTS = 2


def training_bytes(model: nnx.Module, config: TrainingConfig, *, count: int = 1) -> int:
    """Bytes that `trainer.train` and what it learned need at once, at the most.

    Args:
        model: the task's, of arrays or of shapes.
        config: its lengths do not matter.
        count: so many such models are trained.
    """
    learns = nnx.state(model, Trainable)
    adapter = config_of(model)

    def init(values, key):
        tx = optim_hooks.optimiser(adapter, make_optimizer(config), max(config.steps, 1))
        rate = Rate.of(config.sized(config.batch_size))
        return init_state(values, tx, key, rate, ema=bool(config.ema_decay))

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(init, learns, key)
    return count * needed_bytes(state, learns)


def needed_bytes(state: PyTree, learns: PyTree) -> int:
    """The same of a state of a training, or its shapes, and of what learns in it."""
    return _CHECKPOINTS * _size(state) + _size(learns)


def _size(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize + _NOTES for leaf in jax.tree.leaves(tree))
