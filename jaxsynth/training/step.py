"""One training step as a pure function of (state, frozen, batch), and the forms it is run in.

The trainable part is any pytree of float arrays (an `nnx.State`, a dict); the frozen part is passed
beside it and never enters gradients, optimiser or checkpoints. Nothing here is jitted: `loop.fit`
jits with the state donated, and callers may jit, vmap or scan the same function. Randomness is
`fold_in(state.key, state.step)`, so a resumed run draws what an uninterrupted one would have.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree

LossFn = Callable[[PyTree, PyTree, PyTree, Array], tuple[Array, dict[str, Array]]]
StepFn = Callable[["TrainState", PyTree, PyTree], tuple["TrainState", dict[str, Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes; `step` is the number of updates done."""

    step: Int[Array, ""]
    trainable: PyTree
    opt_state: PyTree
    ema: PyTree | None
    key: Key[Array, ""]


def init_state(
    trainable: PyTree, tx: optax.GradientTransformation, key: Array, *, ema: bool = False
) -> TrainState:
    """A state at step 0. Arrays are copied, so donating the state leaves the caller's own alive.

    Parameters stored in 16 bits become float32: an update is often smaller than their rounding.

    Raises:
        TypeError: a leaf of `trainable` is no floating-point array; its path is named.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name = jax.tree_util.keystr(path)
            raise TypeError(
                f"trainable{name} is {jnp.result_type(leaf)}: only floats can be trained"
            )
    trainable = jax.tree.map(_own_float32, trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=tx.init(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if ema else None,
        key=jnp.copy(key),
    )


def init_stacked(
    trainables: PyTree, tx: optax.GradientTransformation, keys: Array, *, ema: bool = False
) -> TrainState:
    """`init_state` for C adapters at once: every leaf and `keys` carry a leading axis of C."""
    trainables = jax.tree.map(jnp.copy, trainables)
    return jax.vmap(lambda tree, key: init_state(tree, tx, key, ema=ema))(trainables, keys)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema_decay: float | Callable[[Array], Array] | None = None,
    learning_rate: optax.Schedule | None = None,
) -> StepFn:
    """Build `step(state, frozen, batch) -> (state, metrics)`.

    Args:
        loss_fn: `(trainable, frozen, batch, key) -> (mean loss over the batch, dict of scalars)`.
        tx: the optimiser; see `optim.make_optimizer`.
        accumulate: the batch is cut into this many parts and their gradients averaged before the
            one update, for batches whose activations do not fit. Every leaf's leading axis must be
            divisible by it, and the dict's scalars must be means too.
        ema_decay: decay of the averaged parameters (or a function of the step), for states made
            with `ema=True`.
        learning_rate: reported under that name, at the step that used it.

    The metrics are float32 scalars: "loss", "grad_norm" (before clipping) and `loss_fn`'s own.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def step(state: TrainState, frozen: PyTree, batch: PyTree):
        key = jax.random.fold_in(state.key, state.step)
        if accumulate == 1:
            (loss, aux), grads = grad_fn(state.trainable, frozen, batch, key)
        else:
            (loss, aux), grads = _accumulated(grad_fn, accumulate, state, frozen, batch, key)
        if clash := {"loss", "grad_norm", "learning_rate"} & set(aux):
            raise ValueError(f"loss_fn's metrics may not be called {sorted(clash)}")
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **aux}
        if learning_rate is not None:
            metrics["learning_rate"] = jnp.asarray(learning_rate(state.step))
        new = TrainState(
            step=state.step + 1,
            trainable=trainable,
            opt_state=opt_state,
            ema=_averaged(state, trainable, ema_decay),
            key=state.key,
        )
        return new, {name: value.astype(jnp.float32) for name, value in metrics.items()}

    return step


def scan_steps(
    step: StepFn, batch_fn: Callable[[Array, PyTree], PyTree], steps_per_call: int
) -> StepFn:
    """Run `steps_per_call` steps inside one program; the metrics are their means.

    For networks so small that starting a program costs as much as running it. The batch must come
    from the device: `batch_fn(step, data) -> batch`, where `data` is what the caller passes in the
    batch's place, such as a whole data set of latents.
    """

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


def _own_float32(leaf: Array) -> Array:
    """A float32 (or wider) copy that keeps the leaf's sharding."""
    dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
    return jnp.array(leaf, dtype=dtype, copy=True)


def _accumulated(grad_fn, parts: int, state: TrainState, frozen, batch, key):
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
        found = grad_fn(state.trainable, frozen, rows, jax.random.fold_in(key, index))
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype) / parts, total, found), None

    pieces = jax.tree_util.tree_map_with_path(cut, batch)
    one = jax.tree.map(lambda x: x[0], pieces)
    shapes = jax.eval_shape(grad_fn, state.trainable, frozen, one, key)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
    )
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(parts), pieces))
    return total


def _averaged(state: TrainState, trainable: PyTree, decay) -> PyTree | None:
    if (state.ema is None) != (decay is None):
        raise ValueError(
            f"ema_decay is {decay} but the state was made with ema={state.ema is not None}"
        )
    if decay is None:
        return None
    rate = decay(state.step) if callable(decay) else decay
    return jax.tree.map(lambda mean, new: mean + (1.0 - rate) * (new - mean), state.ema, trainable)
