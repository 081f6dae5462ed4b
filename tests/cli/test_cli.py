"""The command: what it prints, how it exits, and that a mistake is one line that names it."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import absl.logging
import jax
import PIL.Image
import pytest

import jaxsynth.core.errors
from jaxsynth.cli import main as cli
from jaxsynth.cli.failures import is_for_users
from jaxsynth.core import preemption
from jaxsynth.data.decode import decode_image
from jaxsynth.runs.stage import run_stage

REPOSITORY = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Part:
    file: str = ""


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 2
    part: Part = dataclasses.field(default_factory=Part)


def run(config, workdir):
    """A real method of one stage."""
    if config.part.file == "bug":
        return {}["bug"]
    if config.part.file == "full":
        try:
            os.write(os.open("/dev/full", os.O_WRONLY), b"x")
        except OSError as error:  # as libraries in C++ pass it on
            raise RuntimeError(f"INTERNAL: write: {os.strerror(error.errno)}") from error
    if config.part.file == "memory":
        return jax.numpy.zeros(1 << 45)
    if config.part.file == "jax":
        return jax.numpy.zeros(2) + jax.numpy.zeros(3)
    if config.part.file:
        return Path(config.part.file).read_text()
    if config.steps == 3:
        raise jaxsynth.core.errors.UserError("three is refused")
    make(config, workdir)
    return workdir / "count"


def make(config, workdir):
    """Its stage, which needs a megabyte a step."""
    run_stage(
        "count", workdir / "count", config, {}, lambda folder: {"steps": config.steps},
        needs=lambda: config.steps * 10**6,
    )  # fmt: skip


def report(workdir):
    return workdir / "report.html"


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Calls the command in `tmp_path` and returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXSYNTH_CACHE", "off")
    monkeypatch.setenv("COLUMNS", "300")
    method = types.SimpleNamespace(Config=Config, make=make, run=run, report=report)
    monkeypatch.setitem(sys.modules, "counting_method", method)
    monkeypatch.setitem(cli.METHODS, "counting", "counting_method")
    monkeypatch.setattr(cli, "REPORTS", ("counting",))
    Path("counting.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(variant='full'):\n"
        "    return ConfigDict({'method': 'counting', 'steps': 5}).lock()\n"
    )

    def call(*argv):
        code = cli.main(argv)
        return code, *capfd.readouterr()

    return call


RUN = ("run", "--config=counting.py", "--workdir=w")


def test_run_then_again_then_report(command):
    code, out, err = command(*RUN, "--config.steps=1", "--config.part.file", "")
    assert (code, err) == (0, "") and "count" in out and "steps 1" in out
    assert "Done in" in out and "w/count" in out
    record = json.loads(Path("w/run.json").read_text())
    assert record["method"] == "counting"
    assert record["config"] == {"steps": 1, "part": {"file": ""}}
    code, out, _ = command(*RUN, "--config.steps=1")
    assert code == 0 and "unchanged, skipped" in out
    code, _, err = command(*RUN)
    assert code == 1 and "config.steps: 1 -> 5" in err and "Traceback" not in err
    assert json.loads(Path("w/run.json").read_text())["config"]["steps"] == 1
    code, out, _ = command("report", "w")
    assert code == 0 and out.strip() == "w/report.html"


def test_a_run_goes_on_from_its_mirror(command, tmp_path):
    mirror = f"--mirror=file://{tmp_path}/bucket/runs"
    argv = (*RUN, "--config.steps=1", mirror)
    assert command(*argv)[0] == 0
    shutil.rmtree("w")
    code, out, err = command(*argv)
    assert (code, err) == (0, "") and "unchanged, skipped" in out
    assert f"files of file://{tmp_path}/bucket/runs fetched into w" in out
    assert json.loads(Path("bucket/runs/run.json").read_text())["config"]["steps"] == 1
    # A run that is refused leaves the copy as it is.
    code, _, err = command(*RUN, mirror)
    assert code == 1 and "config.steps: 1 -> 5" in err


def test_a_dry_run_lists_stages_and_makes_nothing(command, monkeypatch):
    argv = ("run", "--config=counting.py", "--workdir=runs/a")
    code, out, err = command(*argv, "--dry-run")
    assert code == 0 and "to do" in out and "To be made: at most 5 MB; free at runs/a" in out, err
    assert not Path("runs").exists()
    small = shutil.disk_usage(".")._replace(free=10**6)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: small)
        code, _, err = command(*argv, "--dry-run")
        assert code == 1 and err.count("\n") == 1
        assert "the run needs 5 MB of disk at the most, and 1 MB are free" in err
    assert command(*argv)[0] == 0
    code, out, _ = command(*argv, "--dry-run")
    assert code == 0 and "finished" in out and "To be made: at most 0 bytes" in out


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ((), 2, "required: VERB (see jaxsynth --help)"),
        (("rnu",), 2, "invalid choice: 'rnu'"),
        (("run", "--workdir=w"), 2, "required: --config (see jaxsynth run --help)"),
        (("run", "--config=counting.py"), 2, "required: --workdir"),
        (
            ("run", "--config=counting.py", "--workdir=gs://b/runs"),
            2,
            "argument --workdir: 'gs://b/runs' is an address, expected a path here; mount the "
            "bucket (gcsfuse BUCKET DIR) and give DIR, or have a run copied there by --workdir=DIR "
            "--mirror=gs://b/runs",
        ),
        ((*RUN, "--mirror=runs/copy"), 2, "'runs/copy' is no address, expected one such as gs://"),
        ((*RUN, "--mirror=gs://"), 2, "'gs://' is no address"),
        ((*RUN, "--mirror=gs://b/x", "--dry-run"), 2, "--dry-run fetches nothing: leave --mirror"),
        ((*RUN, "--mirror=nosuch://b/x"), 2, "--mirror=nosuch://b/x: Protocol not known: nosuch"),
        ((*RUN, "--reuse=s3://b/runs"), 2, "--reuse: 's3://b/runs' is an address, expected a path"),
        (
            ("generate", "--base=tiny", "--prompt=x", "--out=gs://b/x"),
            2,
            "'gs://b/x' is an address",
        ),
        (("convert", "tiny", "gs://b/x", "--to=comfyui"), 2, "'gs://b/x' is an address"),
        (("report", "gs://b/runs"), 2, "'gs://b/runs' is an address"),
        ((*RUN, "--wrokdir=x"), 2, "unknown argument --wrokdir=x; did you mean --workdir=x?"),
        (
            ("run", "--config=counting.py", "--wrokdir=x"),
            2,
            "unknown argument --wrokdir=x; did you mean --workdir=x?",
        ),
        ((*RUN, "--wrokdir", "x"), 2, "--wrokdir; did you mean --workdir? (see jaxsynth run"),
        (("run", "-config=counting.py"), 2, "did you mean --config=counting.py?"),
        (("run", "counting.py:a"), 2, "counting.py:a; did you mean --config=counting.py:a?"),
        ((*RUN, "config.steps=1"), 2, "config.steps=1; did you mean --config.steps=1?"),
        ((*RUN, "--steps=1"), 2, "a field of the config is set by --config.steps=1"),
        ((*RUN, "--dry_run"), 2, "--dry_run; did you mean --dry-run?"),
        (("report", "--workdir=w"), 2, "--workdir=w; did you mean w, without a flag?"),
        (("fields", "--config=counting.py"), 2, "did you mean counting.py, without a flag?"),
        (("convert", "a", "b", "--format=peft"), 2, "unknown argument --format=peft (see jaxs"),
        (
            ("run", "--config=counting.py", "--workdir="),
            2,
            "--workdir: is empty, expected a path (. is the current folder)",
        ),
        (("report", ""), 2, "argument WORKDIR: is empty"),
        (("convert", "", "b", "--to=peft"), 2, "argument SRC: is empty"),
        ((*RUN, "--reuse=gone", "--dry-run"), 2, "--reuse=gone: there is no such folder"),
        (("run", "--config=", "--workdir=w"), 2, "the config's name is empty, expected FILE"),
        (("fields", "."), 2, "'.' is a folder, expected a Python file; ./ holds counting.py"),
        (("fields", "counting:full"), 2, "'counting' does not exist; did you mean counting.py?"),
        (("run", "--config=counting.yp", "--workdir=w"), 2, "'counting.yp' does not exist"),
        ((*RUN, "--config.stesp=1"), 2, "config.stesp: no such field; did you mean steps?"),
        ((*RUN, "--config.part.fil=1"), 2, "config.part.fil: no such field; did you mean file?"),
        ((*RUN, "--config.steps=many"), 2, "config.steps='many': expected an integer"),
        ((*RUN, "--config.steps"), 2, "--config.steps needs a value"),
        (
            (*RUN, "--config.steps=1", "--config.steps", "2"),
            2,
            "--config.steps is given twice, as '1' and '2'",
        ),
        ((*RUN, "--workdir", "v"), 2, "--workdir is given twice, as 'w' and 'v'"),
        ((*RUN, "--config=b.py"), 2, "--config is given twice, as 'counting.py' and 'b.py'"),
        (
            ("plan", "--config=a.py", "--topology=v5e:2x2", "--topology=v5e:4x4"),
            2,
            "--topology is given twice, as 'v5e:2x2' and 'v5e:4x4'",
        ),
        (("convert", "a", "b", "--to=peft", "--to=kohya"), 2, "--to is given twice, as 'peft' and"),
        (("bench", "attacks", "--reps=1", "--reps=2"), 2, "--reps is given twice, as '1' and '2'"),
        (
            ("generate", "--base=tiny", "--prompt=x", "--prompt=y", "--out=a", "--out", "b"),
            2,
            "--out is given twice, as 'a' and 'b'",
        ),
        ((*RUN, "--config.=1"), 2, "expected --config.FIELD=VALUE"),
        ((*RUN, "--config.method=datadream"), 2, "--config.method: the config file decides"),
        ((*RUN, "--num_processes=2"), 2, "needs --coordinator_address and --process_id too"),
        ((*RUN, "--num_processes=two"), 2, "argument --num_processes: invalid int value: 'two'"),
        (("report", "w"), 2, "w does not exist: run.json is missing"),
        (("report", "counting.py"), 2, "counting.py is a file, not a run's folder: run.json is m"),
        (("report", "w", "--config.steps=1"), 2, "only `jaxsynth run` and `jaxsynth plan` have"),
        ((*RUN, "--config.steps=3"), 1, "three is refused"),
        ((*RUN, "--config.part.file=gone.txt"), 1, "gone.txt: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(command, argv, code, message):
    found, _, err = command(*argv)
    assert found == code and message in err, err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_folder_near_a_run_names_the_run(command):
    command(*RUN)
    Path("other").mkdir()
    for folder in ("w/count", "w/cuont"):
        code, _, err = command("report", folder)
        assert code == 2 and f"there is a run at {Path('w').absolute()}" in err, err
    code, _, err = command("report", ".")
    assert code == 2 and "there is a run at w\n" in err, err
    code, _, err = command("report", "other")
    assert code == 2 and err.endswith("run.json is missing\n"), err


def test_a_full_disk_is_one_line(command):
    code, _, err = command(*RUN, "--config.part.file=full")
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("error: no space left on the disk") and "the same command goes on" in err


def test_a_bug_keeps_its_traceback(command):
    code, _, err = command(*RUN, "--config.part.file=bug")
    assert code == 1 and "KeyError: 'bug'" in err and "Traceback" in err
    code, _, err = command(*RUN, "--config.part.file=jax")
    assert code == 1 and "Traceback" in err
    code, _, err = command("--debug", *RUN, "--config.steps=3")
    assert code == 1 and "UserError: three is refused" in err and "Traceback" in err


def test_what_libraries_tell_their_developers_is_not_shown(command):
    command(*RUN)
    absl.logging.warning("Waiting for previous save to complete took 5 seconds")
    code, out, err = command(*RUN)
    assert code == 0 and "Waiting" not in out + err
    exif = b"Exif\0\0II*\0\x08\0\0\0\x03\0\x0f\x01\x02\0"  # ends in its first entry
    PIL.Image.new("RGB", (8, 8)).save("photo.jpg", exif=exif)
    cli.main(RUN)
    assert decode_image(Path("photo.jpg")).shape == (8, 8, 3)


def test_too_little_memory_is_no_bug(command):
    code, _, err = command(*RUN, "--config.part.file=memory")
    assert code == 1 and "Traceback" not in err
    assert "error: out of memory (RESOURCE_EXHAUSTED: Out of memory" in err
    assert "batch_size" in err and err.count("\n") == 1


def test_a_workdir_of_another_method_is_refused(command):
    Path("w").mkdir()
    Path("w/run.json").write_text('{"method": "datadream", "config": {}}')
    code, _, err = command(*RUN)
    assert code == 2 and "w holds a run of method datadream, this config is for counting" in err
    Path("other.py").write_text("def get_config():\n    return {'method': 'datadraem'}\n")
    code, _, err = command("run", "--config=other.py", "--workdir=x")
    assert code == 2 and "other.py: method='datadraem', expected one of controlled, cust" in err


def test_a_damaged_record_says_what_to_do(command):
    Path("w").mkdir()
    Path("w/run.json").write_text('{"method": "count')
    for argv in (RUN, ("report", "w")):
        code, _, err = command(*argv)
        assert code == 1 and "w/run.json: not valid JSON" in err
        assert "remove it, and the same `jaxsynth run` command writes it again" in err


def test_an_error_with_a_note_of_jax_is_no_users_error():
    error = ValueError("shapes")
    error.add_note("For simplicity, JAX has removed its internal frames from the traceback.")
    assert not is_for_users(error)


def test_compile_cache_follows_the_environment(monkeypatch, tmp_path):
    before = (
        jax.config.jax_compilation_cache_dir,
        (jax.config.jax_persistent_cache_min_compile_time_secs),
    )
    try:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        monkeypatch.setenv("JAXSYNTH_CACHE", "off")
        cli._enable_compile_cache()
        assert jax.config.jax_compilation_cache_dir == before[0]
        monkeypatch.setenv("JAXSYNTH_CACHE", str(tmp_path))
        cli._enable_compile_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        monkeypatch.delenv("JAXSYNTH_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        cli._enable_compile_cache()
        expected = str(tmp_path / "jaxsynth" / "programs")
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_help_reads_well_and_does_not_wait_for_jax():
    code = "import sys; from jaxsynth.cli import main as cli\n"
    code += "try:\n cli.main(['run', '--help'])\nfinally:\n"
    code += " print('jax' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert "--config.FIELD=VALUE" in done.stdout and done.stdout.endswith("False\n")
    assert max(map(len, done.stdout.splitlines())) <= 100


_TWO = """
import dataclasses, itertools, os, sys, types
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 1)
from jaxsynth.cli import main as cli
from jaxsynth.core.errors import UserError

