"""The suite as a run: a classifier trained, asked and put on one page."""

import json
from pathlib import Path

import pytest

from jaxsynth.config import ConfigError, load_config, to_dataclass
from jaxsynth.errors import UserError
from jaxsynth.methods.robustness import Config, report, run

CONFIG = Path(__file__).parents[2] / "configs" / "robustness.py"


def smoke(**changes) -> Config:
    values = load_config(f"{CONFIG}:smoke")
    return to_dataclass(Config, {**values, **changes})


def test_a_run_ends_with_a_page_and_does_nothing_twice(tmp_path, capsys):
    page = run(smoke(), tmp_path)
    found = json.loads((tmp_path / "figures" / "figures.json").read_text())
    figures = found["models"]["corrected"]["original"]
    assert {"accuracy", "ECE", "AUROC textures", "R_adv PGD", "CB_3", "shape bias", "BG-Gap"} <= (
        figures.keys()
    )
    assert figures["accuracy"]["low"] <= figures["accuracy"]["value"] <= figures["accuracy"]["high"]
    # Both protocols made something of the same answers, and they are not the same.
    paper = found["models"]["paper"]["original"]
    assert paper.keys() < figures.keys() and paper["ECE"] != figures["ECE"]
    text = page.read_text()
    assert figures["BG-Gap"]["text"] in text and "negative entropy" in text
    capsys.readouterr()
    assert run(smoke(), tmp_path) == page == report(tmp_path)
    assert capsys.readouterr().out.count("unchanged, skipped") == 3


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="adapter and train_on: expected one of them at most"):
        smoke(models={"both": {"adapter": "a", "train_on": "original"}})
    with pytest.raises(ConfigError, match="models: expected at least one"):
        smoke(models={})
    with pytest.raises(UserError, match=r"models\.original: tiny/clip takes 32 pixels, config"):
        run(smoke(image_size=48), tmp_path)
