"""One training step as a pure function of (state, frozen, batch), and the forms it is run in.

The trainable part is any pytree of float arrays (an `nnx.State`, a dict); the frozen part is passed
beside it and never enters gradients, optimizer or checkpoints. Nothing here is jitted: `loop.fit`
jits with the state donated, and callers may jit, vmap or scan the same function. Randomness is
`fold_in(state.key, state.step)`, so a resumed run draws what an uninterrupted one would have.

A loss may come in phases, each of which moves one part of the trainable tree: a GAN's discriminator
first, then its generator against the new discriminator. One loss for everything is one phase.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree

from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.optim import Rate, rate_at

LossFn = Callable[[PyTree, PyTree, PyTree, Array], tuple[Array, dict[str, Array]]]
StepFn = Callable[["TrainState", PyTree, PyTree], tuple["TrainState", dict[str, Array]]]
_RESERVED = {"loss", "grad_norm", "learning_rate"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, and its rate; `step` is the number of updates done.

    `opt_state` is the optimizer's, by part of the trainable tree where a loss has phases. `ema` is
    optax's average, not yet debiased (`averaged`).
    """

    step: Int[Array, ""]
    trainable: PyTree
    opt_state: PyTree
    ema: optax.EmaState | None
    rate: Rate
    key: Key[Array, ""]


