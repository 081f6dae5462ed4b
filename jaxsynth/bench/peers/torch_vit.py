"""A vision transformer trained by PyTorch, as its users write it: transformers' and AdamW."""

from pathlib import Path

import numpy as np
import torch
import transformers

from jaxsynth.tasks.networks import NetworkConfig
from jaxsynth.tasks.supervised import SupervisedConfig


class TorchTraining:
    """The network of a folder that `save_classifier` wrote."""

    def __init__(self, folder: Path, network: NetworkConfig, config: SupervisedConfig):
        self._model = transformers.ViTForImageClassification.from_pretrained(folder).train()
        self._mean, self._std = (
            torch.tensor(x).view(1, 3, 1, 1) for x in (network.mean, network.std)
        )
        self._loss = torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self._clip = config.clip_norm
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=config.learning_rate, betas=(config.b1, config.b2),
            eps=config.eps, weight_decay=config.weight_decay,
        )  # fmt: skip

    def step(self, batch: dict) -> dict[str, float]:
        """One update; the loss and the gradient's norm."""
        pixels = torch.from_numpy(np.array(batch["image"])).permute(0, 3, 1, 2) / 255
        labels = torch.from_numpy(np.array(batch["label"], np.int64))
        loss = self._loss(self._model((pixels - self._mean) / self._std).logits, labels)
        self._optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm.item()}
