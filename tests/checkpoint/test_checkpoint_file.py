"""Checkpoint files: what is read, what is refused and in which words, and what fits a model."""

from __future__ import annotations

import os
import pickle
import sys
import types
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qlib.checkpoint.fit import load_state, model_state
from qlib.checkpoint.read import read_checkpoint
from qlib.checkpoint.unpickle import Inert
from qlib.checkpoint.write import write_checkpoint
from qlib.errors import CheckpointError, OutputError
from qlib.models import create_model, find_model

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
WEIGHT = {"fc.weight": torch.tensor([[1.0, 2.0]])}


class Runs:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def save(path: Path, content: Any, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.fixture
def distiller(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for Distiller's package, which exists while a checkpoint is written, and not when it is read."""
    module = types.ModuleType("distiller.thinning")
    monkeypatch.setitem(sys.modules, "distiller", types.ModuleType("distiller"))
    monkeypatch.setitem(sys.modules, "distiller.thinning", module)
    return module


LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


@LEGACY
@pytest.mark.parametrize(
    "content",
    [{"state_dict": WEIGHT, "epoch": 3, "extras": {"best_top1": 92.5, "masks": [None, True]}}, WEIGHT],
    ids=["whole", "bare state dict"],
)
def test_plain_files_are_read(tmp_path: Path, content: dict[str, Any], legacy: bool) -> None:
    checkpoint = read_checkpoint(save(tmp_path / "a.pth.tar", content, legacy))
    assert model_state(checkpoint)["fc.weight"].tolist() == [[1.0, 2.0]]
    assert checkpoint.get("epoch") == content.get("epoch")


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(WEIGHT, tmp_path / "a.safetensors")
    assert model_state(read_checkpoint(tmp_path / "a.safetensors"))["fc.weight"].tolist() == [[1.0, 2.0]]


@LEGACY
def test_objects_of_distiller_and_optimizers_become_inert(
    tmp_path: Path, distiller: types.ModuleType, legacy: bool
) -> None:
    recipe = namedtuple("ThinningRecipe", ["modules", "parameters"])
    recipe.__module__ = "distiller.thinning"
    distiller.ThinningRecipe = recipe  # type: ignore[attr-defined]
    content = {
        "state_dict": OrderedDict(WEIGHT),
        "optimizer_type": torch.optim.SGD,
        "thinning_recipes": [recipe({"conv1": 1}, {})],
        "best_top1": np.float64(92.5),
        "history": np.array([1.0, 2.0]),
        "sizes": {torch.Size([1, 2])},
        "dtype": torch.float16,
        "parameter": nn.Parameter(torch.ones(2)),
    }
    path = save(tmp_path / "a.pth.tar", content, legacy)
    del sys.modules["distiller.thinning"]
    checkpoint = read_checkpoint(path)
    assert model_state(checkpoint)["fc.weight"].tolist() == [[1.0, 2.0]]
    recipe_read = checkpoint["thinning_recipes"][0]
    assert (checkpoint["optimizer_type"].name, checkpoint["optimizer_type"].args) == ("torch.optim.sgd.SGD", None)
    assert (recipe_read.name, recipe_read.args) == ("distiller.thinning.ThinningRecipe", ({"conv1": 1}, {}))
    assert all(isinstance(checkpoint[name], Inert) for name in ("best_top1", "history", "sizes"))
    assert checkpoint["sizes"].args == ([(1, 2)],)
    assert checkpoint["dtype"] == torch.float16
    assert checkpoint["parameter"].tolist() == [1.0, 1.0]


@LEGACY
@pytest.mark.parametrize(
    ("function", "argument", "spelled"),
    [
        (os.system, "touch {mark}", rf"{os.name}.system"),
        (os.mkdir, "{mark}", rf"{os.name}.mkdir"),
        (eval, "open('{mark}', 'w')", "(builtins|__builtin__).eval"),
        (torch.load, "{mark}", "torch.serialization.load"),
    ],
    ids=["os.system", "os.mkdir", "eval", "torch.load"],
)
def test_code_is_never_run(tmp_path: Path, function: Any, argument: str, spelled: str, legacy: bool) -> None:
    mark = tmp_path / "ran"
    path = save(tmp_path / "a.pth", {"state_dict": Runs(function, argument.format(mark=mark))}, legacy)
    with pytest.raises(CheckpointError, match=f"was not loaded because it refers to '{spelled}', which could run code"):
        read_checkpoint(path)
    assert not mark.exists()


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model.pth", nn.Linear(2, 1))
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert str(error.value) == (
        f"checkpoint {str(path)!r} was not loaded because it refers to 'torch.nn.modules.linear.Linear', "
        "which could run code; save the state_dict of the model instead"
    )


def test_attributes_of_functions_cannot_be_set(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    # c: global; }: dict; (U.U.u: one item; b: build
    attack = b"\x80\x02ctorch._utils\n_rebuild_tensor\n}(U\x0cdump_patchesI01\nub."
    header = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    path.write_bytes(header + attack + pickle.dumps([], 2))
    with pytest.raises(CheckpointError, match="holds 'Inert' and no tensors by name, so it is not a checkpoint"):
        read_checkpoint(path)
    assert not hasattr(torch._utils._rebuild_tensor, "dump_patches")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.pth", None, "there is no checkpoint file {path!r}; give the path of one that exists"),
        ("a.pth", b"", "checkpoint {path!r} is empty; copy or save it again"),
        ("a.pth", b"hello", "{path!r} is not a checkpoint; give a file that torch.save wrote"),
        ("a.pth", pickle.dumps({"state_dict": {}}), "{path!r} is not a checkpoint; give a file that torch.save wrote"),
        ("a.pth", b"PK\x03\x04rest", "checkpoint {path!r} is truncated or damaged; copy or save it again"),
        ("a.safetensors", b"hello", "checkpoint {path!r} is truncated or damaged; copy or save it again"),
    ],
    ids=["missing", "empty", "text", "bare pickle", "broken zip", "broken safetensors"],
)
def test_what_is_no_checkpoint(tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert str(error.value) == sentence.format(path=str(path))


@LEGACY
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_truncated_files(tmp_path: Path, share: float, legacy: bool) -> None:
    path = save(tmp_path / "a.pth", {"state_dict": {f"layer{i}.weight": torch.ones(50) for i in range(20)}}, legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="is truncated or damaged; copy or save it again"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [([1, 2], "holds 'list' and no tensors by name"), ({}, "holds 'dict' and no tensors by name")],
    ids=["list", "empty"],
)
def test_other_contents(tmp_path: Path, content: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        read_checkpoint(save(tmp_path / "a.pth", content))


def test_a_checkpoint_without_weights() -> None:
    with pytest.raises(CheckpointError) as error:
        model_state({"epoch": 1, "arch": "resnet18"})
    assert str(error.value) == (
        "the checkpoint has no weights under 'state_dict', only epoch, arch; save model.state_dict()"
    )


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("module.conv1.weight", "conv1.weight"),
        ("features.module.0.weight", "features.0.weight"),
        ("block.module.weight", "block.module.weight"),
    ],
)
def test_data_parallel_names(name: str, own: str) -> None:
    assert list(model_state({"state_dict": {name: torch.zeros(1)}})) == [own]


def test_versions_of_layers_survive() -> None:
    model = nn.DataParallel(nn.BatchNorm2d(2))
    state = model_state({"state_dict": model.state_dict()})
    assert state._metadata == {"": {"version": 2}}  # type: ignore[attr-defined]


class TestLoadState:
    """What fits a model and what does not."""

    def test_other_number_of_classes(self) -> None:
        state = create_model(find_model("simplenet_cifar"), num_classes=100).state_dict()
        with pytest.raises(CheckpointError) as error:
            load_state(create_model(find_model("simplenet_cifar")), state, "checkpoint 'a.pth'")
        assert str(error.value) == (
            "checkpoint 'a.pth' does not fit the model: 2 of another shape (fc3.weight is 100x84 in it and 10x84 in "
            "the model, fc3.bias is 100 in it and 10 in the model); give the -a that it was made with, and data with "
            "as many classes"
        )

    def test_other_model(self) -> None:
        state = {"conv9.weight": torch.zeros(1), **nn.Sequential(OrderedDict(fc=nn.Linear(2, 1))).state_dict()}
        model = nn.Sequential(OrderedDict(head=nn.Linear(2, 1), tail=nn.Linear(1, 1)))
        with pytest.raises(CheckpointError) as error:
            load_state(model, state, "it")
        assert str(error.value) == (
            "it does not fit the model: 4 missing (head.weight, head.bias, tail.weight, ...), 3 unexpected "
            "(conv9.weight, fc.weight, fc.bias); give the -a that it was made with, and data with as many classes"
        )

    @pytest.mark.parametrize(
        ("arch", "change"),
        [
            ("googlenet", lambda state: {**state, "aux1.fc1.weight": torch.zeros(1)}),
            ("inception_v3", lambda state: {**state, "AuxLogits.fc.weight": torch.zeros(1)}),
            ("resnet20_cifar", lambda state: {k: v for k, v in state.items() if "num_batches" not in k}),
            ("mnasnet0_5", lambda state: dict(state)),
            (
                "densenet121",
                lambda state: {
                    k.replace("norm1", "norm.1").replace("conv2", "conv.2") if "denselayer" in k else k: v
                    for k, v in state.items()
                },
            ),
            *(
                (
                    arch,
                    lambda state: {
                        k.replace(".bn2.", ".bn1_2.").replace(".bn3.", ".bn2_3."): v for k, v in state.items()
                    },
                )
                for arch in ("preact_resnet18", "preact_resnet50")
            ),
            (
                "vit_b_32",
                lambda state: {
                    k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in state.items()
                },
            ),
        ],
        ids=[
            "googlenet aux",
            "inception aux",
            "old batch-norm",
            "no versions",
            "old densenet",
            "preact",
            "preact 50",
            "old vit",
        ],
    )
    def test_old_and_training_checkpoints(self, arch: str, change: Any) -> None:
        with torch.device("meta"):
            model = find_model(arch).build(7)
        model = model.to_empty(device="cpu")
        state = {name: torch.full_like(value, 3) for name, value in model.state_dict().items()}
        load_state(model, change(state), "it")
        assert all(bool((value == 3).all()) for value in model.parameters())


def test_written_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pth.tar"
    write_checkpoint(path, {"state_dict": WEIGHT, "arch": "x"})
    write_checkpoint(path, {"state_dict": WEIGHT, "arch": "y"})
    assert read_checkpoint(path)["arch"] == "y"
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth.tar"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a.pth"
    with pytest.raises(OutputError) as error:
        write_checkpoint(path, WEIGHT)
    assert str(error.value) == (
        f"cannot write checkpoint {str(path)!r} (No such file or directory); give a folder that can be written"
    )


@needs_shared
def test_a_checkpoint_of_distiller() -> None:
    path = SHARED / "checkpoints" / "resnet20_cifar_dense.pth.tar"
    checkpoint = read_checkpoint(path)
    load_state(create_model(find_model(checkpoint["arch"])), model_state(checkpoint), str(path))
    assert checkpoint["epoch"] == 179