def init_state(
    trainable: PyTree,
    tx: optax.GradientTransformation,
    key: Array,
    rate: Rate | None = None,
    *,
    parts: Sequence[str] = (),
    ema: bool = False,
) -> TrainState:
    """A state at step 0. Arrays are copied, so donating the state leaves the caller's own alive.

    Parameters stored in 16 bits become float32: an update is often smaller than their rounding.
    `rate` is the schedule of an optimizer that takes one (`optim.make_optimizer`). `parts` names
    those entries of `trainable` that have an optimizer state each: a loss's phases.

    Raises:
        TypeError: a leaf of `trainable` is no floating-point array; its path is named.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name = jax.tree_util.keystr(path)
            raise TypeError(
                f"trainable{name} is {jnp.result_type(leaf)}: only floats can be trained"
            )
    trainable = jax.tree.map(_float32_copy, trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state={part: tx.init(_named(trainable, part)) for part in parts} or tx.init(trainable),
        ema=optax.ema(0.0).init(trainable) if ema else None,
        rate=jax.tree.map(jnp.array, Rate.of(TrainingConfig()) if rate is None else rate),
        key=jnp.copy(key),
    )


def init_stacked(
    trainables: PyTree,
    tx: optax.GradientTransformation,
    keys: Array,
    rates: Rate | None = None,
    *,
    ema: bool = False,
) -> TrainState:
    """`init_state` for C adapters at once: leaves, `keys` and `rates` have a first axis of C."""
    trainables = jax.tree.map(jnp.copy, trainables)

    def one(tree: PyTree, key: Array, rate: Rate | None) -> TrainState:
        return init_state(tree, tx, key, rate, ema=ema)

    if rates is None:
        return jax.vmap(partial(one, rate=None))(trainables, keys)
    return jax.vmap(one)(trainables, keys, rates)


def make_train_step(
    loss: LossFn | Mapping[str, LossFn],
    tx: optax.GradientTransformation,
    *,
    schedule: str = "constant",
    accumulate: int = 1,
    ema_decay: float = 0.0,
    teacher: bool = False,
) -> StepFn:
    """Build `step(state, frozen, batch) -> (state, metrics)`.

    Args:
        loss: `(trainable, frozen, batch, key) -> (mean loss over the batch, dict of scalars)`, or
            one for each phase by the name of the part that it moves, in their order. Each phase
            sees the parts that earlier ones have moved. The last phase's value is "loss".
        tx: the optimizer, whose `update` may take `rate=`; see `optim.make_optimizer`.
        schedule: how the rate in the state follows the step.
        accumulate: the batch is cut into this many parts and their gradients averaged before the
            one update, for batches whose activations do not fit. Every leaf's leading axis must be
            divisible by it, and the dict's scalars must be means too.
        ema_decay: decay of the averaged parameters, for states made with `ema=True`.
        teacher: the loss gets `(frozen, averaged parameters)` in the place of `frozen`.

    The metrics are float32 scalars: "loss", "grad_norm" (before clipping, of the last phase),
    "learning_rate" at the step that used it, and the losses' own.
    """
    tx = optax.with_extra_args_support(tx)
    phases = loss if isinstance(loss, Mapping) else {"": loss}

    def step(state: TrainState, frozen: PyTree, batch: PyTree):
        if (state.ema is None) != (not ema_decay):
            raise ValueError(
                f"ema_decay is {ema_decay} but the state was made with ema={state.ema is not None}"
            )
        if teacher:
            frozen = (frozen, averaged(state, ema_decay))
        rate = rate_at(schedule, state.rate, state.step)
        trainable, opt_state = state.trainable, state.opt_state
        metrics: dict[str, Array] = {"learning_rate": rate}
        for part, phase in phases.items():
            key = jax.random.fold_in(state.key, state.step)
            (value, aux), grads = _gradients(phase, part, accumulate, trainable, frozen, batch, key)
            if clash := _RESERVED & set(aux):
                raise ValueError(f"a loss's metrics may not be called {sorted(clash)}")
            metrics |= {"loss": value, "grad_norm": optax.tree.norm(grads), **aux}
            own, own_state = _named(trainable, part), opt_state[part] if part else opt_state
            grads = {part: grads} if part else grads
            updates, own_state = tx.update(grads, own_state, own, rate=rate)
            own = optax.apply_updates(own, updates)
            trainable = _with(trainable, part, own[part] if part else own)
            opt_state = _with(opt_state, part, own_state)
        ema = None
        if ema_decay:
            _, ema = optax.ema(ema_decay, debias=False).update(trainable, state.ema)
        new = TrainState(
            step=state.step + 1,
            trainable=trainable,
            opt_state=opt_state,
            ema=ema,
            rate=state.rate,
            key=state.key,
        )
        return new, {name: value.astype(jnp.float32) for name, value in metrics.items()}

    return step


@partial(jax.jit, static_argnames="ema_decay")
def averaged(state: TrainState, ema_decay: float) -> PyTree:
    """The debiased exponential average of the parameters, or the parameters where there is none.

    Kingma and Ba 2015 (arXiv 1412.6980), section 3: after n steps the average from 0 is divided by
    1 - decay^n, so that a short training's average is not one of its initial values.
    """
    if state.ema is None:
        return state.trainable
    # Counts of stacked trainings are equal; before the first step there is nothing to average.
    count = state.ema.count.reshape(-1)[0]
    corrected = optax.tree.bias_correction(state.ema.ema, ema_decay, jnp.maximum(count, 1))
    return jax.tree.map(
        lambda mean, now: jnp.where(count > 0, mean, now), corrected, state.trainable
    )


def _named(tree: Any, part: str) -> Any:
    """A part under its name, so that its paths are those of the whole; "" is the whole."""
    return {part: tree[part]} if part else tree


def _with(tree: Any, part: str, value: Any) -> Any:
    """`tree` with another entry `part`; `value` itself where the part is the whole.

    Leaf by leaf, so that the structure stays the tree's own: an entry of an `nnx.State` is a state
    where it is read, and none where it lies.
    """
    if not part:
        return value
    leaves = iter(jax.tree.leaves(value))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            next(leaves) if jax.tree_util.keystr(path[:1], simple=True) == part else leaf
        ),
        tree,
    )


def _gradients(loss: LossFn, part: str, accumulate: int, trainable, frozen, batch, key):
    """`((value, metrics), gradients)` of one phase with respect to its part."""

    def of_part(own, rest, batch, key):
        return loss(_with(rest[0], part, own), rest[1], batch, key)

    grad_fn = jax.value_and_grad(of_part, has_aux=True)
    own = trainable[part] if part else trainable
    arguments = (own, (trainable, frozen), batch, key)
    return grad_fn(*arguments) if accumulate == 1 else _accumulated(grad_fn, accumulate, *arguments)


def scan_steps(
    step: StepFn, batch_fn: Callable[[Array, PyTree], PyTree], steps_per_call: int
) -> StepFn:
    """Run `steps_per_call` steps inside one program; the metrics are their means.

    For networks so small that starting a program costs as much as running it. The batch must come
    from the device: `batch_fn(step, data) -> batch`, where `data` is what the caller passes in the
    batch's place, such as a whole data set of latents.
    """

    def single(state: TrainState, frozen: PyTree, data: PyTree):
        return step(state, frozen, batch_fn(state.step, data))

    # XLA for CPUs has slow convolutions' gradients inside a loop, be it of one step.
    if steps_per_call == 1:
        return single

    def scanned(state: TrainState, frozen: PyTree, data: PyTree):
        def body(state: TrainState, _):
            return step(state, frozen, batch_fn(state.step, data))

        state, metrics = jax.lax.scan(body, state, length=steps_per_call)
        return state, {name: value.mean(0) for name, value in metrics.items()}

    return scanned


def stacked(step: StepFn, *, batch_axis: int | None = 0) -> StepFn:
    """`step` for C adapters at once: state (and batch) with a leading axis of C, one frozen part.

    `batch_axis` None gives every adapter the same batch. The result equals C separate runs; the
    metrics have shape (C,).
    """
    return jax.vmap(step, in_axes=(0, None, batch_axis))


def _float32_copy(leaf: Array) -> Array:
    """A float32 (or wider) copy that keeps the leaf's sharding."""
    dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
    return jnp.array(leaf, dtype=dtype, copy=True)


def _accumulated(grad_fn, parts: int, trainable, rest, batch, key):
    """Means of loss, metrics and gradients over `parts` equal parts of the batch."""

    def cut(path, leaf):
        if leaf.shape[0] % parts:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"batch{name} has {leaf.shape[0]} rows, not divisible by accumulate={parts}"
            )
        # Strided, so that each part takes rows from every device's share of a sharded batch.
        return leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)

    def body(total, part):
        index, rows = part
        found = grad_fn(trainable, rest, rows, jax.random.fold_in(key, index))
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype) / parts, total, found), None

    pieces = jax.tree_util.tree_map_with_path(cut, batch)
    one = jax.tree.map(lambda x: x[0], pieces)
    shapes = jax.eval_shape(grad_fn, trainable, rest, one, key)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
    )
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(parts), pieces))
    return total
