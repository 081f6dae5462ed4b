"""What stages read that no stage made, each identified by its content."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from jaxsynth.data.conditions import partner_digests
from jaxsynth.data.dataset import DataConfig, Dataset
from jaxsynth.data.load import load_dataset
from jaxsynth.data.views import joined
from jaxsynth.runs.stage import Source


def data_source(config: DataConfig) -> Source[Dataset]:
    """The data set that a config names."""
    return Source(lambda: load_dataset(config), lambda data: data.digest, lambda data: data.listing)


def joined_source(configs: Mapping[str, DataConfig]) -> Source[Dataset]:
    """Several data sets as one (`data.views.joined`)."""

    def load() -> Dataset:
        return joined({name: load_dataset(config) for name, config in configs.items()})

    return Source(load, lambda data: data.digest, lambda data: data.listing)


def condition_files(data: Source[Dataset], folder: str) -> Source[Path] | None:
    """The folder of a data set's condition images, identified by those files; None for "".

    Its digest raises UserError where the file of an image is missing.
    """
    if not folder:
        return None

    def listing(path: Path) -> dict[str, str]:
        parts = {"train": data.value.train, "test": data.value.test}
        return {
            f"{part}: {id_}": digest
            for part, source in parts.items()
            for id_, digest in partner_digests(source, path).items()
        }

    def digest(path: Path) -> str:
        return hashlib.sha256(json.dumps(list(listing(path).items())).encode()).hexdigest()

    return Source(lambda: Path(folder), digest, listing)
