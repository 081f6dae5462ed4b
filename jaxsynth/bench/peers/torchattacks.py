"""PGD by torchattacks on the same network in torch. Imported only for --peer=torchattacks."""

import jax
import numpy as np

from jaxsynth.bench.cases.attacked_networks import EPS, STEP_SIZE, STEPS, Attack
from jaxsynth.bench.timing import cores
from jaxsynth.core.errors import UserError

try:
    import torch
    import torchattacks  # pyrefly: ignore[missing-import]

    from jaxsynth.bench.peers.torch_classifiers import torch_network
except ImportError as error:
    raise UserError(
        f"--peer=torchattacks needs torch and torchattacks: {error.name} is not installed "
        "(pip install torch requests; pip install --no-deps torchattacks, whose own requirement "
        "would put back requests by years)"
    ) from error


def prepare() -> dict[str, str]:
    """Gives torch every core this process may use; returns the versions."""
    if jax.default_backend() != "cpu":
        raise UserError(
            f"--peer=torchattacks compares on the CPU, but JAX runs on {jax.default_backend()}: "
            "set JAX_PLATFORMS=cpu"
        )
    torch.set_num_threads(len(cores()))
    return {module.__name__: module.__version__ for module in (torch, torchattacks)}


class TorchattacksPGD:
    """torchattacks' PGD, which takes gradients to the images only."""

    def __init__(self, ours: Attack):
        self._model = torch_network(ours)
        self._images = torch.from_numpy(ours.images).permute(0, 3, 1, 2).contiguous()
        self._labels = torch.from_numpy(ours.labels).long()

    def step(self, steps: int | None = None) -> np.ndarray:
        """The adversarial images (n, h, w, c)."""
        attack = torchattacks.PGD(
            self._model, eps=EPS, alpha=STEP_SIZE, steps=steps or STEPS, random_start=False
        )
        return attack(self._images, self._labels).permute(0, 2, 3, 1).numpy()
