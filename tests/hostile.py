"""Hostile and careless cases, drawn: command lines from the table of flags, YAML trees, and the bytes of files."""

from __future__ import annotations

import copy
import io
import pickle
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from sandbox import HISTOGRAMS, SMALL, STATS, Case

from qlib.config.flags.flag import Flag
from qlib.config.flags.run_config import RunConfig, settings_by_name
from qlib.config.flags.table import FLAGS
from qlib.config.layers.keys import CORRECTION_FIELDS, LAYER_FIELDS, QUANTIZER_FIELDS
from qlib.config.schedule.keys import EXTENSION_CLASSES, POLICY_FIELDS
from qlib.qat.assignment import quantizer_classes
from qlib.train.lr.schedulers import LR_CLASSES

__all__ = ["bytes_cases", "command_lines", "pickles", "readers", "trees", "yaml_texts"]

_MODEL = f"-a digits_cnn --pretrained {SMALL}"
_QUANTIZE = f"{_MODEL} --quantize-eval"

VERBS = (
    f"{_MODEL} --check",
    f"{_MODEL} -e",
    f"{_MODEL} --summary model",
    f"{_MODEL} --qe-calibration 0.02",
    f"{_QUANTIZE} --qe-stats-file {STATS}",
    f"{_QUANTIZE} --qe-dynamic",
    f"{_QUANTIZE} --ptq-data-free",
    f"{_MODEL} --sense quant --qe-stats-file {STATS}",
    f"{_MODEL} --epochs 1",
    f"{_MODEL} --epochs 3 --resume-from training.pth.tar",
    "--resume-from quantized.pth.tar --etes 0.02",
    "-a net.py:brightest images -e",
    "",
)

JUNK = (
    *("", " ", "0", "-1", "1", "2", "8", "0.5", "1e400", "nan", "-inf", "1_000", "0x10", "1:30", "010", "2024-01-01"),
    *("9" * 400, "1" + "0" * 30, "1" + "0" * 5000, "true", "no", "~", "[", "]]", "*", "(", "(a+)+b", "((a*)*)*c"),
    *("a{9}{9}", "a{99999999999}", "(?P<x", "[[a]]", "[a--b]", "\\", "%s", "{}", "module.*", "(" * 3000),
    *("\x00", "\udcff", "é", "\u202e", "x" * 300, "x" * 6000),
    *("." * 300, "/", "..", "~", "~nosuchuser", "~nosuchuser/x", "/dev/zero/x", "a\nb", ",", "," * 1000, "a," * 1000),
    *("stem.conv", "fc", ".*", "fc.*", "no/such/file", "stats", "images", "net.py", "net.py:broken", "net.py:no"),
    *("evil.py:f", "resnet18", "timm/no_such_model", "hf/no", "-", "--", "-evaluate", "--qe", "=", "run-folder"),
)  # fmt: skip

FILES = (
    *("schedule.yaml", "settings.yaml", "plan.yaml", "run.yaml", STATS, HISTOGRAMS, "net.py", "quantized.pth.tar"),
    *("training.pth.tar", "float.pth.tar", "legacy.pth.tar", "weights.safetensors", "out.onnx", "out"),
)

#: What keeps a drawn command line small, where it is not drawn itself. Nothing waits for an optimizer.
_BOUNDS = {
    "--workers": "0",
    "--ptq-images": "16",
    "--ptq-iterations": "1",
    "--prune-images": "16",
    "--prune-steps": "1",
    "--lapq-maxiter": "1",
    "--lapq-maxfev": "3",
    "--lapq-images": "16",
    "--lapq-basinhopping-niter": "1",
    "--sense-images": "16",
    "--etes": "0.02",
    "--etrs": "0.02",
    "--evs": "0.1",
}
_SLOW = ("--epochs", "--batch-size")  #: their right values are small ones
_LEFT_OUT = ("--export-onnx", "--verify", "--engine", "--verbose")  #: exports take seconds; tracebacks are asked for


def _values(flag: Flag) -> st.SearchStrategy[str]:
    """Right and wrong texts for a flag."""
    small = st.sampled_from(["1", "2"])
    right = st.sampled_from(flag.kind.choices) if flag.kind.choices else st.sampled_from(["1", "2", "0.5", *FILES])
    return st.one_of(small if flag.name in _SLOW else right, right, st.sampled_from(JUNK), st.text(max_size=8))


@st.composite
def command_lines(draw: st.DrawFn) -> Case:
    """A verb, some flags with right and wrong values, and bounds for what they leave out."""
    words = draw(st.sampled_from(VERBS)).split()
    drawn = [flag for flag in FLAGS if flag.name not in _LEFT_OUT]
    for flag in draw(st.lists(st.sampled_from(drawn), max_size=4)):
        words.append(draw(st.sampled_from(flag.names)))
        if flag.kind.metavar:
            words.append(draw(_values(flag)))
    words += draw(st.lists(st.sampled_from(JUNK), max_size=1))
    names = {flag.names[0]: flag.names for flag in FLAGS}
    for flag, value in _BOUNDS.items():
        known = next((spellings for spellings in names.values() if flag in spellings), [flag])
        words += [] if set(known) & set(words) else [flag, value]
    return Case("command line", (*words, "--cpu"))


