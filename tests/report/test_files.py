"""Files are whole or not there at all: writes that fail, writers that meet, disks that are full."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runs import run

from qlib import files
from qlib.checkpoint.write import write_checkpoint
from qlib.correct._stream import Buffer
from qlib.errors import OutputError
from qlib.files import append_csv, reserve, scratch_folder, write_csv, write_text, write_whole
from qlib.quant.plan import LayerPlan, Plan
from qlib.quant.plan_file import write_plan
from qlib.stats.stats_file import write_stats
from qlib.stats.tensor_stats import LayerStats, ModelStats, TensorStats
from qlib.tensor_file import read_tensors, write_tensors

MANY = 3000
TENSORS = {"weight": torch.arange(MANY, dtype=torch.float32)}
RECORD = TensorStats(count=1, samples=1, min=0.0, max=1.0)


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """A disk on which no file can grow beyond `size` bytes: what is written after that fails, as on a full one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ValueError(), KeyboardInterrupt()]
)
def test_a_write_that_fails_midway_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise failure

    told = OutputError if isinstance(failure, OSError) else type(failure)
    for writer in (write_whole,):
        with pytest.raises(told) as error:
            writer(path, write, "plan")
        assert path.read_text() == "old"
        assert names(tmp_path) == {"plan.yaml"}
    if told is OutputError:
        sentence = f"cannot write plan {str(path)!r} (No space left on device); make room for it"
        assert str(error.value) == sentence


