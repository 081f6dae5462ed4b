"""The `jaxsynth` command. It parses, calls and prints; what a verb does lives in the library.

Exit codes: 0 success, 1 a run that failed, 2 a wrong command line or config, 130 interrupted, 143
stopped by SIGTERM with its work saved. An error that a user can act on is one line; any other keeps
its traceback, because it is a bug.
"""

import argparse
import gc
import importlib
import os
import shlex
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.text import Text as RichText

import jaxsynth
from jaxsynth.cli import generate as generate_verb
from jaxsynth.cli import plan as plan_verb
from jaxsynth.cli import rehearsal as rehearsal_verb
from jaxsynth.cli.failures import is_for_users, message
from jaxsynth.cli.parser import parse, take_assignments
from jaxsynth.core.checks import check_config
from jaxsynth.core.errors import UsageError, UserError
from jaxsynth.core.places import check_places
from jaxsynth.core.preemption import EXIT_CODE, Preempted, install

# The module that runs a method has `Config` (frozen dataclasses), `make(config, workdir)`, which
# makes its stages, `run(config, workdir)`, which also writes its page, and
# `plan(config, mesh)`, which returns the `training.planning.Program`s that a run starts; those of
# REPORTS also have `report(workdir)`, and those of COMPARISONS `compare(workdirs)`, a page of
# several runs. They are imported on use: `--help` should not wait for JAX.
METHODS = {
    name: f"jaxsynth.methods.{name}.run"
    for name in (
        "controlled", "customize", "datadream", "diffscaler", "robustness", "scaling", "tiny_base",
        "weightgen",
    )
}  # fmt: skip
REPORTS = (
    "controlled", "customize", "datadream", "diffscaler", "robustness", "scaling", "weightgen",
)  # fmt: skip
COMPARISONS = ("datadream",)

# Seconds that processes wait for the last to start, and after which a silent one counts as dead
# and the others end.
_SLOWEST_START, _LONGEST_SILENCE = 600, 40


def method_module(name: str) -> ModuleType:
    """The module that runs a method."""
    if METHODS[name] in sys.modules:
        return sys.modules[METHODS[name]]
    collects = gc.isenabled()
    # What is imported stays; looking through it for garbage takes a second of seven, and again
    # whenever a program is traced.
    gc.disable()
    try:
        module = importlib.import_module(METHODS[name])
        gc.freeze()
        return module
    finally:
        if collects:
            gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    debug = "--debug" in argv
    try:
        rest, assignments = take_assignments([arg for arg in argv if arg != "--debug"])
        args = parse(rest)
        if assignments and args.verb not in ("run", "plan", "fields"):
            raise UsageError(
                f"--config.{assignments[0][0]}: only `jaxsynth run` and `jaxsynth plan` have "
                "config fields"
            )
        args.assignments, args.argv = assignments, argv
        _prepare_libraries()
        VERBS[args.verb](args)
    except KeyboardInterrupt:
        errors.print(
            "Interrupted. The same command goes on where this one stopped.", style="yellow"
        )
        return _left(130)
    except Preempted as error:
        errors.print(RichText(str(error), "yellow"))
        return EXIT_CODE
    except Exception as error:
        if debug or not is_for_users(error):
            traceback.print_exc()
            if not debug:
                errors.print(RichText("The error above is a bug in jaxsynth or below it.", "red"))
        else:
            errors.print(RichText(f"error: {message(error)}", "red"))
        return _left(2 if isinstance(error, UsageError) else 1)
    return 0


