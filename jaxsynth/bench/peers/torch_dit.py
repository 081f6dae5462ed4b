"""An Affiner training step in torch, on diffusers' transformer, as one would write it there.

Frozen base, an optimiser that sees the new parameters only, eager, float32. Imported only for
--peer=torch.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torch import nn
from torch.nn import functional as F

from jaxsynth.adapters.inject import AdapterState
from jaxsynth.bench.peers.diffusers import nchw


class TorchAffiner(nn.Module):
    """y = W (a * x) + b0 + b + s * up down x, around a frozen linear layer."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.ones(layer.in_features))
        self.shift = nn.Parameter(torch.zeros(layer.out_features))
        self.down = nn.Parameter(torch.empty(rank, layer.in_features))
        self.up = nn.Parameter(torch.empty(layer.out_features, rank))
        self.gate = nn.Parameter(torch.zeros(()))
        nn.init.kaiming_normal_(self.down)
        nn.init.kaiming_normal_(self.up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # One addition of vectors instead of one of activations.
        out = F.linear(x * self.scale, self.layer.weight, self.layer.bias + self.shift)
        return out + F.linear(self.gate * F.linear(x, self.down), self.up)


class TorchRows(nn.Module):
    """A frozen table of classes, and trainable rows after it."""

    def __init__(self, table: nn.Embedding, count: int):
        super().__init__()
        self.table = table
        self.rows = nn.Parameter(table.weight[-1:].repeat(count, 1))

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        old = self.table.num_embeddings
        known = self.table(labels.clamp(max=old - 1))
        return torch.where((labels < old)[:, None], known, self.rows[(labels - old).clamp(min=0)])


class TorchDiTTraining:
    """Adam on Affiners and class rows; the error of the noise and the variance's bound."""

    def __init__(
        self,
        folder: Path,
        targets: Sequence[str],
        *,
        rank: int,
        classes: int,
        learning_rate: float,
        label_dropout: float,
        scheduler: dict,
    ):
        self._label_dropout, self._rate = label_dropout, learning_rate
        self._scheduler = DDPMScheduler.from_config(scheduler)
        self._tables = schedule_tables(self._scheduler)
        self._model = DiTTransformer2DModel.from_pretrained(folder)
        # In training mode diffusers would drop other labels in every block.
        self._model.requires_grad_(False).eval()
        self._null = self._model.config.num_embeds_ada_norm
        blocks = self._model.transformer_blocks
        rows = TorchRows(blocks[0].norm1.emb.class_embedder.embedding_table, classes)
        for block in blocks:
            block.norm1.emb.class_embedder.embedding_table = rows
            for name in targets:
                path = name if name.startswith("ff.") else f"attn1.{name}"
                block.set_submodule(path, TorchAffiner(block.get_submodule(path), rank))
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]

    def load(self, state: AdapterState) -> None:
        """Sets every parameter and forgets the optimiser's moments."""
        with torch.no_grad():
            for name, value in state.arrays.items():
                for parameter, own in self._places(name, np.asarray(value)):
                    parameter.copy_(torch.from_numpy(own.copy()))
        self._optimizer = torch.optim.Adam(self._parameters, lr=self._rate)

    def gradients(self, state: AdapterState) -> dict[str, np.ndarray]:
        """Those of the last step, in the names and layout of `state`."""
        found = {name: np.empty(value.shape, np.float32) for name, value in state.arrays.items()}
        for name, values in found.items():
            for parameter, own in self._places(name, values):
                own[...] = parameter.grad.numpy()
        return found

    def step(self, batch: dict, drawn=None) -> float:
        """One update; `drawn` (x0, noise, t, labels) replaces this step's own draws."""
        if drawn is None:
            mean, std = nchw(batch["mean"]), nchw(batch["std"])
            x0 = mean + std * torch.randn_like(mean)
            noise = torch.randn_like(x0)
            t = torch.randint(self._scheduler.config.num_train_timesteps, (len(x0),))
            labels = torch.from_numpy(np.array(batch["labels"], np.int64))
            labels[torch.rand(len(labels)) < self._label_dropout] = self._null
        else:
            x0, noise = nchw(drawn.x0), nchw(drawn.noise)
            t, labels = (torch.from_numpy(np.array(x, np.int64)) for x in (drawn.t, drawn.labels))
        x_t = self._scheduler.add_noise(x0, noise, t)
        output = self._model(x_t, t, labels, return_dict=False)[0]
        prediction, v = output.chunk(2, dim=1)
        # Weighted by 0.001 T, which for T = 1000 is 1.
        bound = variational_bound(self._tables, prediction.detach(), v, x0, x_t, t).mean()
        loss = F.mse_loss(prediction, noise) + bound
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def _places(self, name: str, values: np.ndarray):
        """The parameters that a stacked array of ours holds, each with its part of it."""
        path, _, factor = name.rpartition(".")
        module, _, rest = path.partition(".")
        blocks = self._model.transformer_blocks
        if module != "transformer_blocks":
            yield blocks[0].norm1.emb.class_embedder.embedding_table.rows, values
            return
        for number, block in enumerate(blocks):
            # With the dots a gate's own is a view too, and not a number.
            yield getattr(block.get_submodule(rest), factor), values[number, ...].T


def variational_bound(tables, prediction, v, x0, x_t, t) -> torch.Tensor:
    """The bound in bits for each element: the variance's term of the loss."""
    columns = tables[t][..., None, None, None].unbind(1)
    signal, sigma, least, most, x0_factor, x_factor = columns
    found = (x_t - sigma * prediction) / signal
    log_variance = least + (v + 1) / 2 * (most - least)
    apart = x0_factor * (x0 - found)
    nats = 0.5 * (
        log_variance
        - least
        - 1
        + torch.exp(least - log_variance)
        + apart.square() * torch.exp(-log_variance)
    )
    first = t == 0
    if first.any():
        mean = x0_factor * found + x_factor * x_t
        unlikely = -_log_likelihood(x0, mean, 0.5 * log_variance)
        nats = torch.where(first[:, None, None, None], unlikely, nats)
    return nats / np.log(2.0)


def schedule_tables(scheduler: DDPMScheduler) -> torch.Tensor:
    """(t, 6): the factors of x_0 and of the noise in x_t, the bounds of the log-variance of
    x_{t-1}, and the factors of x_0 and x_t in its mean."""
    betas = scheduler.betas.double()
    a = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=a.dtype), a[:-1]])
    variance = betas * (1 - before) / (1 - a)
    # At t = 0 it is 0; its logarithm is that at t = 1.
    variance[0] = variance[1]
    columns = (
        # As `add_noise` has them, which rounds 1 - a.
        scheduler.alphas_cumprod.sqrt().double(),
        (1 - scheduler.alphas_cumprod).sqrt().double(),
        variance.log(),
        betas.log(),
        betas * before.sqrt() / (1 - a),
        (1 - betas).sqrt() * (1 - before) / (1 - a),
    )
    return torch.stack(columns, dim=1).float()


def _log_likelihood(x, mean, log_scale) -> torch.Tensor:
    """log P of the bin of width 2/255 around x, open beyond -0.999 and 0.999."""

    def below(edge: float) -> torch.Tensor:
        z = (x - mean + edge) * torch.exp(-log_scale)
        return 0.5 * (1 + torch.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3)))

    upper, lower = below(1 / 255), below(-1 / 255)
    inside = (upper - lower).clamp(min=1e-12).log()
    low, high = upper.clamp(min=1e-12).log(), (1 - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, low, torch.where(x > 0.999, high, inside))
