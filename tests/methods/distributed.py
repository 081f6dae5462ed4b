"""Fine-tunes, generates and classifies as one of COUNT processes with two devices in all.

python distributed.py FOLDER PORT PROCESS COUNT BASE
"""

import sys
from pathlib import Path

import jax
import numpy as np

from jaxsynth.data.pipeline.augment import RECIPES
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.store import ImageStore
from jaxsynth.generation.generate import GenerateConfig, Generator, fill_store
from jaxsynth.runs.stage import run_stage
from jaxsynth.tasks.clip_classifier import ClassifyConfig, train_classifier
from jaxsynth.tasks.clip_predictions import predict
from jaxsynth.tasks.text_to_image import FinetuneConfig, encode_examples, finetune, finetune_each
from jaxsynth.training.sharding import make_mesh
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.hf import load_clip, load_pipeline

PROMPTS = ("a photo of the digit one", "a photo of the digit two")
FINETUNE = FinetuneConfig(
    steps=3,
    batch_size=4,
    learning_rate=1e-2,
    warmup_steps=0,
    rank=2,
    eps=1e-2,
    unet_targets=("to_q", "to_out.0"),
    text_targets=("q_proj",),
    checkpoint_every=2,
)
# Nothing random but the order: the rows of a batch lie otherwise on two processes.
CLASSIFY = ClassifyConfig(
    rank=2,
    targets=("q_proj",),
    dropout=0.0,
    learning_rate=1e-2,
    steps=2,
    warmup_epochs=0,
    batch_size=8,
    mix_probability=0.0,
    augment=RECIPES["none"],
)
GENERATE = GenerateConfig(
    images_per_class=4, num_inference_steps=2, batch_size=2, batches_per_shard=1
)


def images() -> ArraySource:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    return ArraySource(pixels, np.repeat(np.arange(2), 4), [str(i) for i in range(8)])


def _keep(folder: Path, state) -> None:
    if jax.process_index() == 0:
        adapter_io.save(state, folder)


def main(folder: Path, port: str, process: int, count: int, base: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2 // count)
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, process)
    pipeline = load_pipeline(base)
    mesh = make_mesh(data=2)

    def adapt(path: Path) -> None:
        examples = encode_examples(pipeline, images(), PROMPTS, crops=1, seed=0)
        state = finetune(pipeline, examples, FINETUNE, path / ".dset", seed=0, mesh=mesh)
        _keep(path / "dset", state)
        sets = [examples.select(np.arange(4 * c, 4 * c + 4)) for c in range(2)]
        states = finetune_each(pipeline, sets, FINETUNE, path / ".cls", seed=0, mesh=mesh)
        for c, state in enumerate(states):
            _keep(path / str(c), state)

    adapters = run_stage("adapters", folder / "adapters", {}, {}, adapt, unlisted=(".*",))

    def generate(path: Path) -> dict:
        states = [
            adapter_io.load(adapters.path / str(c) / "pytorch_lora_weights.safetensors")
            for c in range(2)
        ]
        local = jax.local_devices()
        generator = Generator(
            pipeline,
            PROMPTS,
            GENERATE,
            seed=1,
            adapters=states,
            mesh=make_mesh(devices=local) if len(local) > 1 else None,
        )
        return {"images": fill_store(generator, path, "ab", PROMPTS, GENERATE, seed=1)}

    made = run_stage("images", folder / "images", {}, {"adapters": adapters}, generate)

    def classify(path: Path) -> None:
        clip = load_clip(Path(base) / "clip")
        model = train_classifier(
            clip,
            PROMPTS,
            CLASSIFY,
            path,
            images=8,
            seed=0,
            real=images(),
            synthetic=ImageStore(made.path),
            validation=images(),
            mesh=mesh,
        )
        logits = predict(clip, model, PROMPTS, images())
        np.save(path / f"logits{process}.npy", logits)

    run_stage("classifier", folder / "classifier", {}, {"images": made}, classify)


if __name__ == "__main__":
    folder, port, process, count, base = sys.argv[1:]
    main(Path(folder), port, int(process), int(count), base)