# YAML trees: a valid one, with some of its values and keys replaced.

TREES = {
    "schedule.yaml": f"{_MODEL} --compress schedule.yaml --epochs 1",
    "settings.yaml": f"{_QUANTIZE} --qe-config-file settings.yaml --ptq-iterations 1",
    STATS: f"{_QUANTIZE} --qe-stats-file {STATS} --qe-clip-acts kl",
    "plan.yaml": f"{_QUANTIZE} --qe-config-file plan.yaml",
    "run.yaml": "--run-config run.yaml --ptq-iterations 1 --ptq-images 16",
}

_RAW = (
    *("1:30", "010", "0x10", "1_000", "2024-01-01", "2024-01-01 10:00:00", "no", "On", "~", ".nan", "-.inf"),
    *("1.0e+400", "9" * 400, "-" + "9" * 5000, "1e-5", "0.1", "-1", "0", "1", "2", "2147483648", "1.5", "true", "[]"),
    *("{}", "[1, [2]]", "{a: {b: c}}", "'*'", "'(a+)+b'", "'a{9}{9}{9}'", "'a{99999999999}'", "'module.*'"),
    *("''", "x" * 6000, "'\\0'", "!!python/name:os.x"),
    *("!!binary aGk=", "!!set {a}", "&x [*x]", "*unknown", "? [a]", "'evil.py:f'", "'~nosuchuser/x'", "'\u202e'", "<<"),
    *("PostTrainLinearQuantizer", "StepLR", "LSQQuantizer", "stem.conv", "fc", "self", "net.py:brightest", "{<<: [1]}"),
)  # fmt: skip

KEYS = sorted(
    {
        *CORRECTION_FIELDS, *LAYER_FIELDS, *QUANTIZER_FIELDS, *POLICY_FIELDS, *settings_by_name(RunConfig()),
        *(key for each in (*quantizer_classes().values(), *EXTENSION_CLASSES.values()) for key in each.fields),
        *(key for each in LR_CLASSES.values() for key in each.fields),
        *("class", "overrides", "bits_overrides", "args", "instance_name", "quantizers", "policies", "pruners"),
        *("given", "version", "regularizers", "extensions", "lr_schedulers", "inputs", "output", "min", "shape"),
    }
)  # fmt: skip


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Each value of a tree: what holds it, and its key or index there."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def _spoil(tree: Any, rng: random.Random) -> None:
    """Replaces, removes, renames, doubles or adds one value."""
    places = list(_places(tree))
    holder, key = rng.choice(places)
    what = rng.choice(["raw", "raw", "raw", "remove", "rename", "move", "add"])
    if what == "raw":
        holder[key] = f"RAW{rng.randrange(len(_RAW))}."
    elif what == "remove":
        del holder[key]
    elif what == "move":
        other, place = rng.choice(places)
        holder[key] = copy.deepcopy(other[place]) if isinstance(other, list) or place in other else None
    elif isinstance(holder, dict):
        new = rng.choice([rng.choice(KEYS), f"RAW{rng.randrange(len(_RAW))}."])
        holder[new] = holder.pop(key) if what == "rename" else f"RAW{rng.randrange(len(_RAW))}."


def trees(template: Path) -> st.SearchStrategy[Case]:
    """A file of each YAML kind, with one to three values spoilt."""

    @st.composite
    def draw_tree(draw: st.DrawFn) -> Case:
        name = draw(st.sampled_from(list(TREES)))
        rng = random.Random(draw(st.integers(0, 2**32 - 1)))
        text = (template / name).read_text()
        tree = yaml.safe_load(text)
        for _ in range(draw(st.integers(1, 3))):
            _spoil(tree, rng)
        header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        body = yaml.safe_dump(tree, sort_keys=False)
        body = re.sub(r"RAW(\d+)\.", lambda found: _RAW[int(found[1])], body)
        return Case(f"tree of {name}", (*TREES[name].split(), "--cpu", "-j", "0"), {name: (header + body).encode()})

    return draw_tree()


# Bytes: each kind of file, damaged.