def write_onnx(path: Path) -> None:
    ir = pytest.importorskip("onnx_ir")
    weight = ir.tensor(TENSORS["weight"].numpy(), name="weight")
    value = ir.Value(name="weight", const_value=weight, type=ir.TensorType(weight.dtype), shape=weight.shape)
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 20}), ir_version=10)
    write_whole(path, lambda file: ir.save(model, file, external_data=f"{path.name}.data"), "ONNX model")


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "text\n" * MANY, "text"),
    "table": lambda path: write_csv(path, ["number"], [[number] for number in range(MANY)]),
    "row": lambda path: append_csv(path, {"text": "long" * MANY}),
    "plan": lambda path: write_plan(path, Plan({f"layer{i}": LayerPlan("relu", (None,)) for i in range(MANY)})),
    "statistics": lambda path: write_stats(path, ModelStats({f"{i}": LayerStats((), RECORD) for i in range(MANY)})),
    "tensors": lambda path: write_tensors(path, TENSORS, "weights"),
    "checkpoint": lambda path: write_checkpoint(path, {"state_dict": TENSORS}),
    "small checkpoint": lambda path: write_checkpoint(path, {"epoch": 3}),
    "onnx": write_onnx,
    "reserved": lambda path: reserve(path, 4 * MANY, "activations"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("existed", [False, True], ids=["new", "old"])
def test_a_full_disk_is_a_sentence_and_changes_nothing(tmp_path: Path, name: str, existed: bool) -> None:
    path, before = tmp_path / "file", "a table\n" * existed
    if existed:
        path.write_text(before)
    with room_for(100), pytest.raises(OutputError) as error:
        WRITERS[name](path)
    reason = "3000 requested and 25 written" if name == "onnx" else "File too large"
    assert str(error.value).startswith("cannot write ")
    assert str(error.value).endswith(f" {str(path)!r} ({reason}); make room for it")
    assert names(tmp_path) == ({"file"} if existed else set())
    assert not existed or path.read_text() == before
    WRITERS[name](path)
    assert path.stat().st_size > 100
    assert names(tmp_path) == ({"file", "file.data"} if name == "onnx" else {"file"})


def test_activations_for_which_the_disk_has_no_room_are_a_sentence(tmp_path: Path) -> None:
    with Buffer(tmp_path, limit=0) as buffer:
        with room_for(100), pytest.raises(OutputError, match=r"cannot write activations '.*1\.bin' \(File too large\)"):
            buffer.keep(TENSORS["weight"])
        assert torch.equal(buffer.keep(TENSORS["weight"]), TENSORS["weight"])
    assert names(tmp_path) == set()


def test_a_full_folder_for_temporary_files_is_a_sentence(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from qlib.deploy.session import open_session

    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="relu" * 100)
    graph = onnx.helper.make_graph([node], "graph", [value], [other])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    with room_for(10), pytest.raises(OutputError, match=r"cannot write temporary file '.*' \(it was not taken whole\)"):
        open_session(model.SerializeToString(), optimized=tmp_path / "optimized.onnx")


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "state"

    def first(temporary: Path) -> None:
        temporary.write_text("fir")
        write_text(path, "second", "state")
        assert path.read_text() == "second"
        assert temporary.read_text() == "fir"
        temporary.write_text("first")

    write_whole(path, first, "state")
    assert path.read_text() == "first"
    assert names(tmp_path) == {"state"}


def test_tables_have_one_dialect(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    append_csv(path, {"model": "fp32", "top1": 92.1337})
    append_csv(path, {"model": 'the "8", bits', "top1": None, "agreement": 99.5})
    assert path.read_bytes() == b'model,top1,agreement\nfp32,92.1337,\n"the ""8"", bits",,99.5\n'
    write_csv(path, ("a", "b"), [])
    assert path.read_bytes() == b"a,b\n"
    with pytest.raises(
        OutputError, match=r"^cannot write table 'no/such\.csv' \(No such file or directory\); give a fold"
    ):
        append_csv(Path("no/such.csv"), {"a": 1})


def test_a_file_and_its_parts_appear_together(tmp_path: Path) -> None:
    def write(file: Path) -> None:
        file.write_text("model")
        file.with_name(f"{file.name}.data").write_text("weights")
        assert names(tmp_path) == {file.parent.name}

    write_whole(tmp_path / "a.onnx", write, "model")
    assert names(tmp_path) == {"a.onnx", "a.onnx.data"}


def test_a_scratch_folder_is_gone_afterwards(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "stats") as folder:
        (folder / "activations").touch()
        assert folder.parent == tmp_path / "stats"
    assert names(tmp_path / "stats") == set()
    (tmp_path / "taken").touch()
    with (
        pytest.raises(OutputError, match=r"cannot write temporary folder '.*taken' \(File exists\)"),
        scratch_folder(tmp_path / "taken"),
    ):
        pass


def test_what_a_block_of_a_scratch_folder_raises_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), scratch_folder(tmp_path):
        (tmp_path / "no").read_text()


def test_tensors_and_texts_are_read_back(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a/b.safetensors", TENSORS, "weights", {"key": "value"}, parents=True)
    tensors, texts = read_tensors(tmp_path / "a/b.safetensors")
    assert torch.equal(tensors["weight"], TENSORS["weight"])
    assert texts == {"key": "value"}
    for content in (b"", b"{}", (tmp_path / "a/b.safetensors").read_bytes()[:-1]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(OSError, match="header"):
            read_tensors(tmp_path / "bad")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "absent")


DIGITS = "-a digits_cnn --pretrained"
QUANTIZE = f"{DIGITS} --quantize-eval --qe-calibration 0.02 --etes 0.02"
RUNS = [
    ("statistics", QUANTIZE, "stats/digits_cnn_digits.yaml", "statistics"),
    ("statistics so far", QUANTIZE, "*.partial.safetensors", "the statistics so far"),
    ("plan", QUANTIZE, "layer_quant_params.yaml", "plan"),
    ("checkpoint", QUANTIZE, "quantized_checkpoint.pth.tar", "checkpoint"),
    ("metrics", QUANTIZE, "metrics.csv", "table"),
    ("settings", QUANTIZE, "run_config.yaml", "settings"),
    ("summary", f"{DIGITS} --summary compute", "compute.csv", "table"),
    ("ONNX", f"{DIGITS} --export-onnx float.onnx", "float.onnx", "ONNX model"),
    ("encodings", f"{QUANTIZE} --export-encodings ort", "*_ort.json", "encodings"),
]


@pytest.mark.parametrize(("words", "pattern", "what"), [row[1:] for row in RUNS], ids=[row[0] for row in RUNS])
def test_a_full_disk_ends_a_run_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, pattern: str, what: str
) -> None:
    told = files.told

    @contextlib.contextmanager
    def full(what: str, path: Path) -> Iterator[None]:
        with told(what, path), room_for(10) if path.match(pattern) else contextlib.nullcontext():
            yield

    monkeypatch.setattr(files, "told", full)
    done = run(words, tmp_path)
    assert done.code == 2, done
    assert done.err.startswith(f"compress.py: error: cannot write {what} '")
    assert done.err.endswith("' (File too large); make room for it\n")
    assert not [path for path in tmp_path.rglob("*") if path.match(pattern) or path.match(".*")]
