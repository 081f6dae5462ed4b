"""Every method's smoke run is rehearsed: its stages, and the disk that each needs."""

import re

import pytest

from jaxsynth.cli.main import METHODS, method_module
from jaxsynth.runs.rehearsal import rehearse
from tests.methods.test_identity import smoke

pytestmark = pytest.mark.slow

# The folders of stages that write no more than lists and scores, and of one whose needs are known
# only when the stages before it are made.
SMALL = re.compile(
    r"(shots|figures|answers|routing|following|tokenizer|ablation|comparison|robustness|probe|kept"
    r"|alignment|chosen|measured)$"
    r"|^quality/|^measured-"
)
LATER = {"tiny_base": {"tiny"}}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_stage_is_listed_with_its_needs(method, tmp_path):
    workdir = tmp_path / "run"
    steps, unknown = rehearse(lambda: method_module(method).make(smoke(method), workdir))
    assert unknown == "" and not workdir.exists()
    assert len(steps) > 2 and {step.state for step in steps} == {"to do"}
    assert len({step.folder for step in steps}) == len(steps)
    for step in steps:
        name = step.folder.relative_to(workdir).as_posix()
        if name in LATER.get(method, ()):
            assert step.bytes is None
        else:
            assert step.bytes is not None and (step.bytes > 0) != bool(SMALL.search(name)), name
