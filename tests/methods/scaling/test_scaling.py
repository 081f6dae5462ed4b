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
from jaxsynth.quality.filters import FilterConfig

CONFIG = Path(__file__).parents[3] / "configs" / "scaling.py"


def configured(*assignments: str) -> scaling.Config:
    values = override(
        load_config(f"{CONFIG}:smoke"), [tuple(one.split("=", 1)) for one in assignments]
    )
    return to_dataclass(scaling.Config, values)


def store_ids(folder: Path, seed: int) -> list[str]:
    return list(ImageStore(folder / "prompts" / f"seed{seed}" / "images").ids)


def rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_study_trains_every_point_on_growing_views_and_goes_on_past_failures(
    tmp_path, base_folder, capsys
):
    (tmp_path / "captions.tsv").write_text("\n")
    config = configured(
        f"base={base_folder}", "finetune.learning_rate=1e30", "finetune.steps=4",
        "clone_source=prompts", "judge.corruptions.names=contrast", "mixed_size=0", "fractions=()",
    )  # fmt: skip
    template, captions = PromptConfig(), str(tmp_path / "captions.tsv")
    more = {
        "few": SourceConfig(template, keep=FilterConfig(most=2)),
        "strict": SourceConfig(template, keep=FilterConfig(least_share=0.9999)),
        "empty": SourceConfig(PromptConfig({"caption": 1.0}, captions=captions)),
    }
    config = replace(config, sources={**config.sources, **more})
    workdir = tmp_path / "run"
    page = scaling.run(config, workdir)
    failed, tmp_path = rows(workdir / "failed.json"), workdir
    # What fails, and a part of the one line that says why.
    bad = {
        "images of adapted": "not finite",  # its training diverges, which fails what needs it
        "adapted": "not finite",
        "adapted + real": "not finite",
        "strict": "strict: class '1' has 0 images, 1 are asked for",
        "strict + real": "strict: class '1' has 0 images",
        "images of empty": "an empty bank of prompts",
        "empty": "an empty bank of prompts",
        "empty + real": "an empty bank of prompts",
        **{
            f"few{real}: {2 * bool(real)} real, {n} synthetic, seed {s}": f"has 2 images, {n} are"
            for real in ("", " + real") for n in (3, 4) for s in (0, 1)
        },
    }  # fmt: skip
    assert failed.keys() == bad.keys()
    text = page.read_text()
    assert "What failed" in text
    for what, why in bad.items():
        assert why in failed[what] and "\n" not in failed[what]
        assert what.replace("'", "&#x27;") in text

    found = rows(tmp_path / "results.json")
    wanted = {name: points for name, points in settings(config).items() if name not in failed}
    assert len(found) == sum(map(len, wanted.values())) - sum(": " in name for name in failed)
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
    curves = {"real", "prompts", "prompts + real", "prompts, practiced", "few", "few + real"}
    assert {row["setting"] for row in numbers} == curves
    clones = rows(tmp_path / "figures" / "clones.json")["rows"]
    assert {row["clone"] for row in clones} == {"synclr", "random start"}
    judged = rows(tmp_path / "figures" / "robustness.json")["rows"]
    assert {"accuracy", "ECE", "R_adv FGSM", "AUROC textures"} <= set(judged[0])
    assert {row["setting"] for row in judged} == curves
    held = rows(tmp_path / "figures" / "observations.json")["rows"]
    assert {"real", "prompts", "few"} & {row["source"] for row in held}
    assert all(row["low"] <= row["difference"] <= row["high"] for row in held)
    spent = rows(tmp_path / "figures" / "cost.json")["rows"]
    assert len(spent) == len(found) and all(row["device_seconds"] > 0 for row in spent)
    seen = rows(tmp_path / "figures" / "recognisability.json")["rows"]
    assert {row["source"] for row in seen} == {"prompts", "few", "strict"}
    assert all(0 <= row["recognisability"] <= 1 and 0 < row["diversity"] < 1 for row in seen)
    for name in ("cost", "recognisability", "robustness_against_size", "claims", "worth"):
        assert (tmp_path / "figures" / f"{name}.csv").is_file()

    # Practice takes, of each class, what the size before was least certain of.
    for seed in config.seeds:
        rounds = [
            next(
                view["synthetic_ids"]
                for view in rows(tmp_path / safe_name("prompts, practiced") / f"round{i}/training"
                                 / "views.json")
                if view["seed"] == seed
            )
            for i in range(4)
        ]  # fmt: skip
        for smaller, larger in itertools.pairwise(rounds):
            assert set(smaller) < set(larger) <= set(store_ids(tmp_path, seed))
    assert any(set(rounds[-1]) != set(view["synthetic_ids"]) for view in own[-1:])

    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("manifest.json")}
    scaling.run(config, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("manifest.json")} == before


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("sizes=1,2,9",), "generate.images_per_class: 6, but `sizes` asks for 9"),
        (("fractions=1.5",), "fractions"),
        (("fractions=()",), "mixed_size: 4 and fractions"),
        (("clone_source=nothing",), "clone_source: 'nothing', expected one of"),
        (("judge.sizes=7",), "judge.sizes"),
        (("practice=nothing",), "practice: 'nothing', expected some of"),
        (("sizes=1,2,3,6",), "practice: prompts: chooses the largest size, 6, of all images"),
        (("measured=7",), "measured: 7, more than are generated"),
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


def test_the_order_of_points_is_settings_seeds_sizes():
    found = settings(configured())
    assert list(found) == [
        "real", "adapted", "adapted + real", "adapted, mixed", "prompts", "prompts + real",
        "prompts, practiced", "prompts, mixed",
    ]  # fmt: skip
    assert [(p.seed, p.real) for p in found["real"]] == [
        (s, k) for s in (0, 1) for k in range(1, 5)
    ]
    (mixed, _) = found["adapted, mixed"]
    assert (mixed.real, mixed.synthetic) == (2, 2)
    np.testing.assert_array_equal([p.synthetic for p in found["prompts + real"][:4]], range(1, 5))
