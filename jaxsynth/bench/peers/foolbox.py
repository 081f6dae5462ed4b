"""PGD by foolbox on the same JAX function. Imported only for --peer=foolbox."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxsynth.bench.cases.attacked_networks import EPS, STEP_SIZE, STEPS, Attack
from jaxsynth.core.errors import UserError

try:
    with warnings.catch_warnings():
        # It imports a namespace of scipy's that goes away.
        warnings.simplefilter("ignore", DeprecationWarning)
        import foolbox
except ImportError as error:
    raise UserError(
        f"--peer=foolbox needs foolbox: {error.name} is not installed (pip install foolbox)"
    ) from error


def prepare() -> dict[str, str]:
    """Returns the versions."""
    return {"foolbox": foolbox.__version__}


class FoolboxPGD:
    """foolbox's LinfPGD: a Python loop that differentiates `predict`, which is compiled."""

    def __init__(self, ours: Attack):
        # Handing it an uncompiled function would run every operation by itself.
        self._model = foolbox.JAXModel(jax.jit(ours.predict), bounds=(0, 1))
        self._images, self._labels = jnp.asarray(ours.images), jnp.asarray(ours.labels)

    def step(self, steps: int | None = None) -> np.ndarray:
        """The adversarial images (n, h, w, c)."""
        attack = foolbox.attacks.LinfPGD(
            abs_stepsize=STEP_SIZE, steps=steps or STEPS, random_start=False
        )
        _, found, _ = attack(self._model, self._images, self._labels, epsilons=EPS)
        return np.asarray(found)