BYTES = {
    "float.pth.tar": f"-a digits_cnn {SMALL} -e --exp-load-weights-from float.pth.tar",
    "legacy.pth.tar": f"-a digits_cnn {SMALL} -e --resume-from legacy.pth.tar",
    "weights.safetensors": f"-a digits_cnn {SMALL} -e --exp-load-weights-from weights.safetensors",
    "training.pth.tar": f"-a digits_cnn {SMALL} --epochs 3 --resume-from training.pth.tar",
    "quantized.pth.tar": "--resume-from quantized.pth.tar --etes 0.02",
    HISTOGRAMS: f"{_QUANTIZE} --qe-stats-file {STATS} --qe-clip-acts kl",
    "stats/net.py_brightest_imagefolder.partial.safetensors": "-a net.py:brightest images --qe-calibration 1",
    "teacher": f"{_MODEL} --compress cached.yaml --epochs 1",
    "images/val/red/001.png": "-a net.py:brightest images -e",
    **TREES,
}


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(content: bytes, rng: random.Random) -> bytes:
    start, size = rng.randrange(len(content)), rng.choice([1, 2, 4, 8, 100])
    filling = rng.choice([b"\x00", b"\xff", b"\x7f", b"\x80", b"9"])
    return content[:start] + filling * size + content[start + size :]


def _insert(content: bytes, rng: random.Random) -> bytes:
    start, source = rng.randrange(len(content)), rng.randrange(len(content))
    return content[:start] + content[source : source + rng.choice([1, 4, 50, 1000])] + content[start:]


def _swap(content: bytes, rng: random.Random) -> bytes:
    start, other, size = rng.randrange(len(content)), rng.randrange(len(content)), rng.choice([1, 4, 16, 200])
    return content[:start] + content[other : other + size] + content[start + size :]


_DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_cut, _flip, _flip, _overwrite, _insert, _swap)


def bytes_cases(template: Path) -> st.SearchStrategy[Case]:
    """A file of each kind with damage, and a command line that reads it."""
    teacher = next(str(path.relative_to(template)) for path in template.glob("stats/*_teacher_*"))

    @st.composite
    def draw_bytes(draw: st.DrawFn) -> Case:
        kind = draw(st.sampled_from(list(BYTES)))
        name = teacher if kind == "teacher" else kind
        rng = random.Random(draw(st.integers(0, 2**32 - 1)))
        content = (template / name).read_bytes()
        for _ in range(draw(st.sampled_from([1, 1, 2]))):
            content = rng.choice(_DAMAGES)(content, rng) or b"\x00"
        return Case(f"bytes of {kind}", (*BYTES[kind].split(), "--cpu", "-j", "0"), {name: content})

    return draw_bytes()


def yaml_texts() -> st.SearchStrategy[str]:
    """Text that is more or less YAML."""
    signs = (": ", "- ", "\n", "  ", "[", "]", "{", "}", ", ", "&a ", "*a", "!!", "|\n", "#", "<<: ", "? ")
    pieces = st.sampled_from([*_RAW, *KEYS, *signs])
    return st.lists(st.one_of(pieces, st.text(max_size=3)), max_size=30).map("".join)


_OPCODES = (
    *(b"(", b".", b"0", b"1", b"2", b"N", b"]", b"}", b")", b"l", b"d", b"t", b"a", b"e", b"s", b"u", b"b", b"o", b"R"),
    *(b"Q", b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x8f", b"\x90", b"\x91", b"\x92", b"\x93", b"\x94"),
    *(b"q\x00", b"h\x00", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"K\x01", b"I-1\n", b"J\x00\x00\x00\x80"),
    *(b"X\x01\x00\x00\x00a", b"X\xff\xff\xff\xff", b"C\x01a", b"\x8a\x01\x05", b"\x95\xff\xff\xff\xff\x00\x00\x00\x00"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"),
    *(b"X\x07\x00\x00\x00storage", b"X\x0a\x00\x00\x00state_dict", b"X\x03\x00\x00\x00cpu", b"cnumpy\ndtype\n"),
    *(b"cos\nsystem\n",),
)  # fmt: skip


def pickles() -> st.SearchStrategy[bytes]:
    """A checkpoint of the old format, or a zip file, around opcodes in any order."""
    body = st.lists(st.one_of(st.sampled_from(_OPCODES), st.binary(max_size=3)), max_size=40)
    return st.tuples(st.booleans(), body).map(lambda drawn: _legacy(b"".join(drawn[1])) if drawn[0] else _zip(drawn[1]))


def _legacy(body: bytes) -> bytes:
    header = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return header + b"\x80\x02" + body + b"." + pickle.dumps([], 2)


def _zip(body: list[bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"".join(body) + b".")
        archive.writestr("a/byteorder", "little")
    return content.getvalue()


def readers() -> st.SearchStrategy[Case]:
    """What the reader of YAML and the unpickler are given, through command lines."""
    settings = (*_QUANTIZE.split(), "--qe-config-file", "a.yaml", "--cpu", "-j", "0")
    resumed = ("-a", "digits_cnn", "-e", "--resume-from", "a.pth", "--cpu", "-j", "0")
    texts = yaml_texts().map(lambda text: Case("text of YAML", settings, {"a.yaml": text.encode(errors="replace")}))
    return st.one_of(texts, pickles().map(lambda content: Case("opcodes of a pickle", resumed, {"a.pth": content})))
