"""Sets of images that begin with shots and are told by captions."""

import json

import numpy as np
import pytest

from jaxsynth.core.config import to_dataclass
from jaxsynth.data.dataset import DataConfig
from jaxsynth.data.sources.captioned import read_captions
from jaxsynth.data.store import ImageStore
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.methods.datadream.config import Config, SetConfig
from jaxsynth.methods.datadream.stages import Drawing, draw_shots
from jaxsynth.methods.image_sets import Generating, _of_another, generate_images
from jaxsynth.runs.sources import data_source, pipeline_source
from jaxsynth.runs.stage import Source


@pytest.mark.parametrize("counts", [(1, 1), (2, 3), (4, 2)])
def test_an_image_is_told_by_another_shot_of_its_class(counts):
    labels = np.repeat(np.arange(2), counts)
    choose = _of_another(labels)
    for label, count in enumerate(counts):
        seen: dict[int, set[int]] = {}
        for index in range(count * max(count - 1, 1)):
            caption = choose(label, index)
            assert labels[caption] == label
            seen.setdefault(index % count, set()).add(caption - sum(counts[:label]))
        for shot, captions in seen.items():
            assert captions == set(range(count)) - ({shot} if count > 1 else set())


@pytest.mark.slow
def test_captioned_images_begin_with_their_shot_and_have_anothers_text(base_folder, tmp_path):
    data = data_source(to_dataclass(DataConfig, {"source": "digits", "class_names": ("1", "7")}))
    lines = [json.dumps({"file_name": x, "text": f"number {x}"}) for x in data.value.train.ids]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    shots = draw_shots(tmp_path / "shots", Drawing(2, 0, 0.0), label="shots", data=data)
    given = {
        "data": data,
        "base": pipeline_source(str(base_folder)),
        "shots": shots,
        "captions": Source(
            lambda: read_captions(tmp_path / "texts.jsonl", data.value), lambda x: x.digest
        ),
    }
    generate = GenerateConfig(images_per_class=2, num_inference_steps=20, batch_size=4)
    config = Generating(generate, 0, "float32", strength=0.05)
    made = generate_images(tmp_path / "images", config, label="images", **given)
    store = ImageStore(made.path)
    drawn = json.loads((shots.path / "shots.json").read_text())["train"]
    told = {(x.label, x.index): x.prompt for x in store.entries}
    for label, ids in enumerate(drawn):
        assert [told[label, i] for i in range(2)] == [f"number {id_}" for id_ in reversed(ids)]
    assert made.counts["prompts"] == 4


def test_captioned_sets_need_captions():
    with pytest.raises(ValueError, match=r"sets.a.captioned: true, but the run has no `captions`"):
        Config(sets={"a": SetConfig(kind="edited", captioned=True)})
    with pytest.raises(ValueError, match="captioned: given, but a set of kind 'prompts' has none"):
        SetConfig(captioned=True)
