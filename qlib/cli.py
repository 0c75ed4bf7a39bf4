"""From the command line to a `RunConfig`, and from a run to its exit code.

Nothing heavy is imported before the command line has been understood: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from qlib.config.flags.absent import ABSENT, why_absent
from qlib.config.flags.checks import check_combination
from qlib.config.flags.flag import Flag
from qlib.config.flags.kinds import SWITCH, split_names
from qlib.config.flags.run_config import RunConfig, config_from_names, read_run_config, settings_by_name
from qlib.config.flags.table import FLAGS, GROUPS
from qlib.config.flags.verb import needs_folder
from qlib.errors import ConfigError, QlibError, UsageError, did_you_mean
from qlib.files import expanded
from qlib.models.names import refuse_python_file
from qlib.streams import Stream, standard_streams
from qlib.system import answered, unwritable

__all__ = ["build_parser", "main", "parse"]

_RUN_CONFIG = "--run-config"
_MOST_NAMES = 1000
_Texts = Mapping[str, Sequence[str]]  #: canonical flag -> the words that the user gave it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0, 2 after a user's mistake, 130 after Ctrl-C.

    It is 2 as well where what the run says cannot be written, as on a full device; a reader that leaves is no mistake.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    with standard_streams() as (out, _):
        try:
            code = _answer(words)
        except SystemExit:  # --help
            if not _is_lost(out):
                raise
            return 2
        return code or 2 if _is_lost(out) else code


def _is_lost(out: Stream) -> bool:
    """Whether stdout did not take all of it, which is told on stderr."""
    out.flush()
    if out.lost is not None:
        print(f"{_program()}: error: {unwritable('all that was said to', 'stdout', out.lost)}", file=sys.stderr)
    return out.lost is not None


def _answer(words: Sequence[str]) -> int:
    """The exit code of a command line; a mistake is told on stderr."""
    try:
        with answered():
            os.getcwd()  # a library that is loaded in a folder that is gone ends the process
            config = parse(words)
            from qlib.app import run as application

            return application.run(config)
    except QlibError as error:
        if _is_verbose(words):
            traceback.print_exc()
        print(f"{_program()}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{_program()}: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130


def _is_verbose(words: Sequence[str]) -> bool:
    with contextlib.suppress(UsageError):
        words = _in_full(words)
    return not {"-v", "--verbose"}.isdisjoint(words)


def _program() -> str:
    """The name under which this program was called: that of the file, or the command that installing it makes."""
    called = Path(sys.argv[0]).stem
    return called if called == "compress_classifier" else "compress.py"


def parse(argv: Sequence[str]) -> RunConfig:
    """The config that a command line asks for.

    >>> config = parse(["-a", "vgg11", "--qe", "--qe-no-clip-layers", "conv1", "fc", "no/such/folder"])
    >>> config.qe.no_clip_layers, config.data.name
    (('conv1', 'fc'), 'folder')

    Raises:
        UsageError: a flag, a value or a combination that cannot be obeyed.
        ConfigError: the file of `--run-config` has mistakes.
    """
    namespace, rest = build_parser().parse_known_args(_with_values(_spread(_in_full(argv))))
    words: dict[str, Any] = vars(namespace)
    file = words.pop(_RUN_CONFIG, None)
    texts: _Texts = {name: [_one_text(each) for each in found] for name, found in words.items()}
    given, folder = frozenset(texts), _positional(rest)
    single = {flag.name for flag in FLAGS if not flag.kind.many}
    repeated = frozenset(flag for flag, values in texts.items() if flag in single and len(values) > 1)
    if file is not None:
        texts, given, folder = _repeated(expanded(file), texts, folder)
    config = _build(texts, folder, given)
    if folder is None:
        texts, folder = _give_back(texts, needs_folder(config))
        config = _build(texts, folder, given)
    if folder is None and needs_folder(config):
        raise UsageError(_no_folder(config))
    check_combination(config)
    return replace(config, repeated=repeated, repeats=None if file is None else expanded(file).resolve())


def _one_text(words: str | Sequence[str]) -> str:
    """The text of a value, which may be of several words."""
    return words if isinstance(words, str) else " ".join(words)


def _in_full(argv: Sequence[str]) -> list[str]:
    """Writes out flags that are abbreviated, as argparse would: a beginning that only one flag has stands for it.

    >>> _in_full(["--batch=4", "--eval", "--", "--cp"])
    ['--batch-size=4', '--evaluate', '--', '--cp']
    >>> _in_full(["-e", "-avgg11", "-evaluate"])
    Traceback (most recent call last):
    qlib.errors.UsageError: there is no flag -evaluate; did you mean --evaluate?

    Raises:
        UsageError: several flags begin so, or one has one dash only: argparse takes it for several short ones.
    """
    names = {name: flag.name for flag in FLAGS for name in flag.names}
    names |= {name: name for name in (_RUN_CONFIG, "--help", *ABSENT) if set(" *").isdisjoint(name)}
    end = argv.index("--") if "--" in argv else len(argv)
    return [*(_whole_name(word, names) for word in argv[:end]), *argv[end:]]


def _whole_name(word: str, names: Mapping[str, str]) -> str:
    """The word with the first of `names` that it abbreviates in full; they map to the flags that they spell."""
    name, equals, value = word.partition("=")
    if re.match(r"-\w[\w-]{2}", name) and (meant := [each for each in names if each.startswith(f"-{name}")]):
        likely = [f"-{name}"] if f"-{name}" in names else meant[:3]
        raise UsageError(f"there is no flag {name}; did you mean {' or '.join(likely)}?")
    begun = [each for each in names if each.startswith(name)] if len(name) > len("--") else []
    if name in names or not begun:
        return word
    first = {names[each]: each for each in reversed(begun)}
    if len(first) > 1:
        *others, last = (each for each in begun if first[names[each]] == each)
        raise UsageError(f"{name} is ambiguous: it may be {', '.join(others)} or {last}; write more of it")
    return begun[0] + equals + value


def _spread(argv: Sequence[str]) -> list[str]:
    """Repeats a flag of several choices for each word behind it that is one: the folder may follow.

    >>> _spread(["--activation-stats", "train", "test", "images"])
    ['--activation-stats', 'train', '--activation-stats', 'test', 'images']
    """
    lists = {name: flag.kind.choices for flag in FLAGS if flag.kind.many == "choices" for name in flag.names}
    words: list[str] = []
    flag = ""
    for before, word in zip(("", *argv), argv, strict=False):
        flag = before if before in lists else flag
        if word.startswith("-") or (flag and before != flag and word.lower() not in lists[flag]):
            flag = ""
        words += [flag, word] if flag and before != flag else [word]
    return words


def _with_values(argv: Sequence[str]) -> list[str]:
    """Writes out what a flag whose value was left out stands for; a folder after it is the dataset, not its value."""
    defaults = {name: flag.kind.without for flag in FLAGS if flag.kind.without is not None for name in flag.names}
    words: list[str] = []
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue="-"):
        bare = word in defaults and (following.startswith("-") or os.path.isdir(expanded(following)))
        words.append(f"{word}={defaults[word]}" if bare else word)
    return words


def _positional(rest: Sequence[str]) -> str | None:
    """The dataset folder among the words that the parser left over."""
    end = rest.index("--") if "--" in rest else len(rest)
    for word in rest[:end]:
        if word.startswith("-"):
            name = word.partition("=")[0]
            if why := why_absent(name):
                raise UsageError(f"{name} {why}")
            spellings = [name for flag in FLAGS for name in flag.names]
            hint = did_you_mean(name, spellings) or "; --help lists the flags"
            raise UsageError(f"there is no flag {word}{hint}")
    found = [word for word in rest if word != "--"]
    if len(found) > 1:
        raise UsageError(f"one DATASET_DIR is allowed, not {len(found)}: {' '.join(found)}")
    return found[0] if found else None


def _repeated(file: Path, texts: _Texts, folder: str | None) -> tuple[_Texts, frozenset[str], str | None]:
    """Adds to the command line what a saved run adds to it; the command line has the last word."""
    settings = read_run_config(file)
    saved_folder, saved_given = settings.pop("data", None), settings.pop("given", None)
    flags = {flag.target: flag for flag in reversed(FLAGS)}
    saved: dict[str, list[str]] = {}
    for target, value in settings.items():
        if value is None or value == []:
            continue
        parts = [str(part) for part in (value if isinstance(value, list) else [value])]
        saved[flags[target].name] = parts if flags[target].kind.many else [",".join(parts)]
    for flag in FLAGS:
        if flag.name in saved.keys() - texts.keys():
            try:
                _value(flag, saved[flag.name])
            except UsageError as error:
                raise UsageError(f"{error} (in {file})") from None
    for name in ("--arch", "--kd-teacher"):
        for arch in saved.get(name, ()) if name not in texts else ():
            refuse_python_file(arch, str(file), name)
    given = frozenset(saved if saved_given is None else map(str, saved_given))
    if unknown := sorted(given - {flag.name for flag in FLAGS}):
        raise ConfigError(f"{file}: 'given' names flags that do not exist: {', '.join(unknown)}")
    if folder is None and saved_folder is not None:
        folder = str(saved_folder)
    return {**saved, **texts}, given | frozenset(texts), folder


def _build(texts: _Texts, folder: str | None, given: frozenset[str]) -> RunConfig:
    values = {flag.target: _value(flag, texts[flag.name]) for flag in FLAGS if flag.name in texts}
    if values.get("automatic"):
        values["quantize_eval"], given = True, given | {"--quantize-eval"}
    implied = ("evaluate", "quantize_eval", "prune.method")
    values["evaluate"] = any(map(values.get, implied))
    if "--resume" in texts:
        values["train.reset_optimizer"] = True
    data = expanded(folder) if folder is not None else None
    return config_from_names({**values, "data": data, "given": given})


def _value(flag: Flag, texts: Sequence[str]) -> object:
    if not flag.kind.many:
        return flag.kind.value(flag.name, texts[-1])
    names = [name for text in texts for name in ([text] if flag.kind.many == "paths" else split_names(text))]
    if len(names) > _MOST_NAMES:
        hint = "; give a folder of runs" if flag.kind.many == "paths" else "; '.*' stands for any text"
        raise UsageError(f"{flag.name} lists {len(names)} names, and may list {_MOST_NAMES}{hint}")
    if not names:
        raise UsageError(f"{flag.name} {texts[-1]!r} is not allowed: it must be {flag.kind.allowed}")
    return tuple(flag.kind.value(flag.name, name) for name in names)


def _give_back(texts: _Texts, needed: bool) -> tuple[_Texts, str | None]:
    """Takes the dataset folder out of the list of names that swallowed it.

    It is the last word that is a folder, paths with a slash before plain words; without one, the last word of all if
    it looks like a path. A plain word is taken only where a folder is `needed`, as a layer may be called so too.

    >>> _give_back({"--qe-no-clip-layers": ["conv1", "no/images"]}, needed=True)
    ({'--qe-no-clip-layers': ['conv1']}, 'no/images')
    >>> _give_back({"--qe-no-clip-layers": ["conv1", "fc"]}, needed=True)
    ({'--qe-no-clip-layers': ['conv1', 'fc']}, None)
    """
    lists = {flag.name for flag in FLAGS if flag.kind.many == "words"}
    words = [(flag, i) for flag, given in texts.items() if flag in lists for i, word in enumerate(given) if word]

    def rank(place: tuple[str, int]) -> int:
        word = texts[place[0]][place[1]]
        is_folder, is_path = os.path.isdir(expanded(word)), os.sep in word or word[0] == "~"
        return (3 if is_path else int(needed) * 2) if is_folder else int(needed and is_path)

    place = max(reversed(words), key=rank, default=None)
    if place is None or rank(place) == 0:
        return texts, None
    name, index = place
    left = [word for position, word in enumerate(texts[name]) if position != index]
    if not left:
        raise UsageError(f"{name} needs at least one layer name before the DATASET_DIR {texts[name][index]}")
    return {**texts, name: left}, texts[name][index]


def _no_folder(config: RunConfig) -> str:
    taken = [*config.qe.no_clip_layers, *config.qe.no_quant_layers]
    note = f" ({', '.join(taken)}: taken as layer names, as none is a folder)" if taken else ""
    return f"DATASET_DIR is missing{note}: give the folder of images, or -a digits_cnn, whose images are built in"


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `UsageError`, in our words for those that a value makes or its lack."""

    def error(self, message: str) -> NoReturn:
        names, _, reason = message.removeprefix("argument ").partition(": ")
        name = names.partition("/")[0]
        flag = next((each for each in FLAGS if each.name == name), None)
        if reason.startswith("ignored explicit argument "):
            raise UsageError(f"{name} takes no value, but {reason.rpartition(' ')[2]} was given; write {name} alone")
        if reason.startswith("expected ") and flag is not None:
            raise UsageError(f"{name} needs {flag.kind.allowed}")
        raise UsageError(message.removeprefix("argument "))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the table; each flag's destination is its canonical name, and holds all texts as they are."""
    parser = _Parser(
        prog=_program(),
        usage=f"{_program()} [flags] DATASET_DIR",
        description="Compress image classifiers: calibrate, quantize, evaluate exactly what will be deployed.",
        epilog="DATASET_DIR holds train/ and val/, each with a folder of images for each class (or the files of the "
        "dataset that --dataset names); it may stand anywhere. The digits dataset needs none.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            switch: dict[str, Any] = {"action": "append_const", "const": "True"}
            kind = switch if flag.kind is SWITCH else {"metavar": flag.kind.metavar, "action": "append"}
            if flag.kind.many in ("words", "paths"):
                kind |= {"nargs": "+", "action": "extend"}
            if flag.kind.words > 1:
                kind |= {"nargs": flag.kind.words, "metavar": tuple(str(flag.kind.metavar).split())}
            group.add_argument(*flag.names, dest=flag.name, help=_help(flag), **kind)
        if title == "General":
            group.add_argument(
                _RUN_CONFIG,
                dest=_RUN_CONFIG,
                metavar="FILE",
                help="repeat the run that wrote this configs/run_config.yaml",
            )
    return parser


def _help(flag: Flag) -> str:
    if flag.help is None:
        return argparse.SUPPRESS
    default = settings_by_name(RunConfig())[flag.target]
    default = ",".join(map(str, default)) if isinstance(default, tuple) else default
    shown = default is not None and default is not False and default != "" and "(default" not in flag.help
    return (f"{flag.help} (default: {default})" if shown else flag.help).replace("%", "%%")
