"""The weights that a DiffScaler run reads: the base, its autoencoder, and features' networks."""

import dataclasses

from jaxsynth.methods.diffscaler.config import Config
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.quality.features import FeatureExtractor, clip_extractor, inception_extractor
from jaxsynth.runs.stage import Artifact, Source
from jaxsynth.weights import hub
from jaxsynth.weights.models import load_model
from jaxsynth.weights.networks.dit import DiTPipeline, load_dit


def vae_folder(name: str):
    """Where an autoencoder's files are: a pipeline's own, or a folder of its own."""
    folder = hub.resolve(name)
    inner = folder / "vae"
    return inner if inner.is_dir() else folder


def vae_source(config: Config) -> Source[AutoencoderKL]:
    """The autoencoder that `config.vae` names."""
    return Source(
        lambda: load_model(AutoencoderKL, AutoencoderKLConfig, vae_folder(config.vae)),
        lambda _: hub.digest(hub.weight_files(vae_folder(config.vae))),
    )


def given_base(config: Config, vae: Source[AutoencoderKL]) -> Source[DiTPipeline]:
    """The base that `config.base` names, with `vae` where it brings no autoencoder."""

    def load() -> DiTPipeline:
        pipeline = load_dit(config.base, config.dtype, compute_dtype=config.dtype)
        if pipeline.vae is not None:
            return pipeline
        digest = f"{pipeline.digest} {vae.digest}"
        return dataclasses.replace(pipeline, vae=vae.value, digest=digest)

    return Source(load, lambda pipeline: f"{pipeline.digest} {config.dtype}")


def trained_base(
    stage: Artifact, config: Config, vae: Source[AutoencoderKL]
) -> Source[DiTPipeline]:
    """The base that a run's first stage trained, loaded once for all others."""

    def load() -> DiTPipeline:
        stage.verify()
        pipeline = load_dit(stage.path, config.dtype, compute_dtype=config.dtype)
        return dataclasses.replace(pipeline, vae=vae.value)

    return Source(load, f"{stage.digest} {config.dtype}")


def features_source(name: str) -> Source[FeatureExtractor]:
    """A CLIP's image tower, or "inception:PATH"."""

    def load() -> FeatureExtractor:
        kind, _, path = name.partition(":")
        return inception_extractor(path) if kind == "inception" and path else clip_extractor(name)

    return Source(load, lambda found: f"{found.digest} {found.preprocessing}")