def _left(code: int) -> int:
    """The exit code; one of several processes ends here, at once.

    JAX would hold it until all others end, too, while they wait for it in a collective.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def run(args: argparse.Namespace) -> None:
    """`jaxsynth run`: starts a run, or goes on with it."""
    name, method, config = _configured(args)
    check_config(config, args.workdir)
    _check_places(config, args)
    from jaxsynth.runs import reuse

    reuse.look_in(args.reuse)
    if args.dry_run:
        if args.mirror:
            raise UsageError("--dry-run fetches nothing: leave --mirror out")
        _is_known(args.workdir, name)
        rehearsal_verb.rehearse(method, config, args.workdir)
        return
    _enable_compile_cache()
    _start_processes(args)
    import jax

    from jaxsynth.core.console import console, duration, set_quiet
    from jaxsynth.runs.mirror import mirrored
    from jaxsynth.runs.run import COMMAND, write_record

    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
        install()
    first = jax.process_index() == 0
    set_quiet(not first)
    workdir = args.workdir
    COMMAND.set(shlex.join(["jaxsynth", *args.argv]))
    with mirrored(workdir, args.mirror):
        if not _is_known(workdir, name) and first:
            write_record(workdir, name, config)

        devices = jax.devices()
        console.print(
            f"jaxsynth {jaxsynth.__version__}, JAX {jax.__version__}, {len(devices)} x "
            f"{devices[0].device_kind}: {name} in {workdir}",
            markup=False,
        )
        began = time.monotonic()
        result = method.run(config, workdir)
        where = f": {result}" if isinstance(result, Path) else ""
        console.print(f"Done in {duration(time.monotonic() - began)}{where}", markup=False)


def _is_known(workdir: Path, name: str) -> bool:
    """Whether a folder holds a run already; UsageError where it is of another method."""
    from jaxsynth.runs.record import RUN_FILE, read_record

    known = (workdir / RUN_FILE).is_file()
    if known and (there := read_record(workdir)["method"]) != name:
        raise UsageError(f"{workdir} holds a run of method {there}, this config is for {name}")
    return known


def plan(args: argparse.Namespace) -> None:
    """`jaxsynth plan`: what a config's programs need, on devices that need not be there."""
    _values(args)
    plan_verb.plan(args, _configured, _enable_compile_cache)


def report(args: argparse.Namespace) -> None:
    """`jaxsynth report`: writes the page of each run again from what the run left.

    Of several runs of one method that has such a page, also one of them side by side.
    """
    from jaxsynth.core.console import console
    from jaxsynth.runs.record import read_record

    names = [read_record(workdir)["method"] for workdir in args.workdirs]
    for workdir, name in zip(args.workdirs, names, strict=True):
        if name not in REPORTS:
            raise UsageError(f"{workdir}: method {name} has no report, only {', '.join(REPORTS)}")
        page = method_module(name).report(workdir)
        console.print(str(page or workdir), markup=False)
    if len(names) > 1 and set(names) <= set(COMPARISONS) and len(set(names)) == 1:
        page = method_module(names[0]).compare(args.workdirs)
        console.print(f"side by side: {page}", markup=False)


def convert(args: argparse.Namespace) -> None:
    """`jaxsynth convert`: an adapter or an image store in another tool's format."""
    from jaxsynth.cli.convert import convert
    from jaxsynth.core.console import console

    console.print(convert(args.source, args.target, args.to, args.base), markup=False)


def generate(args: argparse.Namespace) -> None:
    """`jaxsynth generate`: pictures from any base, adapters and prompts."""
    from jaxsynth.core.console import console

    console.print(generate_verb.generate(args, _enable_compile_cache), markup=False)


def bench(args: argparse.Namespace) -> None:
    """`jaxsynth bench`: times our programs, and others' beside them."""
    from jaxsynth.bench.run import run
    from jaxsynth.core.console import console

    run(
        args.name,
        peer=args.peer,
        cases=args.cases,
        reps=args.reps,
        json=args.json,
        console=console,
    )


