"""A whole study of a few steps: its points, views, page, and what happens where a part fails."""

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxsynth.core.config import load_config, override, to_dataclass
from jaxsynth.core.errors import UserError
from jaxsynth.data.names import safe_name
from jaxsynth.data.prompt_banks import PromptConfig
from jaxsynth.data.store import ImageStore
from jaxsynth.methods.scaling import run as scaling
from jaxsynth.methods.scaling.config import SourceConfig
from jaxsynth.methods.scaling.points import settings

CONFIG = Path(__file__).parents[3] / "configs" / "scaling.py"


def configured(*assignments: str) -> scaling.Config:
    values = override(
        load_config(f"{CONFIG}:smoke"), [tuple(one.split("=", 1)) for one in assignments]
    )
    return to_dataclass(scaling.Config, values)


def rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_study_trains_every_point_on_growing_views_and_goes_on_past_a_failure(
    tmp_path, base_folder, capsys
):
    # An adapter that diverges: its settings fail, real images and prompts do not.
    config = configured(
        f"base={base_folder}", "finetune.learning_rate=1e30", "finetune.steps=4",
        "clone_source=prompts", "judge.corruptions.names=contrast",
    )  # fmt: skip
    page = scaling.run(config, tmp_path)
    failed = rows(tmp_path / "failed.json")
    assert set(failed) == {"images of adapted", "adapted", "adapted + real", "adapted, mixed"}
    assert "not finite" in failed["adapted"]
    text = page.read_text()
    assert "What failed" in text and "not finite" in text

    found = rows(tmp_path / "results.json")
    wanted = {name: points for name, points in settings(config).items() if name not in failed}
    assert len(found) == sum(map(len, wanted.values()))
    assert all(0 <= row["error"] <= 1 for row in found)
    folder = tmp_path / safe_name("prompts + real") / "training"
    views = rows(folder / "views.json")
    store = ImageStore(tmp_path / "prompts" / "seed0" / "images")
    own = [view for view in views if view["seed"] == 0]
    for smaller, larger in itertools.pairwise(own):
        assert set(smaller["synthetic_ids"]) < set(larger["synthetic_ids"]) <= set(store.ids)
        assert smaller["real_ids"] == larger["real_ids"] and len(smaller["real_ids"]) == 2 * 4
    assert {entry.prompt for entry in store.entries} == {
        f"a photo of the digit {name}" for name in ("one", "four", "seven", "eight")
    }
    with open(tmp_path / "figures" / "error.csv") as file:
        numbers = list(csv.DictReader(file))
    assert {row["setting"] for row in numbers} == {"real", "prompts", "prompts + real"}
    clones = rows(tmp_path / "figures" / "clones.json")["rows"]
    assert {row["clone"] for row in clones} == {"synclr", "random start"}
    judged = rows(tmp_path / "figures" / "robustness.json")["rows"]
    assert {"accuracy", "ECE", "R_adv FGSM", "AUROC textures"} <= set(judged[0])
    assert {row["setting"] for row in judged} == {"real", "prompts", "prompts + real"}

    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("manifest.json")}
    scaling.run(config, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("manifest.json")} == before


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("sizes=1,2,9",), "generate.images_per_class: 4, but `sizes` asks for 9"),
        (("fractions=1.5",), "fractions"),
        (("fractions=()",), "mixed_size: 4 and fractions"),
        (("clone_source=nothing",), "clone_source: 'nothing', expected one of"),
        (("judge.sizes=7",), "judge.sizes"),
        (("seeds=1,1",), "seeds"),
    ],
)
def test_settings_that_cannot_be_are_refused(assignments, message):
    with pytest.raises(ValueError, match=message.split(":")[0]) as error:
        configured(*assignments)
    assert message in str(error.value)


def test_more_real_images_than_there_are_is_found_before_the_first_stage(tmp_path):
    with pytest.raises(UserError, match=r"500 shots asked for, but '1' has \d+"):
        scaling.run(configured("real_sizes=1,2,3,500"), tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_empty_bank_is_found_before_the_first_stage(tmp_path):
    (tmp_path / "captions.tsv").write_text("\n")
    prompts = PromptConfig({"caption": 1.0}, captions=str(tmp_path / "captions.tsv"))
    config = replace(configured(), sources={"prompts": SourceConfig(prompts)}, clones={},
                     clone_source="")  # fmt: skip
    with pytest.raises(UserError, match="an empty bank of prompts"):
        scaling.run(config, tmp_path / "run")


def test_the_order_of_points_is_settings_seeds_sizes():
    found = settings(configured())
    assert list(found) == [
        "real", "adapted", "adapted + real", "adapted, mixed", "prompts", "prompts + real",
        "prompts, mixed",
    ]  # fmt: skip
    assert [(p.seed, p.real) for p in found["real"]] == [
        (s, k) for s in (0, 1) for k in range(1, 5)
    ]
    (mixed, _) = found["adapted, mixed"]
    assert (mixed.real, mixed.synthetic) == (2, 2)
    np.testing.assert_array_equal([p.synthetic for p in found["prompts + real"][:4]], range(1, 5))