@dataclasses.dataclass(frozen=True)
class Config:
    value: float = 0.0

def run(config, workdir):
    from jax.experimental.multihost_utils import process_allgather
    for turn in itertools.count() if config.value < 0 else ():
        process_allgather(np.float32(turn))
        if turn == 3 and jax.process_index() == 1:
            if config.value == -1:
                raise UserError("three is refused")
            os._exit(9)
    total = process_allgather(np.float32(config.value * (1 + jax.process_index()))).sum()
    (workdir / f"{jax.process_index()}.txt").write_text(f"{jax.process_count()} {total}")

sys.modules["two_method"] = types.SimpleNamespace(Config=Config, run=run)
cli.METHODS["two"] = "two_method"
sys.exit(cli.main(sys.argv[1:]))
"""


def run_two(folder, value):
    """Codes and outputs of two processes, and the seconds that they took."""
    (folder / "two.py").write_text("def get_config():\n    return {'method': 'two'}\n")
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "JAXSYNTH_CACHE": "off",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-c", _TWO, "run", "--config=two.py", "--workdir=w"]
    processes = [
        subprocess.Popen(
            [*command, f"--config.value={value}"],
            cwd=folder,
            env={**environment, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


@pytest.mark.multiprocess
def test_two_processes_meet_by_the_environment(tmp_path):
    codes, outputs = run_two(tmp_path, 2)
    assert codes == [0, 0], outputs
    assert [(tmp_path / "w" / f"{i}.txt").read_text() for i in range(2)] == ["2 6.0"] * 2
    assert "2 x cpu: two in w" in outputs[0][0]
    assert "jaxsynth" not in outputs[1][0] and "Done" not in outputs[1][0]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("value", "code", "told"), [(-1, 1, "error: three is refused"), (-2, 9, "")]
)
def test_when_a_process_ends_the_other_ends_with_a_sentence(tmp_path, value, code, told):
    """By an error of its own, and without a word; JAX alone would wait for minutes, then abort."""
    codes, outputs = run_two(tmp_path, value)
    assert codes == [1, code], outputs
    assert "error: another process of this run has ended, or cannot be reached" in outputs[0][1]
    assert told in outputs[1][1]
    assert not any("Traceback" in text or "stack trace" in text for _, text in outputs), outputs


def test_sigterm_saves_and_exits_with_its_own_code(command, monkeypatch):
    """As SLURM and Kubernetes send it; the code is 128 + 15."""
    monkeypatch.setattr(preemption, "_asked", threading.Event())
    before = signal.getsignal(signal.SIGTERM)

    def stops(config, workdir):
        os.kill(os.getpid(), signal.SIGTERM)
        preemption.stop_if_requested("before step 7")

    monkeypatch.setattr(sys.modules["counting_method"], "run", stops)
    try:
        code, _, err = command(*RUN)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 143 and "stopped on SIGTERM before step 7; what was made is kept" in err