def fields(args: argparse.Namespace) -> None:
    """`jaxsynth fields`: what a config file's fields are, with their values in it."""
    from jaxsynth.core import schema
    from jaxsynth.core.console import console

    name, values = _values(args)
    console.print(
        f"fields of method {name}, with their values in {args.config}; "
        "jaxsynth run sets one by --config.FIELD=VALUE",
        markup=False,
    )
    for one in schema.describe(METHODS[name], values):
        console.print(
            f"{one.name}: {one.type} = {one.default}\n    {one.doc}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


VERBS = {
    "run": run, "report": report, "plan": plan, "convert": convert, "generate": generate,
    "bench": bench, "fields": fields,
}  # fmt: skip


def named_values(spec: str, assignments: Sequence[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
    """The method that a config file (FILE[:VARIANT]) names, and its values with those assigned."""
    from jaxsynth.core.config import load_config, override

    values = load_config(spec)
    name = values.get("method")
    if name not in METHODS:
        found = "no field `method`" if name is None else f"method={name!r}"
        raise UsageError(f"{spec}: {found}, expected one of {', '.join(METHODS)}")
    if any(field == "method" for field, _ in assignments):
        raise UsageError(f"--config.method: the config file decides the method ({name})")
    return name, override(values, assignments)


def _values(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """`named_values` of a command.

    A field that is not there, a value that it does not take, and photos and models that are not
    there are told here, where the method, and JAX with it, is still to be imported.
    """
    from jaxsynth.core import schema

    name, values = named_values(args.config, args.assignments)
    if METHODS[name] not in sys.modules:
        told = schema.check(METHODS[name], values)
        if args.verb == "run":
            check_config(told, args.workdir)
        _check_places(told, args)
    return name, values


def _check_places(config: Any, args: argparse.Namespace) -> None:
    """UsageError for a model, and in a run a file or folder, that a field names and is not there.

    A plan may be made where data are not. A run asks the hub for what it will download.
    """
    away = check_places(config, models_alone=args.verb == "plan")
    if args.verb != "run" or args.dry_run:
        return
    for where, name in away:
        from jaxsynth.weights.hub import check_there

        try:
            check_there(name)
        except UserError as error:
            raise UsageError(f"{where}: {error}") from None


def _configured(args: argparse.Namespace) -> tuple[str, ModuleType, Any]:
    """The method that a config file names, its module, and the config with what was assigned."""
    from jaxsynth.core.config import to_dataclass

    name, values = _values(args)
    method = method_module(name)
    if "method" not in method.Config.__dataclass_fields__:
        del values["method"]
    return name, method, to_dataclass(method.Config, values)


def _enable_compile_cache() -> None:
    """Keeps compiled programs between runs, unless JAX's own variable has already said where."""
    import jax

    folder = os.environ.get("JAXSYNTH_CACHE", "")
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder.lower() in ("off", "none", "0"):
        return
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxsynth"
    jax.config.update("jax_compilation_cache_dir", folder or str(default / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _start_processes(args: argparse.Namespace) -> None:
    """Joins the other processes of a multi-process run; a single process does nothing."""
    given = {
        "coordinator_address": args.coordinator_address
        or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _count(args.num_processes, "JAX_NUM_PROCESSES"),
        "process_id": _count(args.process_id, "JAX_PROCESS_ID"),
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given) and not args.distributed:
        return
    if missing and not args.distributed:
        raise UsageError(
            f"a run of several processes needs --{' and --'.join(missing)} too, "
            "or --distributed where the cluster says it"
        )
    import jax

    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=_SLOWEST_START,
            heartbeat_timeout_seconds=_LONGEST_SILENCE,
        )
    except (RuntimeError, ValueError) as error:
        where = given["coordinator_address"] or "this cluster"
        raise UserError(f"the processes of {where} did not come together: {error}") from error
    from jax.experimental import multihost_utils

    # Gloo gives a first collective 30 s for all to arrive. Here they are together; later one may
    # load for longer than another.
    multihost_utils.sync_global_devices("all processes are here")


def _count(value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or not text:
        return value
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{variable}={text!r}: expected an integer") from None


def _prepare_libraries() -> None:
    # transformers, which only reads tokenizers here, advises everyone to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # ArrayRecord and Grain define absl flags, and reading one that nobody has parsed raises.
    from absl import flags, logging

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    # Orbax warns of every save that a slow disk holds up; the saves themselves are checked.
    logging.set_verbosity(logging.ERROR)
    # Pillow tells of damaged EXIF data and large headers; what matters of them is an error here.
    warnings.filterwarnings("ignore", module=r"PIL\.")


if __name__ == "__main__":
    sys.exit(main())
