"""The command line's grammar: verbs, options and `--config.FIELD=VALUE`."""

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

import jaxsynth
from jaxsynth.cli import generate, help, plan
from jaxsynth.cli.paths import address, local_path
from jaxsynth.core.errors import UsageError, quoted


def take_assignments(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Splits `--config.a.b=value` (or `--config.a.b value`) from the other arguments."""
    rest, assignments = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        name, sign, value = argument.removeprefix("--config.").partition("=")
        if not all(name.split(".")):
            raise UsageError(f"{argument}: expected --config.FIELD=VALUE")
        if not sign:
            value = next(arguments, None)
            if value is None or value.startswith("--"):
                raise UsageError(f"{argument} needs a value: {argument}=VALUE")
        for other, before in assignments:
            if other == name:
                raise _given_twice(f"--config.{name}", before, value)
        assignments.append((name, value))
    return rest, assignments


def _given_twice(flag: str, before: str, value: str) -> UsageError:
    return UsageError(f"{flag} is given twice, as {quoted(before)} and {quoted(value)}")


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake raises the error that `main` prints, and help keeps its lines."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="jaxsynth", description=help.DESCRIPTION, epilog=help.EPILOG)
    version = f"jaxsynth {jaxsynth.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    subparsers = {
        "run": _run_parser(verbs),
        "report": _report_parser(verbs),
        "plan": plan.add_parser(verbs),
        "convert": _convert_parser(verbs),
        "generate": generate.add_parser(verbs),
        "bench": _bench_parser(verbs),
        "fields": _fields_parser(verbs),
    }
    config = [word for word in argv if word.startswith("--config")]
    if argv[:1] in (["run"], ["plan"]) and {"-h", "--help"} & {*argv} and config:
        after = argv[argv.index(config[0]) + 1 :]
        spec = config[0].partition("=")[2] or (after[0] if after else "")
        argv = ["fields", spec]
    if argv and argv[0] in subparsers:
        _refuse_unknown(argv[0], subparsers[argv[0]], argv[1:])
        _refuse_repeated(subparsers[argv[0]], argv[1:])
    return parser.parse_args(argv)


def _refuse_unknown(verb: str, parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """UsageError for a word that the verb has no use for, with what was probably meant.

    argparse would first name what is missing, which a misspelt flag was to give.
    """
    actions = {name: action for action in parser._actions for name in action.option_strings}
    placed = [action.dest for action in parser._actions if not action.option_strings]
    value_next = False
    for word in words:
        is_value, value_next = value_next, False
        if re.fullmatch(r"-+[A-Za-z][^\s=]*(=.*)?", word, re.DOTALL):
            name, given, _ = word.partition("=")
            if name not in actions:
                raise _unknown(verb, word, list(actions), placed)
            value_next = not given and actions[name].nargs != 0
        elif not is_value and not placed:
            raise _unknown(verb, word, list(actions), placed)


def _refuse_repeated(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """UsageError for an option with two values, of which argparse would take the last."""
    actions = {name: action for action in parser._actions for name in action.option_strings}
    values: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, sign, value = word.partition("=")
        action = actions.get(name)
        if action is None or action.nargs == 0:
            continue
        value = value if sign else next(rest, "")
        if isinstance(action, argparse._AppendAction):
            continue
        if action.dest in values:
            raise _given_twice(name, values[action.dest], value)
        values[action.dest] = value


def _unknown(verb: str, word: str, options: Sequence[str], placed: Sequence[str]) -> UsageError:
    name, sign, value = word.partition("=")
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.7)
    meant = ""
    if name.lstrip("-").startswith("config."):
        meant = f"did you mean --{word.lstrip('-')}?"
    elif close:
        meant = f"did you mean {close[0]}{sign}{value}?"
    elif value and difflib.get_close_matches(name.lstrip("-"), placed, n=1, cutoff=0.7):
        meant = f"did you mean {value}, without a flag?"
    elif verb in ("run", "plan") and re.search(r"\.py(:.*)?$", word):
        meant = f"did you mean --config={word}?"
    elif verb in ("run", "plan") and word.startswith("-"):
        meant = f"a field of the config is set by --config.{name.lstrip('-')}={value or 'VALUE'}"
    hint = f"; {meant}" if meant else ""
    return UsageError(f"unknown argument {word}{hint} (see jaxsynth {verb} --help)")


def _run_parser(verbs) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        "run",
        help="start a run, or go on where it stopped",
        description="Start a run, or go on where it stopped.",
        usage="jaxsynth run --config=FILE[:VARIANT] --workdir=DIR [--dry-run] "
        "[--config.FIELD=VALUE ...]",
        epilog=help.RUN_EPILOG,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="a Python file with get_config"
    )
    parser.add_argument(
        "--workdir", required=True, type=local_path, metavar="DIR", help="where the run's files go"
    )
    parser.add_argument(
        "--reuse", type=local_path, action="append", default=[], metavar="DIR",
        help="take finished stages of other runs below this folder where they are the same",
    )  # fmt: skip
    parser.add_argument(
        "--mirror", type=address, metavar="ADDRESS",
        help="keep a copy in a bucket (gs://BUCKET/runs/NAME) and go on from it on a new machine",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only list the stages: which are finished, and the disk that the others need",
    )
    parser.add_argument(
        "--distributed", action="store_true", help="find the other processes from the cluster"
    )
    parser.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process_id", type=int, metavar="I", help="which this one is, from 0")
    return parser


def _report_parser(verbs) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        "report",
        help="write a run's tables and pictures into one HTML page",
        description="Write the tables and pictures of finished runs into one HTML page each.",
    )
    parser.add_argument("workdirs", nargs="+", type=local_path, metavar="WORKDIR", help="of a run")
    return parser


def _convert_parser(verbs) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        "convert",
        help="write an adapter, a base or an image store in another tool's format",
        description="Write an adapter, a base or an image store in another tool's format. What SRC "
        "is, is seen from its files.",
        usage="jaxsynth convert SRC DST --to=FORMAT [--base=FOLDER]",
        epilog=help.CONVERT_EPILOG,
    )
    parser.add_argument("source", type=local_path, metavar="SRC", help="what to read")
    parser.add_argument(
        "target", type=local_path, metavar="DST", help="what to write; must not exist"
    )
    parser.add_argument("--to", required=True, metavar="FORMAT", help="one of those below")
    parser.add_argument(
        "--base",
        default="",
        metavar="FOLDER",
        help="an adapter's base, or the tokenizer of a checkpoint",
    )
    return parser


def _fields_parser(verbs) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        "fields",
        help="list the fields of a config file",
        description="List every field of a config file: type, value and what it is for.",
        usage="jaxsynth fields FILE[:VARIANT]",
    )
    parser.add_argument("config", metavar="FILE[:VARIANT]", help="a Python file with get_config")
    return parser


def _bench_parser(verbs) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        "bench",
        help="time what the library does, side by side with others",
        description="Time training, sampling, attacks or corruptions, side by side with others.",
        usage="jaxsynth bench BENCHMARK [CASE ...] [--peer=PEER]",
        epilog=help.BENCH_EPILOG,
    )
    names = (
        "train-step",
        "generate",
        "dit-train-step",
        "supervised-step",
        "clones",
        "points",
        "routing",
        "adapters",
        "attacks",
        "corruptions",
        "accelerator",
    )
    peers = ("torch", "foolbox", "torchattacks", "imagecorruptions")
    parser.add_argument("name", metavar="BENCHMARK", choices=names, help="what is timed, see below")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="which cases (default: all)")
    parser.add_argument("--peer", choices=peers, default="", help="whom to compare with")
    parser.add_argument("--reps", type=int, default=5, metavar="N", help="measurements (default 5)")
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="also write the figures here"
    )
    return parser
