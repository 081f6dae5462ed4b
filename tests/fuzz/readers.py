"""Every reader of other people's files: a function that makes its cases in a folder."""

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import data_files, run_files, weight_files
from tests.fuzz.cases import Case

READERS: dict[str, Callable[[Path], list[Case]]] = {
    "torch": weight_files.torch_files,
    "safetensors": weight_files.safetensors,
    "adapters": weight_files.adapters,
    "tokenizers": weight_files.tokenizers,
    "configs": weight_files.configs,
    "networks": weight_files.networks,
    "pipelines": weight_files.pipelines,
    "images": data_files.images,
    "films": data_files.films,
    "faces": data_files.faces,
    "folders": data_files.folders,
    "shards": data_files.shards,
    "stores": data_files.stores,
    "lists": data_files.lists,
    "documents": run_files.documents,
    "arrays": run_files.arrays,
    "checkpoints": run_files.checkpoints,
}
