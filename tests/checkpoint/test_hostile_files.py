"""Files that mean harm: nothing in them runs, they take neither the memory nor the time they ask for, and are told."""

from __future__ import annotations

import copy
import io
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, USER_MODEL, Run, good, make_images, run
from saved import same
from torch import Tensor, nn

from qlib.checkpoint.fit import load_state, model_state
from qlib.checkpoint.quantized import read_header
from qlib.checkpoint.read import read_checkpoint
from qlib.checkpoint.unpickle import Inert
from qlib.errors import CheckpointError
from qlib.surgery.widen import find_wide_model

DAMAGED = "is truncated or damaged; copy or save it again"
MAGIC = 0x1950A86A20F9469CFC6C
FORMAT = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


# Pickles, put together opcode by opcode.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return f"I{value}\n".encode() if abs(value) < 2**64 else pickle.dumps(value, 2)[2:-1]


def named(full: str) -> bytes:
    module, _, name = full.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def several(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def numbers(*values: int) -> bytes:
    return several(*map(number, values))


def called(full: str, *args: bytes) -> bytes:
    return named(full) + several(*args) + b"R"


def keyed(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def memo(index: int) -> bytes:
    return b"q" + bytes([index])


def again(index: int) -> bytes:
    return b"h" + bytes([index])


def stored(kind: str = "FloatStorage", count: int = 1, key: str = "0") -> bytes:
    return several(text("storage"), named(f"torch.{kind}"), text(key), text("cpu"), number(count)) + b"Q"


def rebuilt(
    storage: bytes, offset: bytes, size: bytes, stride: bytes, version: str = "_v2", more: bytes = b""
) -> bytes:
    """A tensor as torch writes it; `more` is what follows its size and strides."""
    return called(f"torch._utils._rebuild_tensor{version}", storage, offset, size, stride, more or b"\x89})R"[:2])


def written(path: Path, body: bytes, storages: dict[str, bytes] | None = None, legacy: bool = False) -> Path:
    """A checkpoint file around a pickle without its last opcode."""
    storages, body = storages or {}, b"\x80\x04" + body + b"."
    if legacy:
        header = b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, {"little_endian": True}))
        contents = b"".join(struct.pack("<q", len(each)) + each for each in storages.values())
        path.write_bytes(header + body + pickle.dumps(list(storages), 2) + contents)
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", body)
        archive.writestr("a/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"a/data/{key}", content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert len(str(error.value)) < len(str(path)) + 500
    return str(error.value)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks write the file `ran`."""
    monkeypatch.chdir(tmp_path)


FUNCTIONS = {
    "posix.system": text("touch ran"),
    "os.system": text("touch ran"),
    "subprocess.Popen": several(text("touch"), text("ran")),
    "builtins.eval": text("open('ran', 'w')"),
    "__builtin__.eval": text("open('ran', 'w')"),
    "builtins.exec": text("open('ran', 'w')"),
    "builtins.open": text("ran") + text("w"),
    "builtins.getattr": named("torch.Tensor") + text("numpy"),
    "builtins.__import__": text("antigravity"),
    "functools.partial": named("torch.save") + text("ran"),
    "operator.attrgetter": text("numpy"),
    "operator.methodcaller": text("touch") + text("ran"),
    "types.FunctionType": b"N",
    "copyreg._reconstructor": named("torch.Tensor") + named("torch.Tensor") + b"N",
    "importlib.import_module": text("antigravity"),
    "runpy.run_path": text("evil.py"),
    "pickle.loads": b"C\x06cx\ny\n.",
    "torch.hub.load": text("evil") + text("net"),
    "torch.serialization.load": text("evil.pth"),
    "torch.utils.data.dataset.Subset": b"]]",
    "torch.utils._config_module.open": text("ran") + text("w"),
    "torch.jit.load": text("evil.pth"),
    "torch.nn.modules.linear.Linear": numbers(1, 1),
    "torch._utils._rebuild_tensor_v4": b"",
    "torch._utils.os.system": text("touch ran"),
    "collectionsx.OrderedDict": b"",
    "qlib.checkpoint.read.write_checkpoint": text("ran") + b"}",
}
"""Functions that no checkpoint needs, with arguments."""


def through_reduce(full: str, args: bytes) -> bytes:
    return called(full, args)


def through_newobj(full: str, args: bytes) -> bytes:
    return named(full) + several(args) + b"\x81"


def through_newobj_ex(full: str, args: bytes) -> bytes:
    return named(full) + several(args) + b"}\x92"


def through_obj(full: str, args: bytes) -> bytes:
    return b"(" + named(full) + args + b"o"


def through_inst(full: str, args: bytes) -> bytes:
    return b"(" + args + b"i" + named(full)[1:]


def through_stack_global(full: str, args: bytes) -> bytes:
    module, _, name = full.rpartition(".")
    return text(module) + text(name) + b"\x93" + several(args) + b"R"


def through_build(full: str, args: bytes) -> bytes:
    return b"N)" + named(full) + several(args) + b"b"


WAYS: dict[str, Callable[[str, bytes], bytes]] = {
    "REDUCE": through_reduce,
    "NEWOBJ": through_newobj,
    "NEWOBJ_EX": through_newobj_ex,
    "OBJ": through_obj,
    "INST": through_inst,
    "STACK_GLOBAL": through_stack_global,
    "BUILD": through_build,
}


@FORMAT
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("full", FUNCTIONS)
def test_functions_are_refused_by_name(tmp_path: Path, full: str, way: str, legacy: bool) -> None:
    Path("evil.py").write_text("open('ran', 'w')")
    path = written(tmp_path / "a.pth", keyed(state_dict=WAYS[way](full, FUNCTIONS[full])), legacy=legacy)
    assert f"was not loaded because it refers to '{full}', which could run code; save the" in refusal(path)
    assert not Path("ran").exists()
    assert "antigravity" not in sys.modules


POINTER = b"C\x08" + struct.pack("<Q", 0xDEADBEEF)
OBJECTS = named("numpy.dtype") + several(text("O8"), b"\x89\x88") + b"R"
INERT = {
    "an array of objects from bytes": called("numpy.ndarray", numbers(1), text("O"), POINTER),
    "an array that is given its bytes": called(
        "numpy._core.multiarray._reconstruct", named("numpy.ndarray"), numbers(0), text("b")
    )
    + several(number(1), numbers(1), OBJECTS, b"\x89", POINTER)
    + b"b",
    "a number that is an object": called("numpy.core.multiarray.scalar", OBJECTS, POINTER),
    "numpy.load": called("numpy.load", text("evil.npy"), b"N", b"\x88"),
    "numpy's os.system": text("numpy") + text("f2py.os.system") + b"\x93" + several(text("touch ran")) + b"R",
    "numpy.testing": called("numpy.testing._private.utils.runstring", text("open('ran', 'w')"), b"}"),
    "torch.load": called("torch.load", text("evil.pth")),
    "torch.storage": called("torch.storage._load_from_bytes", b"C\x04evil"),
    "a dotted name in torch": text("torch") + text("serialization.os.system") + b"\x93(" + text("touch ran") + b"tR",
    "a dotted name in collections": text("collections") + text("_sys.exit") + b"\x93)R",
    "collections.namedtuple": called("collections.namedtuple", text("a"), text("__init__")),
    "argparse.FileType": called("argparse.FileType", text("w")),
    "pathlib": called("pathlib.Path.touch", called("pathlib.PosixPath", text("ran"))),
    "an optimizer": called("torch.optim.sgd.SGD", b"]"),
    "Distiller": called("distiller.evil.run", text("touch ran")),
    "__setstate__": called("collections.Counter") + keyed(__setstate__=named("torch.load"), __dict__=b"}") + b"b",
    "slots": called("numpy.x") + b"N}" + text("__class__") + named("torch.load") + b"s\x86b",
}
"""What is only written down; each is the value under `extra`."""


@FORMAT
@pytest.mark.parametrize("name", INERT)
def test_what_is_inert(tmp_path: Path, name: str, legacy: bool) -> None:
    weight = rebuilt(stored(), number(0), numbers(1), numbers(1))
    body = keyed(extra=INERT[name], state_dict=keyed(w=weight))
    checkpoint = read_checkpoint(written(tmp_path / "a.pth", body, {"0": struct.pack("<f", 2.5)}, legacy))
    assert type(checkpoint["extra"]) is Inert
    assert model_state(checkpoint)["w"].tolist() == [2.5]
    assert not Path("ran").exists()


def test_naming_a_module_of_torch_does_not_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__getattr__", pytest.fail)  # which imports some of them when they are asked for
    checkpoint = read_checkpoint(
        written(tmp_path / "a.pth", keyed(extra=named("torch.onnx_") + named("torch._inductor_") + b"\x86"))
    )
    assert [each.name for each in checkpoint["extra"]] == ["torch.onnx_", "torch._inductor_"]


PAIRS = b"2\x86" * 60  # a pair of twice the same, 60 times: 2**60 values, if they were counted
DEEP = 50_000
BAD_PICKLES = {
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "buffers": b"\x97",
    "attributes of a dictionary": b"}}b",
    "attributes of a list": b"]}b",
    "a persistent text": text("0") + b"Q",
    "a persistent module": several(text("module"), named("torch.Tensor"), text("0"), text("x")) + b"Q",
    "a persistent storage of no class": several(text("storage"), text("x"), text("0"), text("cpu"), b"K\x01") + b"Q",
    "a persistent storage that is called": several(text("storage"), called("torch.FloatStorage"), text("0")) + b"Q",
    "a name that is no text": b"K\x01K\x02\x93",
    "a name without end": text("torch") + text("x" * 1000) + b"\x93",
    "a call of a list": b"])R",
    "a call of a result": called("torch.Size", b")") + b")R",
    "arguments that are a list": named("numpy.x") + b"]R",
    "tuples in tuples": b")" + b"\x85" * DEEP,
    "lists in lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "dictionaries in dictionaries": b"}" + b"N}" * DEEP + b"s" * DEEP,
    "calls in calls": named("numpy.x") + memo(0) + again(0) * DEEP + b")" + b"\x85R" * DEEP,
    "attributes in attributes": called("numpy.x") + memo(0) + b"0" + (again(0) + b"2b") + b"\x85",
    "a list in itself": b"]" + memo(0) + again(0) + b"a",
    "a dictionary in itself": b"}" + memo(0) + b"N" + again(0) + b"s",
    "a key without end": b"})" + PAIRS + b"Ns",
    "a key that is a list": b"}]Ns",
    "an ordered key without end": called("collections.OrderedDict", b"](])" + PAIRS + b"aNa" + b"e"),
    "an ordered key that is a list": called("collections.OrderedDict", b"](]]aNae"),
    "ordered items without pairs": called("collections.OrderedDict", b"](K\x01K\x02e"),
    "ordered items that are a text": called("collections.OrderedDict", text("ab")),
    "a set item without end": called("collections.OrderedDict") + b")" + PAIRS + b"Ns",
    "a size of a list": called("torch.Size", b"]"),
    "a number of 10,000 digits": number(10**10_000),
    "a mark instead of a value": b"(R",
    "an empty stack": b"00",
    "an opcode that does not exist": b"\xff",
    "text that is no text": b"X\x02\x00\x00\x00\xff\xff",
    "text that ends early": b"X\xff\xff\xff\x7fx",
    "no text of negative length": b"T\xff\xff\xff\xffx",
    "bytes without end": b"\x8e" + b"\xff" * 8,
    "a memo that was not written": b"j\xff\xff\xff\x7f",
    "no value": b"(",
}


@FORMAT
@pytest.mark.parametrize("name", BAD_PICKLES)
def test_pickles_that_torch_does_not_write(tmp_path: Path, name: str, legacy: bool) -> None:
    assert DAMAGED in refusal(written(tmp_path / "a.pth", keyed(state_dict=BAD_PICKLES[name]), legacy=legacy))


@pytest.mark.parametrize("position", ["version", "machine", "byte order", "keys"])
@pytest.mark.parametrize("value", [b")" + PAIRS, b")" + b"\x85" * 5000, b"]" + memo(0) + again(0) + b"a"])
def test_strange_parts_of_a_legacy_file(tmp_path: Path, position: str, value: bytes) -> None:
    body = keyed(w=rebuilt(stored(), number(0), numbers(1), numbers(1)))
    parts = {"magic": pickle.dumps(MAGIC, 2)[2:-1], "version": number(1001), "machine": b"}", "body": body}
    parts["keys"] = b"]" + text("0") + b"a"
    if position == "byte order":
        parts["machine"] = keyed(little_endian=value)
    else:
        parts[position] = b"](" + value + b"e" if position == "keys" else value
    path = tmp_path / "a.pth"
    path.write_bytes(b"".join(b"\x80\x02" + part + b"." for part in parts.values()) + struct.pack("<qf", 1, 1.0))
    assert DAMAGED in refusal(path)


def test_a_million_tuples_in_tuples(tmp_path: Path) -> None:
    assert DAMAGED in refusal(written(tmp_path / "a.pth", b")" + b"\x85" * 1_000_000))


def test_a_large_memo_index_takes_no_memory(tmp_path: Path) -> None:
    body = keyed(epoch=b"K\x03r\xff\xff\xff\x7f", again=b"j\xff\xff\xff\x7f")
    assert read_checkpoint(written(tmp_path / "a.pth", body)) == {"epoch": 3, "again": 3}


ONE = (number(0), numbers(1), numbers(1))
QINT = b"\x89)" + named("torch.quint8")
BAD_TENSORS = {
    "a storage that is too short": rebuilt(stored(count=4), *ONE),
    "a storage that is not there": rebuilt(stored(key="7"), *ONE),
    "a storage outside its folder": rebuilt(stored(key="../data.pkl"), *ONE),
    "a storage of negative length": rebuilt(stored(count=-1), *ONE),
    "a storage of 2**63 values": rebuilt(stored(count=2**63), *ONE),
    "a storage of 10**2000 values": rebuilt(stored(count=10**2000), *ONE),
    "a storage of another kind": rebuilt(stored("EvilStorage"), *ONE),
    "a storage that is a function": rebuilt(stored("load"), *ONE),
    "a text instead of a storage": rebuilt(text("0"), *ONE),
    "None instead of a storage": rebuilt(b"N", *ONE),
    "a negative offset": rebuilt(stored(), number(-1), *ONE[1:]),
    "an offset beyond the end": rebuilt(stored(), number(1), *ONE[1:]),
    "an offset of 2**62": rebuilt(stored(), number(2**62), *ONE[1:]),
    "an offset that is no number": rebuilt(stored(), text("0"), *ONE[1:]),
    "a negative size": rebuilt(stored(), number(0), numbers(-1), numbers(1)),
    "two negative sizes": rebuilt(stored(), number(0), numbers(-1, -1), numbers(1, 1)),
    "10**12 values": rebuilt(stored(), number(0), numbers(10**12), numbers(1)),
    "the same value 10**12 times": rebuilt(stored(), number(0), numbers(10**12), numbers(0)),
    "sizes whose product is 2**64": rebuilt(stored(), number(0), numbers(2**32, 2**32), numbers(0, 0)),
    "no values of 2**80": rebuilt(stored(), number(0), numbers(0, 2**40, 2**40), numbers(0, 0, 0)),
    "a size of 2**70": rebuilt(stored(), number(0), numbers(0, 2**70), numbers(0, 0)),
    "a negative stride": rebuilt(stored(), number(0), numbers(1), numbers(-1)),
    "a stride of 2**62": rebuilt(stored(), number(0), numbers(2), numbers(2**62)),
    "fewer strides than sizes": rebuilt(stored(), number(0), numbers(1, 1), numbers(1)),
    "100 dimensions": rebuilt(stored(), number(0), numbers(*[1] * 100), numbers(*[1] * 100)),
    "sizes that are fractions": rebuilt(stored(), number(0), several(b"F1.0\n"), numbers(1)),
    "sizes that are a text": rebuilt(stored(), number(0), text("a"), numbers(1)),
    "no sizes": rebuilt(stored(), number(0), b"N", b"N"),
    "a type that weights do not have": rebuilt(stored("UntypedStorage"), *ONE, "_v3", QINT),
    "a type that is none": rebuilt(stored("UntypedStorage"), *ONE, "_v3", b"\x89)K\x01"),
    "a type without end": rebuilt(stored("UntypedStorage"), *ONE, "_v3", b"\x89))" + PAIRS),
    "a type of its own storages": rebuilt(stored("UntypedStorage"), *ONE, "_v3", b"\x89)" + named("torch.bool")),
    "a storage of two types": rebuilt(stored(), *ONE, "_v3", b"\x89)" + named("torch.uint16")),
    "values to be conjugated": rebuilt(stored(), *ONE, more=b"\x89)" + keyed(conj=b"\x88")),
    "no arguments": called("torch._utils._rebuild_tensor_v2"),
    "a parameter of a text": called("torch._utils._rebuild_parameter", text("a"), b"\x88", b")"),
    "a parameter of nothing": called("torch.nn.parameter.Parameter"),
    "a tensor of numpy": called("torch._utils._rebuild_device_tensor_from_numpy", b"N", b"N", b"N", b"N"),
    "a tensor of a class": called("torch._utils._rebuild_wrapper_subclass", b"N"),
}


@FORMAT
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_torch_does_not_write(tmp_path: Path, name: str, legacy: bool) -> None:
    path = written(tmp_path / "a.pth", keyed(w=BAD_TENSORS[name]), {"0": b"\0" * 4}, legacy)
    assert DAMAGED in refusal(path)


@FORMAT
def test_truths_are_one_or_zero(tmp_path: Path, legacy: bool) -> None:
    """A byte of 255 in a storage of truths would count as 255, or as one, as the operation likes."""
    body = keyed(w=rebuilt(stored("BoolStorage", 4), number(0), numbers(4), numbers(1)))
    path = written(tmp_path / "a.pth", body, {"0": bytes([0, 1, 2, 255])}, legacy)
    weight = model_state(read_checkpoint(path))["w"]
    assert weight.view(torch.uint8).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("make", "legacy", "sentence"),
    [
        (lambda: torch.ones(2, 2).to_sparse(), False, "holds a sparse tensor, which no weights are; save"),
        (lambda: torch.ones(2, 2).to_sparse(), True, "holds a sparse tensor, which no weights are; save"),
        (lambda: torch.empty(2, device="meta"), False, "holds a meta tensor, which no weights are; save"),
        (lambda: torch.view_as_complex(torch.ones(2, 2)).conj(), False, DAMAGED),
    ],
    ids=["sparse", "legacy sparse", "meta", "conjugated"],
)
def test_kinds_of_tensors_that_weights_do_not_have(
    tmp_path: Path, make: Callable[[], Tensor], legacy: bool, sentence: str
) -> None:
    torch.save({"w": make()}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    assert sentence in refusal(tmp_path / "a.pth")


@FORMAT
def test_quantized_tensors(tmp_path: Path, legacy: bool) -> None:
    scheme = several(named("torch.per_tensor_affine"), b"F1.0\n", number(0))
    body = keyed(w=called("torch._utils._rebuild_qtensor", stored("QUInt8Storage"), *ONE, scheme, b"\x89", b")"))
    path = written(tmp_path / "a.pth", body, {"0": b"\0"}, legacy)
    assert "holds a quantized tensor, which no weights are; save" in refusal(path)


def test_numbers_in_the_other_byte_order(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pth", keyed(epoch=b"K\x03"))
    other = {"little": "big   ", "big": "little"}[sys.byteorder]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"epoch": 3}))
        archive.writestr("a/byteorder", other.strip())
    assert DAMAGED in refusal(path)
    header = [MAGIC, 1001, {"little_endian": sys.byteorder != "little"}, {"epoch": 3}, []]
    path.write_bytes(b"".join(pickle.dumps(value, 2) for value in header))
    assert DAMAGED in refusal(path)


def test_a_torchscript_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02c__torch__\nNet\n)\x81}b.")
        archive.writestr("a/constants.pkl", b"\x80\x02).")
        archive.writestr("a/code/__torch__.py", "class Net(Module): ...")
    assert "was not loaded because it refers to '__torch__.Net', which could run code" in refusal(path)


# Archives.


def changed(path: Path, change: Callable[[zipfile.ZipFile], object]) -> None:
    """A good archive whose directory is changed before it is written."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"epoch": 3}, 2))
        archive.writestr("a/data/0", b"\0" * 64)
        change(archive)


def deflated(archive: zipfile.ZipFile) -> None:
    archive.writestr("a/data/1", b"\0" * 10**7, zipfile.ZIP_DEFLATED)


def overlapping(archive: zipfile.ZipFile) -> None:
    for index in range(100):
        archive.filelist.append(copy.copy(archive.filelist[-1]))
        archive.filelist[-1].filename = f"a/data/x{index}"


def twice(archive: zipfile.ZipFile) -> None:
    archive.filelist.append(copy.copy(archive.filelist[0]))


def setting(**attributes: int) -> Callable[[zipfile.ZipFile], None]:
    """Changes what the directory says of the pickle."""

    def change(archive: zipfile.ZipFile) -> None:
        for name, value in attributes.items():
            setattr(archive.filelist[0], name, value)

    return change


ARCHIVES: dict[str, Callable[[zipfile.ZipFile], object]] = {
    "compressed": deflated,
    "overlapping": overlapping,
    "the pickle twice": twice,
    "two pickles": lambda archive: archive.writestr("b/data.pkl", pickle.dumps({"epoch": 4}, 2)),
    "larger than the file": setting(file_size=10**12, compress_size=10**12),
    "larger than it is": setting(file_size=60, compress_size=60),
    "smaller than it is": setting(file_size=3, compress_size=3),
    "another checksum": setting(CRC=1),
    "encrypted": setting(flag_bits=1),
    "encrypted strongly": setting(flag_bits=0x41),
    "patched": setting(flag_bits=0x20),
    "of a later version": setting(extract_version=99),
    "beyond the end": setting(header_offset=10**6),
    "far beyond the end": setting(header_offset=2**63),
    "elsewhere": setting(header_offset=7),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_torch_does_not_write(tmp_path: Path, name: str) -> None:
    changed(tmp_path / "a.pth", lambda archive: None)
    assert read_checkpoint(tmp_path / "a.pth") == {"epoch": 3}
    changed(tmp_path / "a.pth", ARCHIVES[name])
    assert DAMAGED in refusal(tmp_path / "a.pth")


def test_names_in_an_archive_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    changed(path, lambda archive: archive.writestr("a/data/é", b""))
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    assert DAMAGED in refusal(path)


def test_the_sentence_holds_no_control_characters(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pth", keyed(w=text("evil\x1b[2J\n") + text("run") + b"\x93"))
    assert r"refers to 'evil\x1b[2J\n.run', which could run code" in refusal(path)


# Memory.

MEGABYTE, PART = 1_000_000, 100_000
SHARED_LIST = b"](" + b"N" * (PART) + b"e"
REPEAT = PART // 8


def repeated(*before: bytes, each: bytes, count: int = REPEAT) -> bytes:
    """A list of `count` times what `each` makes of the memo, whose entries are `before`."""
    return b"".join(value + memo(index) + b"0" for index, value in enumerate(before)) + b"](" + each * count + b"e"


LARGE = {
    "empty dictionaries": b"](" + b"}" * PART + b"e",
    "empty sets": b"](" + b"\x8f" * MEGABYTE + b"e",
    "calls without arguments": repeated(named("numpy.x"), each=again(0) + b")R"),
    "calls that share arguments": repeated(
        named("numpy.x"), b"(" + b"N" * PART + b"t", each=again(0) + again(1) + b"R"
    ),
    "calls with keywords": repeated(named("numpy.x"), b"(" + b"N" * PART + b"t", each=again(0) + again(1) + b"}\x92"),
    "ordered dictionaries that share items": repeated(
        named("collections.OrderedDict"),
        b"](" + b"".join(b"]" + number(index) + b"aNa" for index in range(20_000)) + b"e\x85",
        each=again(0) + again(1) + b"R",
        count=5_000,
    ),
    "sizes of one list": repeated(named("torch.Size"), SHARED_LIST + b"\x85", each=again(0) + again(1) + b"R"),
    "bytes of one text": repeated(
        named("_codecs.encode"), text("x" * PART) + text("latin1") + b"\x86", each=again(0) + again(1) + b"R"
    ),
    "a long name": repeated(text("torch"), text("x" * PART), each=again(0) + again(1) + b"\x93"),
    "tensors of one storage": repeated(
        named("torch._utils._rebuild_tensor_v2"),
        several(stored("BoolStorage", MEGABYTE), *ONE, b"\x89", b")"),
        each=again(0) + again(1) + b"R",
    ),
    "truths of one storage": repeated(
        several(text("storage"), named("torch.BoolStorage"), text("0"), text("cpu"), number(MEGABYTE)),
        each=again(0) + b"Q",
        count=5_000,
    ),
    "marks": b"(" * PART,
}
"""Pickles of a megabyte and less that ask for as much memory as they can, most for thousands of times their size."""
REFUSED = {"sizes of one list", "a long name", "marks"}

MEASURE = """
import resource, sys
from pathlib import Path
from qlib.checkpoint.read import read_checkpoint
from qlib.errors import CheckpointError

def megabytes(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) // 1024

resource.setrlimit(resource.RLIMIT_AS, ((megabytes("VmSize") + 2000) * 2**20,) * 2)
for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = megabytes("VmRSS")
    try:
        kind = type(read_checkpoint(Path(path))["state_dict"]).__name__
    except CheckpointError:
        kind = "refused"
    print(Path(path).stem, kind, megabytes("VmHWM") - before, sep=":")
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_small_files_take_little_memory(tmp_path: Path) -> None:
    paths = [
        written(tmp_path / f"{name}.pth", keyed(state_dict=body), {"0": b"\1" * MEGABYTE})
        for name, body in LARGE.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [line.split(":") for line in done.stdout.splitlines()]
    assert [name for name, *_ in rows] == list(LARGE)
    assert {name for name, kind, _ in rows if kind == "refused"} == REFUSED
    assert [(name, peak) for name, _, peak in rows if int(peak) > 300] == []


# What is good stays good.


DTYPES = [
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128",
    "uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu",
]
SAVED = {"zip": {}, "protocol 4": {"pickle_protocol": 4}, "legacy": {"_use_new_zipfile_serialization": False}}
HOW = pytest.mark.parametrize("how", SAVED)


@HOW
@pytest.mark.parametrize("name", [name for names in DTYPES for name in names.split()])
def test_tensors_of_every_type(tmp_path: Path, name: str, how: str) -> None:
    dtype: torch.dtype = getattr(torch, name)
    content = torch.arange(96, dtype=torch.uint8)
    values = content.bool() if dtype == torch.bool else content.view(dtype)
    state = {
        "plain": values.clone(),
        "part": values[2:4],
        "transposed": values[:6].reshape(2, 3).t(),
        "empty": values[:0].reshape(0, 3),
        "scalar": values[3],
    }
    torch.save(state, tmp_path / "a.pth", **SAVED[how])  # type: ignore[arg-type]
    found = read_checkpoint(tmp_path / "a.pth")["state_dict"]
    assert same(found, state)
    assert found["transposed"].stride() == (1, 3)


@HOW
def test_parameters_shared_storages_and_versions(tmp_path: Path, how: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    tied = torch.arange(6.0)
    state = model.state_dict()
    state.update(parameter=nn.Parameter(torch.ones(2)), first=tied[:4], second=tied[2:])
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pth", **SAVED[how])  # type: ignore[arg-type]
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    found = checkpoint["state_dict"]
    assert same(checkpoint, {"state_dict": state, "epoch": 3})
    assert type(found) is OrderedDict
    assert found._metadata == state._metadata  # type: ignore[attr-defined]
    found["first"][2] = 7
    assert found["second"].tolist() == [7, 3, 4, 5]


@HOW
def test_plain_values(tmp_path: Path, how: str) -> None:
    content = {
        "none": None,
        "truths": [True, False],
        "numbers": (0, -1, 255, 2**31, -(2**63), 2**70, 0.1, float("inf")),
        "text": ["", "é\n", "x" * 300],
        "nested": {"a": [{"b": ((), ([],), {})}], 3: "three", None: 1, 2.5: 2, (1, "a"): 3},
        "ordered": OrderedDict(z=1, a=OrderedDict()),
        "size": torch.Size([2, 3]),
        "dtypes": [torch.float16, torch.bfloat16],
        "same": [same_list := [1, 2], same_list],
    }
    torch.save(content, tmp_path / "a.pth", **SAVED[how])  # type: ignore[arg-type]
    assert same(read_checkpoint(tmp_path / "a.pth"), {**content, "size": (2, 3)})


def test_ordered_dictionaries_of_python_2(tmp_path: Path) -> None:
    pairs = b"](" + b"".join(b"](" + text(name) + b"K\x01e" for name in "ba") + b"e"
    path = written(tmp_path / "a.pth", keyed(state=called("collections.OrderedDict", pairs)))
    assert same(read_checkpoint(path), {"state": OrderedDict(b=1, a=1)})


def small_checkpoint(legacy: bool) -> tuple[dict[str, Any], bytes]:
    content = {"state_dict": {"a": torch.arange(4.0), "b": torch.ones(2, 2).bool()}, "epoch": 3}
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return content, stream.getvalue()


def read_or_refuse(path: Path) -> dict[str, Any] | None:
    try:
        return read_checkpoint(path)
    except CheckpointError:
        return None


def test_truncated_and_changed_archives(tmp_path: Path) -> None:
    """Everything that counts has a checksum: a damaged file is refused, or has the same values."""
    content, whole = small_checkpoint(legacy=False)
    chance, path = random.Random(0), tmp_path / "a.pth"
    for end in (len(whole) * part // 20 for part in range(20)):
        path.write_bytes(whole[:end])
        assert read_or_refuse(path) is None
    read = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= chance.randrange(1, 256)
        path.write_bytes(damaged)
        found = read_or_refuse(path)
        read += found is not None
        assert found is None or same(found, content)
    assert 0 < read < 200


def test_truncated_and_changed_legacy_files(tmp_path: Path) -> None:
    """Without a checksum values may change, but nothing fails otherwise."""
    _, whole = small_checkpoint(legacy=True)
    chance, path = random.Random(0), tmp_path / "a.pth"
    for end in (len(whole) * part // 20 for part in range(20)):
        path.write_bytes(whole[:end])
        assert read_or_refuse(path) is None
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= chance.randrange(1, 256)
        path.write_bytes(damaged)
        read_or_refuse(path)


# Good pickles of bad checkpoints.


@pytest.mark.parametrize(
    "state",
    [{0: torch.ones(1)}, {"a": 1}, {"a": [torch.ones(1)]}, [torch.ones(1)], "a"],
    ids=["numbered", "numbers", "lists", "a list", "a text"],
)
def test_a_state_that_is_not_tensors_by_name(state: object) -> None:
    sentence = "the checkpoint has no weights under 'state_dict', only state_dict; save model.state_dict()"
    with pytest.raises(CheckpointError) as error:
        model_state({"state_dict": state, 3: None})  # type: ignore[dict-item]
    assert str(error.value) == sentence
    header = {"version": 1, "arch": "a", "dataset": "b", "num_classes": 3, "plan": "c", "state_dict": state}
    with pytest.raises(CheckpointError, match=r"x has the state_dict .*; allowed: tensors by name; write it"):
        read_header(header, "x")


def test_a_version_without_end() -> None:
    version: tuple[Any, ...] = ()
    for _ in range(60):
        version = (version, version)
    with pytest.raises(CheckpointError, match="the quantized checkpoint x lacks arch, dataset, num_classes, plan,"):
        read_header({"version": version}, "x")


@pytest.mark.parametrize("versions", [{"": 3}, {"": {"version": "a"}}, {3: {"version": 2}}, {"": {"version": None}}])
def test_versions_of_layers_that_are_no_numbers(versions: dict[Any, Any]) -> None:
    model = nn.BatchNorm2d(2)
    state = model.state_dict()
    state._metadata = versions  # type: ignore[attr-defined]
    load_state(model, model_state({"state_dict": state}), "it")


# Python files that a file names.

EVIL = "evil.py:brightest"


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Python file that leaves `ran`, and with files that name it."""
    folder = tmp_path_factory.mktemp("evil")
    (folder / "evil.py").write_text("open('ran', 'w').close()\n" + USER_MODEL)
    make_images(folder / "images")
    done = good(f"-a {EVIL} images --quantize-eval --qe-dynamic", folder)
    (done.folder / "quantized_checkpoint.pth.tar").rename(folder / "quantized.pth.tar")
    (done.folder / "configs" / "run_config.yaml").rename(folder / "run.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, arch in (("float", EVIL), ("wide", f"{EVIL}.wide2")):
            torch.save({"arch": arch, "state_dict": find_wide_model(arch).build(4).state_dict()}, f"{name}.pth.tar")
    quantized = torch.load(folder / "quantized.pth.tar")
    tricked = {"arch": f"digits_cnn.wide2/{EVIL}.wide2", "state_dict": {"a": torch.ones(1)}}
    torch.save(tricked, folder / "tricked.pth.tar")
    training = {"format": "qlib_training", "version": 1, "arch": "digits_cnn", "quantized": quantized}
    torch.save({**training, "state_dict": {"a": torch.ones(1)}}, folder / "training.pth.tar")
    (folder / "kd_run.yaml").write_text(f"arch: digits_cnn\npretrained: true\nkd: {{teacher: '{EVIL}'}}\n")
    (folder / "kd.yaml").write_text(
        f"extensions:\n  kd:\n    class: KnowledgeDistillation\n    teacher: '{EVIL}'\n    resume: float.pth.tar\n"
        "policies:\n  - extension: {instance_name: kd}\n    starting_epoch: 0\n    ending_epoch: 1\n    frequency: 1\n"
    )
    return folder


def harmless(words: str, folder: Path) -> Run:
    """A run that ends with a mistake and does not run the Python file."""
    (folder / "ran").unlink(missing_ok=True)
    done = run(words, folder)
    assert done.code == 2, done
    assert len(done.err.splitlines()) == 1
    assert not (folder / "ran").exists()
    return done


NAMED = {
    "checkpoint": ("images -e --resume-from float.pth.tar", "checkpoint 'float.pth.tar'", f"-a {EVIL}"),
    "weights": ("images -e --exp-load-weights-from float.pth.tar", "checkpoint 'float.pth.tar'", f"-a {EVIL}"),
    "wide": ("images -e --resume-from wide.pth.tar", "checkpoint 'wide.pth.tar'", f"-a {EVIL}.wide2"),
    "quantized": ("images --resume-from quantized.pth.tar", "checkpoint 'quantized.pth.tar'", f"-a {EVIL}"),
    "integers of training": (
        "images --quantize-eval --resume-from training.pth.tar",
        "checkpoint 'training.pth.tar'",
        f"-a {EVIL}",
    ),
    "run config": ("--run-config run.yaml", "run.yaml", f"--arch {EVIL}"),
    "teacher in a run config": ("--run-config kd_run.yaml", "kd_run.yaml", f"--kd-teacher {EVIL}"),
    "teacher in a schedule": (
        "-a digits_cnn --pretrained --epochs 1 --compress kd.yaml",
        "the schedule",
        f"--kd-teacher {EVIL}",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_file_may_not_name_a_python_file(evil: Path, name: str) -> None:
    words, source, flag = NAMED[name]
    assert harmless(words, evil).err.partition(f"{source} names the Python file ")[2] == (
        f"{flag.split()[1]!r}, and reading a file runs no other; if you trust it, name it on the command line: {flag}\n"
    )


@pytest.mark.parametrize("name", ["checkpoint", "weights", "wide", "quantized", "run config"])
def test_the_command_line_may(evil: Path, name: str) -> None:
    words, _, flag = NAMED[name]
    (evil / "ran").unlink(missing_ok=True)
    good(f"{flag} {words}", evil)
    assert (evil / "ran").exists()


def test_the_unwidened_name_is_enough(evil: Path) -> None:
    done = good(f"-a {EVIL} images -e --resume-from wide.pth.tar", evil)
    assert f"=> created a {EVIL}.wide2 model" in done.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("-a digits_cnn -e --resume-from tricked.pth.tar", "checkpoint 'tricked.pth.tar' does not fit the model: "),
        ("-e --resume-from tricked.pth.tar", "names the Python file 'digits_cnn.wide2/evil.py:brightest.wide2', and"),
        ("-a digits_cnn -e --resume-from float.pth.tar", "checkpoint 'float.pth.tar' does not fit the model: "),
        ("-a digits_cnn --resume-from quantized.pth.tar", "is a quantized evil.py:brightest, not digits_cnn; drop"),
        ("-a other.py:net images -e --resume-from float.pth.tar", "there is no model file 'other.py'"),
        (
            "-a digits_cnn --pretrained --epochs 1 --compress kd.yaml --kd-teacher digits_cnn",
            "--kd-teacher and the KnowledgeDistillation at kd.yaml:2 both say how to distill; drop one of them",
        ),
    ],
    ids=["a wide name in a path", "a path", "another model", "another model, quantized", "another file", "teacher"],
)
def test_naming_something_else_does_not_run_it(evil: Path, words: str, sentence: str) -> None:
    assert sentence in harmless(words, evil).err


def test_the_name_is_quoted_for_the_shell(evil: Path) -> None:
    torch.save({"arch": "a.py:b; touch ran", "state_dict": {"a": torch.ones(1)}}, evil / "shell.pth.tar")
    done = harmless("images -e --resume-from shell.pth.tar", evil)
    assert done.err.endswith("name it on the command line: -a 'a.py:b; touch ran'\n")
