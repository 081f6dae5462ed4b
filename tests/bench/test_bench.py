"""The benchmarks: both sides compute the same before anything is timed. No time is asserted."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxsynth.adapters.inject import layers
from jaxsynth.bench import run as bench
from jaxsynth.bench.cases import (
    adapters,
    attacks,
    corruptions,
    dit_train_step,
    generate,
    networks,
    routing,
    train_step,
)
from jaxsynth.bench.timing import Timing, Watch, alternate, busy_seconds, cores
from jaxsynth.core.errors import UsageError
from jaxsynth.diffusion.learned_range import variational_bound
from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise
from jaxsynth.weights.networks.dit import SCHEDULER
from tests.methods.small_base import DEEPER, TEXT, VAE


def printer(width: int = 80) -> Console:
    """Prints as the command does into a pipe."""
    return Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True)


PEERS = ("torch", "diffusers", "peft")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """The networks of the cases called tiny, smaller: what both sides compute is the same code."""
    half = networks.sd_shaped()
    small = networks.Networks(
        unet=DEEPER,
        vae=VAE,
        text_encoder=half.text_encoder | TEXT,
        scheduler=half.scheduler,
    )
    monkeypatch.setitem(networks.NETWORKS, "tiny", lambda: small)
    dit = replace(networks.tiny_dit(), num_layers=1, num_attention_heads=2, attention_head_dim=8)
    monkeypatch.setitem(networks.DITS, "tiny", lambda: dit)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("module", "case"),
    [
        pytest.param(
            train_step,
            replace(train_step.CASES[1], batch_size=2, adapters=2),
            marks=pytest.mark.slow,
        ),
        (generate, replace(generate.CASES[0], images=2, steps=3)),
        (generate, replace(generate.CASES[1], images=3, steps=2, adapters=2)),
    ],
    ids=["train-step-cls", "generate", "generate-cls"],
)
def test_smaller_cases_compute_the_same(module, case):
    for package in PEERS:
        pytest.importorskip(package)
    ours = module.build(case)
    found = [ours.step(), ours.step()]
    assert module.compare(ours, found, module.connect(ours)) < 1e-3


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "cases"),
    [("train-step", ("tiny",)), ("dit-train-step", ("tiny",)), ("supervised-step", ("tiny",))],
)
def test_both_sides_compute_the_same(name, cases, tmp_path):
    for package in PEERS:
        pytest.importorskip(package)
    out = printer()
    path = tmp_path / "figures.json"
    rows = bench.run(
        name,
        peer="torch",
        cases=cases,
        reps=1,
        shortest=0.0,
        json=path,
        console=out,
    )
    assert tuple(row.case for row in rows) == cases
    assert all(row.difference < 1e-3 and row.ratio > 0 for row in rows)
    figures = json.loads(path.read_text())
    assert figures["rows"][-1]["peer"]["seconds"] and "torch" in figures["versions"]
    assert "Largest difference of the two sides' results: " in out.file.getvalue()


@pytest.mark.slow
def test_an_accelerators_benchmark_runs_at_toy_size_here(monkeypatch):
    for package in PEERS:
        pytest.importorskip(package)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    out = printer(100)
    rows = bench.run("accelerator", peer="torch", reps=1, shortest=0.0, console=out)
    assert [row.case for row in rows] == bench.BENCHES["accelerator"].default()
    assert all(row.same_bits for row in rows)
    trained = [row for row in rows if row.work]
    assert len(trained) == 2 and all(row.difference < 3e-2 for row in trained)
    # No gradients of frozen weights: less than training all of them, more than the forward pass.
    for row in trained:
        assert row.work["full training"] / 3 < row.work["LoRA"] < row.work["full training"]
    assert [row.case for row in rows if row.peer is None] == ["toy-mlp", "toy-contrast"]
    text = out.file.getvalue()
    assert "GFLOP an image by LoRA's count" in text and "bfloat16" in text.splitlines()[0]


@pytest.mark.heavy
def test_foolbox_finds_the_same_images():
    pytest.importorskip("foolbox")
    out = printer()
    (row,) = bench.run("attacks", peer="foolbox", cases=("mlp",), reps=1, shortest=0.0, console=out)
    assert row.difference < 1e-3 and row.ratio > 0
    # The gradient to an image, and the hidden layers on the way.
    assert 32 * 32 * 3 * 4 <= row.memory < 10 * 32 * 32 * 3 * 4
    assert "foolbox" in out.file.getvalue()


@pytest.mark.parametrize("case", attacks.CASES, ids=lambda case: case.name)
def test_torch_has_the_same_classifier(case):
    torch = pytest.importorskip("torch")
    from jaxsynth.bench.peers.torch_classifiers import torch_network

    ours = attacks.build(replace(case, images=2))
    with torch.no_grad():
        images = torch.from_numpy(ours.images).permute(0, 3, 1, 2)
        expected = torch_network(ours)(images).numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(ours.predict(ours.images), expected, atol=2e-4)


def test_corruptions_are_compared_where_they_are_the_same():
    case = corruptions.CorruptionCase("two", ("contrast", "shot_noise"), images=2)
    ours = corruptions.build(case)
    found = [ours.step()]

    class Peer:
        level = 1

        def corrupt(self, name, image):
            moved = found[0][name][0] * 255 + self.level
            return np.floor(moved).astype(np.uint8)

    assert corruptions.compare(ours, found, Peer()) < 1e-6
    Peer.level = 3
    assert corruptions.compare(ours, found, Peer()) > 1.5 / 255
    alone = corruptions.build(replace(case, corruptions=("shot_noise",)))
    assert corruptions.compare(alone, found, Peer()) is None
    # At least the images that come out.
    assert 224 * 224 * 3 * 4 <= ours.memory < 10 * 224 * 224 * 3 * 4


def test_gradients_are_compared_one_by_one():
    theirs = {"a": np.array([3.0, 4.0]), "b": np.array([1e-2]), "none": np.zeros(2)}
    assert dit_train_step.gradient_difference(theirs, theirs) == 0.0
    # A small one that is off counts for itself, and rounding beside zero for nothing.
    off = theirs | {"b": np.array([1.5e-2]), "none": np.full(2, 1e-7)}
    assert dit_train_step.gradient_difference(off, theirs) == pytest.approx(0.005 / 0.015)


def test_torch_bounds_the_variance_alike_at_every_time():
    torch, diffusers = (pytest.importorskip(package) for package in PEERS[:2])
    from jaxsynth.bench.peers import torch_dit

    rng = np.random.default_rng(0)
    t = np.array([0, 0, 1, 10, 500, 999])
    x0, noise, prediction, v = rng.normal(size=(4, 6, 2, 2, 3)).astype(np.float32)
    x0[1] *= 0.1  # between the open bins of t = 0
    prediction[:2] = noise[:2] + 0.3 * prediction[:2]  # no bin of a probability near rounding
    schedule = NoiseSchedule.from_config(SCHEDULER)
    x_t = add_noise(schedule, jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(t))
    output = jnp.concatenate([prediction, v], axis=-1)
    ours = variational_bound(schedule, output, jnp.asarray(x0), x_t, jnp.asarray(t))
    tables = torch_dit.schedule_tables(diffusers.DDPMScheduler.from_config(SCHEDULER))
    arrays = [torch_dit.nchw(x) for x in (prediction, v, x0, x_t)]
    theirs = torch_dit.variational_bound(tables, *arrays, torch.from_numpy(t))
    np.testing.assert_allclose(ours, theirs.mean((1, 2, 3)), rtol=1e-4)


@pytest.mark.heavy
def test_a_mixed_batch_is_what_its_sets_draw_alone():
    out = printer()
    (row,) = bench.run("routing", cases=("tiny",), reps=1, shortest=0.0, console=out)
    assert row.difference < 1e-3 and row.peer is not None
    text = out.file.getvalue()
    table = [line for line in text.splitlines()[2:] if not line.startswith("XLA_FLAGS=")]
    assert max(map(len, table)) <= 80 and "overhead" in text
    with pytest.raises(UsageError, match="bench routing: compares two of our own programs"):
        bench.run("routing", peer="torch", console=out)


@pytest.mark.slow
def test_points_together_are_those_in_turn_and_methods_are_timed_beside_simclr():
    out = printer()
    (row,) = bench.run("points", cases=("tiny",), reps=1, shortest=0.0, console=out)
    assert row.difference < 1e-3 and row.images == 320
    (row,) = bench.run("clones", cases=("tiny synclr",), reps=1, shortest=0.0, console=out)
    assert row.difference is None and row.peer is not None
    assert "only their speed is compared: tiny synclr" in out.file.getvalue()


def test_an_image_with_another_set_is_noticed():
    case = replace(routing.CASES[0], images=3, steps=2)
    ours = routing.build(case)
    found = [ours.step()]
    one = routing.connect(ours)
    assert routing.compare(ours, found, one) < 1e-4
    ours.sets = ours.sets[::-1]
    assert routing.compare(ours, found, one) > 1e-2


ROW = bench.Row(
    "tiny-cls",
    "10 adapters, batch 8 each",
    images=80,
    first=123.4,
    ours=Timing((11.0, 12.0, 13.0)),
    peer=Timing((23.0, 24.0, 27.0)),
    difference=2e-5,
    others=0.01,
)


def shown(rows, name="train-step", peer="torch") -> str:
    out = printer()
    bench._show(out, name, rows, peer)
    return out.file.getvalue()


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["lokr"])
def test_kinds_are_timed_beside_lora_on_the_same_layers(kind):
    ours = adapters.build(adapters.AdapterCase("tiny", "tiny", kind, batch_size=2, rank=2))
    lora = adapters.connect(ours)
    assert set(layers(ours.adapted)) == set(layers(lora.adapted))
    assert float(ours.step()["loss"]) != float(lora.step()["loss"])
    assert adapters.compare(ours, [], lora) < 1e-4


def test_the_table_fits_a_pipe_of_80_columns():
    text = shown([ROW])
    assert max(map(len, text.splitlines())) <= 80
    # Nothing is cut, and nothing but what is meant to begins a new line.
    assert "…" not in text
    title, _, heading, _, _, first, second, note = text.splitlines()
    assert title == "bench train-step: median of 3 measurements, taken in turn"
    assert heading.split() == ["first"]
    assert " ".join(first.split()) == "tiny-cls 123.4 s 12000 ms ±8% 24000 ms ±8% 2.00x"
    assert second.split()[:5] == ["10", "adapters,", "batch", "8", "each"]
    assert " ".join(second.split()[5:]) == "6.7 images/s 3.3 images/s 2.00-2.09"
    assert note == "Largest difference of the two sides' results: 2e-05"
    routed = shown([replace(ROW, detail="48 images, 3 sets, 5 steps")], "routing", "").splitlines()
    assert max(map(len, routed)) <= 80 and "…" not in "".join(routed)
    assert routed[3].split() == ["case", "call", "mixed", "one", "set", "overhead"]
    assert routed[5].endswith("-50.0%") and routed[6].endswith("-52 to -50%")
    one_side = shown([replace(ROW, peer=None, difference=None)], peer="").splitlines()
    assert one_side[0] == "bench train-step: median of 3 measurements" and len(one_side) == 7


def test_the_table_shows_memory_and_what_is_not_compared():
    row = replace(ROW, case="glass_blur", detail="16 images", memory=2_610_000, difference=None)
    lines = shown([row, replace(row, case="contrast", difference=0.0)], "corruptions", "peer")
    lines = lines.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == ["first", "call"]
    assert lines[3].split() == ["case", "memory", "jaxsynth", "peer", "ratio"]
    assert lines[6].split()[:4] == ["16", "images", "2.6", "MB"]
    assert "Not the same by intent, so only their speed is compared: glass_blur" in lines[-1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"others": 0.45}, "other processes took 45% of the cores' time"),
        ({"ours": Timing((1.0, 2.0, 4.0))}, "the measurements of one side spread by ±75%"),
        ({"peer": Timing((1.0, 2.0, 4.0))}, "the measurements of one side spread by ±75%"),
    ],
)
def test_no_ratio_where_the_machine_was_busy(change, reason):
    row = replace(ROW, **change)
    assert ROW.disturbed == replace(ROW, others=None).disturbed == "" and row.disturbed == reason
    text = shown([row])
    assert (
        "busy" in text and f"{row.ratio:.2f}" not in text and max(map(len, text.split("\n"))) <= 80
    )
    assert f"tiny-cls: not compared, {reason}; run it on an idle machine" in bench._notes([row])
    assert bench._figures(row)["ratio"] is None and bench._figures(ROW)["ratio"] == 2.0


def test_time_of_other_processes():
    stat = (
        "cpu  9 9 9 9 9 9 9 9 0 0\n"
        "cpu0 100 20 30 9999 8888 5 6 39 50 0\n"
        "cpu1 1000 0 0 9999 8888 0 0 0 0 0\n"
        "intr 12345\n"
    )
    assert busy_seconds(stat, {0}, 100) == 2.0 and busy_seconds(stat, {0, 1}, 100) == 12.0
    assert busy_seconds(stat, {0, 2}, 100) is None and busy_seconds("", {0}, 100) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/stat")
def test_another_process_on_a_core_is_noticed():
    watch = Watch()
    # On every core, so that some of it is on ours whatever else runs.
    spin = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    children = [subprocess.Popen([sys.executable, "-c", spin]) for _ in cores()]
    assert [child.wait() for child in children] == [0] * len(children)
    assert watch.others() > 0.1


def test_each_side_is_measured_in_turn():
    made = []
    found = alternate(
        {"a": lambda: made.append("a"), "b": lambda: made.append("b")}, 3, shortest=0.0
    )
    assert made == ["a", "b"] + ["a", "b"] * 3
    assert [len(timing.seconds) for timing in found.values()] == [3, 3]


def test_ratio_is_that_of_medians_and_pairs_are_kept():
    ours, peer = Timing((1.0, 2.0, 4.0)), Timing((3.0, 3.0, 4.0))
    row = bench.Row("case", "", images=4, first=9.0, ours=ours, peer=peer, difference=0.0)
    assert row.ratio == 1.5 and row.ratios == [1.0, 1.5, 3.0]
    assert ours.spread == 0.75


def test_mistakes_are_named():
    with pytest.raises(UsageError, match=r"no case 'big', expected tiny, tiny-cls, sd-shaped"):
        bench.run("generate", cases=("big",), console=printer())
    with pytest.raises(UsageError, match="--peer=torch, expected foolbox or torchattacks"):
        bench.run("attacks", peer="torch", console=printer())
    with pytest.raises(UsageError, match="--reps is 0"):
        bench.run("train-step", reps=0, console=printer())


@pytest.mark.heavy
def test_a_missing_peer_says_what_to_install():
    code = (
        "import importlib, sys\n"
        "from jaxsynth.core.errors import UserError\n"
        "for module, missing in (('diffusers', 'peft'), ('foolbox', 'foolbox'),\n"
        "        ('torchattacks', 'torchattacks'), ('imagecorruptions', 'cv2')):\n"
        "    sys.modules[missing] = None\n"
        "    try:\n        importlib.import_module(f'jaxsynth.bench.peers.{module}')\n"
        "    except UserError as error:\n        print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line, package in zip(
        found.stdout.splitlines(), ("peft", "foolbox", "torchattacks", "cv2"), strict=True
    ):
        assert f"{package} is not installed (pip install" in line
