"""The classifiers of `bench.attacks` in torch, as its users write them."""

import numpy as np
import torch
from torch.nn import functional

from jaxsynth.bench.cases.attacked_networks import MEAN, STD, Attack, blocks


def torch_network(ours: Attack) -> torch.nn.Module:
    """The case's network with its weights, of NCHW images."""
    networks = {
        "mlp": TorchMlp,
        "resnet20": TorchResNet20,
        "convolutions": TorchConvolutions,
    }
    return networks[ours.case.network](ours.weights).eval()


class _Network(torch.nn.Module):
    """Holds weights by name, kernels as torch has them."""

    def __init__(self, weights: dict[str, np.ndarray]):
        super().__init__()
        self.mean, self.std = MEAN, STD
        self.weights = torch.nn.ParameterDict()
        for name, value in weights.items():
            if value.ndim == 4:
                value = value.transpose(3, 2, 0, 1)
            elif value.ndim == 2:
                value = value.T
            # A parameter's name holds no dots.
            self.weights[name.replace(".", "_")] = torch.nn.Parameter(
                torch.from_numpy(np.ascontiguousarray(value))
            )

    def of(self, *parts: str) -> torch.Tensor:
        return self.weights["_".join(parts).replace(".", "_")]

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.of("head", "weight"), self.of("head", "bias"))


class TorchMlp(_Network):
    """`attacks.mlp` of NCHW images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.permute(0, 2, 3, 1).flatten(1) - self.mean) / self.std
        for number in ("0", "1"):
            x = functional.linear(x, self.of(number, "weight"), self.of(number, "bias")).relu()
        return self.head(x)


class TorchConvolutions(_Network):
    """`attacks.convolutions` of NCHW images."""

    def conv(self, x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        kernel = self.of(name, "kernel")
        return functional.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv(images, "stem", 1)
        for block, stride, widens in blocks():
            left = self.conv(self.conv(x, f"{block}.0", stride), f"{block}.1", 1)
            x = left + self.conv(x, f"{block}.shortcut", stride) if widens else left
        return self.head(x.mean((2, 3)))


class TorchResNet20(TorchConvolutions):
    """`attacks.resnet20` of NCHW images, its normalisations torch's own."""

    def normalised(self, x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        scale = self.of(name, "scale")
        # At inference: (x - 0) / sqrt(1 + 0) * scale + bias.
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        x = self.conv(x, name, stride)
        return functional.batch_norm(x, zeros, ones, scale, self.of(name, "bias"), eps=0.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.normalised((images - self.mean) / self.std, "stem", 1).relu()
        for block, stride, widens in blocks():
            left = self.normalised(x, f"{block}.0", stride).relu()
            left = self.normalised(left, f"{block}.1", 1)
            x = (left + (self.normalised(x, f"{block}.shortcut", stride) if widens else x)).relu()
        return self.head(x.mean((2, 3)))
