"""The same work in torch with diffusers and peft, as their training scripts and pipelines do it.

Defaults throughout (eager, scaled-dot-product attention) but where a case asks for torch.compile.
In bfloat16 as those scripts do it: the base is stored so, adapters are float32, and autocast joins
them. On the CPU, or on the GPU where JAX runs on one. Imported only for --peer=torch.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxsynth.adapters.inject import AdapterState
from jaxsynth.bench.timing import cores
from jaxsynth.core.errors import UserError
from jaxsynth.tasks.text_to_image import FinetuneConfig

try:
    import diffusers
    import peft
    import torch
    import transformers
except ImportError as error:
    raise UserError(
        f"--peer=torch needs torch, diffusers, transformers and peft: {error.name} is not "
        "installed (pip install torch diffusers transformers peft accelerate)"
    ) from error


def prepare(*, accelerator: bool) -> dict[str, str]:
    """Gives torch every core this process may use; returns the versions.

    UserError where JAX runs on what torch does not, or, but for the `accelerator` benchmark, on
    anything else than the CPU.
    """
    backend = jax.default_backend()
    shared = accelerator and _device() == "cuda" and torch.cuda.is_available()
    if backend != "cpu" and not shared:
        raise UserError(
            f"--peer=torch compares on the CPU{' or a GPU' if accelerator else ''}, but JAX runs "
            f"on {backend}: set JAX_PLATFORMS=cpu"
            + (f" (torch {torch.__version__} finds no GPU)" if backend == "gpu" else "")
        )
    torch.set_num_threads(len(cores()))
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    modules = (torch, diffusers, transformers, peft)
    return {module.__name__: module.__version__ for module in modules}


def _device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


class TorchTraining:
    """LoRA on UNet and text encoder, as in diffusers' DreamBooth LoRA script."""

    def __init__(
        self,
        folder: Path,
        config: FinetuneConfig,
        dtype: str = "float32",
        *,
        compiled: bool = False,
    ):
        self._config, self._dtype = config, getattr(torch, dtype)
        self._unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        self._text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
        self._scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
        self._factors = {}
        adapter = config.adapter_config()
        for component, model, targets in (
            ("unet", self._unet, config.unet_targets),
            ("text_encoder", self._text, config.text_targets),
        ):
            model.requires_grad_(False)
            model.to(_device(), self._dtype)
            model.add_adapter(
                peft.LoraConfig(
                    r=adapter.rank,
                    lora_alpha=adapter.alphas()[0],
                    init_lora_weights="gaussian",
                    target_modules=list(targets),
                )
            )
            model.train()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            self._factors |= {
                _state_name(component, name): parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
        if compiled:
            self._unet, self._text = torch.compile(self._unet), torch.compile(self._text)

    def load(self, state: AdapterState) -> None:
        """Sets every factor and forgets the optimiser's moments."""
        missing = state.arrays.keys() ^ self._factors.keys()
        if missing:
            raise ValueError(f"factors of one side only: {sorted(missing)[:5]}")
        with torch.no_grad():
            for name, value in state.arrays.items():
                self._factors[name].copy_(torch.from_numpy(np.array(value).T.copy()))
        self._parameters = list(self._factors.values())
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=self._config.learning_rate,
            weight_decay=self._config.weight_decay,
        )

    def step(self, batch: dict, drawn=None) -> dict[str, float]:
        """One update; `drawn` (x0, noise, t), channels last, replaces this step's own draws."""
        device = _device()
        ids = torch.from_numpy(np.array(batch["ids"], np.int64)).to(device)
        if drawn is None:
            mean, std = (nchw(np.asarray(batch[name])[:, 0]) for name in ("mean", "std"))
            x0 = mean + std * torch.randn_like(mean)
            noise = torch.randn_like(mean)
            steps = self._scheduler.config.num_train_timesteps
            t = torch.randint(steps, (len(mean),), device=device)
        else:
            x0, noise = nchw(drawn.x0), nchw(drawn.noise)
            t = torch.from_numpy(np.array(drawn.t, np.int64)).to(device)
        noisy = self._scheduler.add_noise(x0, noise, t)
        with torch.autocast(device, self._dtype, enabled=self._dtype != torch.float32):
            text = self._text(ids, return_dict=False)[0]
            output = self._unet(noisy.to(self._dtype), t, text, return_dict=False)[0]
        target = noise
        if self._scheduler.config.prediction_type == "v_prediction":
            target = self._scheduler.get_velocity(x0, noise, t)
        loss = torch.nn.functional.mse_loss(output.float(), target.float())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {"loss": loss.item(), "grad_norm": norm.item()}


class TorchGeneration:
    """A StableDiffusionPipeline; `adapters` are loaded by name and switched with `set_adapters`."""

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        adapters: Sequence[Path],
        *,
        steps: int,
        guidance: float,
        dtype: str = "float32",
        compiled: bool = False,
    ):
        self._steps, self._guidance, self._dtype = steps, guidance, getattr(torch, dtype)
        self._pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, requires_safety_checker=False, dtype=self._dtype
        ).to(_device())
        self._pipe.set_progress_bar_config(disable=True)
        self._names = [f"adapter{number}" for number in range(len(adapters))]
        with warnings.catch_warnings():
            # Several adapters are what is wanted.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            for name, path in zip(self._names, adapters, strict=True):
                self._pipe.load_lora_weights(path, adapter_name=name)
        self._text = []
        for number, prompt in enumerate(prompts):
            self._switch(number)
            with torch.no_grad():
                self._text.append(self._pipe.encode_prompt(prompt, _device(), 1, True, ""))
        if compiled:
            self._pipe.unet = torch.compile(self._pipe.unet)

    def _switch(self, number: int) -> None:
        if self._names:
            self._pipe.set_adapters(self._names[number])

    def step(self, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Images in [0, 1], float32 (b, h, w, 3), from noise (b, h, w, c)."""
        latents, images = nchw(noise).to(self._dtype), None
        for number, (cond, uncond) in enumerate(self._text):
            rows = np.flatnonzero(labels == number)
            self._switch(number)
            found = self._pipe(
                prompt_embeds=cond.expand(len(rows), -1, -1),
                negative_prompt_embeds=uncond.expand(len(rows), -1, -1),
                latents=latents[rows],
                num_inference_steps=self._steps,
                guidance_scale=self._guidance,
                output_type="np",
            ).images
            if images is None:
                images = np.empty((len(labels), *found.shape[1:]), found.dtype)
            images[rows] = found
        return images


def _state_name(component: str, name: str) -> str:
    """torch's parameter name as that of our adapter state; newer transformers drop a prefix."""
    path, factor = name.removesuffix(".default.weight").rsplit(".", 1)
    if component == "text_encoder" and not path.startswith("text_model."):
        path = f"text_model.{path}"
    return f"{component}.{path}.{factor}"


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.array(x), -1, 1))).to(_device())
