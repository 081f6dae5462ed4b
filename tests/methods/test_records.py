"""A run that goes on with another config has its page made from that config, for every method."""

import importlib
from dataclasses import replace

import pytest

from jaxsynth.cli.main import METHODS
from jaxsynth.core.config import to_dict
from jaxsynth.runs.record import read_record
from jaxsynth.runs.run import write_record
from tests.methods.test_identity import smoke

# Another value of a field that every config has.
SEEDS = {"seed": 7, "seeds": (7, 8)}


@pytest.mark.parametrize("method", METHODS)
def test_the_page_is_of_the_config_that_was_run(method, tmp_path, monkeypatch):
    module = importlib.import_module(METHODS[method])
    before = smoke(method)
    (field,) = (name for name in SEEDS if hasattr(before, name))
    after = replace(before, **{field: SEEDS[field]})
    write_record(tmp_path, method, before)
    seen = []

    def refused(config, workdir):
        raise ValueError("a stage is refused")

    def report(workdir):
        seen.append(read_record(workdir)["config"])
        return workdir / "report.html"

    # Stages take minutes; what is asked here is what the page finds.
    home = importlib.import_module(module.run.__module__)
    monkeypatch.setattr(home, "report", report, raising=False)
    monkeypatch.setattr(home, "make", refused)
    with pytest.raises(ValueError, match="a stage is refused"):
        module.run(after, tmp_path)
    assert read_record(tmp_path)["config"] == to_dict(before) and not seen
    monkeypatch.setattr(home, "make", lambda config, workdir: None)
    module.run(after, tmp_path)
    assert read_record(tmp_path)["config"] == to_dict(after)
    # The base that `tiny_base` makes has a card, but no page.
    assert seen == ([] if method == "tiny_base" else [to_dict(after)])
