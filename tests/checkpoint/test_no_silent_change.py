"""What enters a model is what was written: types, shapes, ranges, and the hash of plan and integers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qlib.checkpoint.fit import load_state, model_state
from qlib.checkpoint.quantized import QuantizedHeader, quantized_checkpoint, read_header, restore_quantized
from qlib.checkpoint.read import read_checkpoint
from qlib.checkpoint.write import write_checkpoint
from qlib.config.layers.resolve import resolve
from qlib.config.layers.settings import LayerSettings, PtqConfig
from qlib.errors import CheckpointError
from qlib.graph import Graph, capture
from qlib.lower import lower
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class TestFloatWeights:
    """Floats may be of another width; nothing else is cast, whatever kind of file it comes from."""

    @staticmethod
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("everything", [False, True], ids=["floats", "the counter too"])
    def test_allowed(self, dtype: torch.dtype, everything: bool) -> None:
        model = self.model()
        state = {
            name: value.to(dtype) if everything or value.is_floating_point() else value
            for name, value in model.state_dict().items()
        }
        load_state(model, state, "it")
        assert torch.equal(model.state_dict()["0.weight"], state["0.weight"].float())

    @pytest.mark.parametrize(
        ("name", "dtype", "sentence"),
        [
            ("0.weight", torch.int8, "it holds 0.weight as int8; allowed: float16, bfloat16, float32, float64; save"),
            ("0.bias", torch.int64, "it holds 0.bias as int64; allowed: float16, bfloat16, float32, float64; save"),
            ("1.running_mean", torch.bool, "it holds 1.running_mean as bool; allowed: float16, bfloat16, "),
            ("1.weight", torch.complex64, "it holds 1.weight as complex64; allowed: float16, bfloat16, "),
            ("1.bias", torch.float8_e4m3fn, "it holds 1.bias as float8_e4m3fn; allowed: float16, bfloat16, "),
            ("1.running_var", torch.uint16, "it holds 1.running_var as uint16; allowed: float16, bfloat16, "),
            ("1.num_batches_tracked", torch.bool, "it holds 1.num_batches_tracked as bool; allowed: int64, "),
        ],
        ids=["int8", "int64", "bool", "complex64", "float8", "uint16", "counter"],
    )
    @pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
    def test_refused(self, tmp_path: Path, name: str, dtype: torch.dtype, sentence: str, kind: str) -> None:
        model = self.model()
        state = {**model.state_dict(), name: torch.ones_like(model.state_dict()[name]).to(dtype)}
        path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
        if kind == "safetensors":
            save_file(state, path)
        else:
            torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
        with pytest.raises(CheckpointError) as error:
            load_state(model, model_state(read_checkpoint(path)), "it")
        assert str(error.value).startswith(sentence)
        assert str(error.value).endswith("save model.state_dict() with the types of the model")

    def test_several_are_counted(self) -> None:
        model = self.model()
        state = {name: value.to(torch.int32) for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"^it holds 0\.weight and 6 more as int32; allowed: "):
            load_state(model, state, "it")


def graph() -> Graph:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    return capture(nn.Sequential(*layers), IMAGES[:2])


def quantized(*, bits: int = 8, mode: str = "asym_u", bits_bias: int = 32) -> dict[str, Any]:
    """A quantized checkpoint as it is written."""
    collector, model = Collector(graph()), graph()
    collector.update(IMAGES)
    settings = LayerSettings(bits_weights=bits, mode_weights=mode, bits_bias=bits_bias)
    plan = plan_post_train_linear(
        model, resolve(PtqConfig(settings), layer_infos(model)), ModelStats(collector.result())
    )
    return quantized_checkpoint(QuantizedHeader("net", "images", 3, plan), lower(model, plan), {})


WRITTEN = {"8 bits": quantized(), "4 bits": quantized(bits=4, mode="sym"), "bias of 16": quantized(bits_bias=16)}
CODES, SCALE, ZERO, BIAS = "0.weight_codes", "0.weight_scale", "0.weight_zero_point", "0.bias_codes"


def restored(checkpoint: dict[str, Any]) -> nn.Module:
    return restore_quantized(checkpoint, read_header(checkpoint, "it"), graph(), "it")


def test_what_was_written_is_restored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, checkpoint in WRITTEN.items():
        write_checkpoint(tmp_path / name, checkpoint)
        state = restored(read_checkpoint(tmp_path / name)).state_dict()
        assert all(torch.equal(state[key], value) for key, value in checkpoint["state_dict"].items())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_file_without_a_hash_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    old = {key: value for key, value in WRITTEN["8 bits"].items() if key != "hash"}
    read_header(old, "it")
    assert [record.getMessage() for record in caplog.records] == [
        "Warning: it has no hash, so that a change of its plan would not be noticed; write it again with"
        " --quantize-eval, which adds one"
    ]


def first_is(value: float, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """A change of the first number of a tensor, after one of its type."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.to(dtype or tensor.dtype).clone()
        changed.view(-1)[0] = value
        return changed

    return change


RULED_OUT = [
    pytest.param("8 bits", CODES, lambda t: t.int(), "0.weight_codes as a tensor of int32, 5x3x3x3, where", id="int32"),
    pytest.param(
        "8 bits", CODES, lambda t: t.char(), "0.weight_codes as a tensor of int8, 5x3x3x3, where", id="signed"
    ),
    pytest.param(
        "8 bits", CODES, first_is(0.5, torch.float32), "0.weight_codes as a tensor of float32", id="fractions"
    ),
    pytest.param(
        "8 bits", CODES, first_is(float("nan"), torch.float32), "codes as a tensor of float32", id="NaN codes"
    ),
    pytest.param("8 bits", CODES, lambda t: t[:4], "0.weight_codes as a tensor of uint8, 4x3x3x3, where", id="shape"),
    pytest.param(
        "4 bits", CODES, first_is(8), r"0.weight_codes from -\d to 8, which the plan bounds to -8 to 7", id="8"
    ),
    pytest.param(
        "4 bits", CODES, first_is(-9), "0.weight_codes from -9 to 7, which the plan bounds to -8 to 7", id="-9"
    ),
    pytest.param(
        "8 bits", SCALE, first_is(0.0), "0.weight_scale from 0 to 0, which the plan bounds to 1", id="scale 0"
    ),
    pytest.param("8 bits", SCALE, first_is(-1.0), "0.weight_scale from -1 to -1, which the", id="scale below 0"),
    pytest.param("8 bits", SCALE, first_is(float("inf")), "NaN or infinity in 0.weight_scale; it", id="scale infinite"),
    pytest.param("8 bits", SCALE, first_is(float("nan")), "NaN or infinity in 0.weight_scale; it", id="scale NaN"),
    pytest.param("8 bits", SCALE, lambda t: t.double(), "0.weight_scale as a tensor of float64", id="scale float64"),
    pytest.param("8 bits", ZERO, first_is(256), "0.weight_zero_point from 256 to 256, which the plan", id="zero point"),
    pytest.param(
        "4 bits", ZERO, first_is(1), "zero_point from 1 to 1, which the plan bounds to 0 to 0", id="symmetric"
    ),
    pytest.param(
        "8 bits", BIAS, first_is(2.0**40, torch.int64), "0.bias_codes as a tensor of int64, 5", id="bias 2^40"
    ),
    pytest.param(
        "bias of 16", BIAS, first_is(2**15), "to 32768, which the plan bounds to -32768 to 32767", id="bias 2^15"
    ),
]


@pytest.mark.parametrize(("which", "name", "change", "sentence"), RULED_OUT)
def test_integers_that_the_plan_rules_out(
    which: str, name: str, change: Callable[[Tensor], Tensor], sentence: str
) -> None:
    checkpoint = copy.deepcopy(WRITTEN[which])
    checkpoint["state_dict"][name] = change(checkpoint["state_dict"][name])
    with pytest.raises(
        CheckpointError, match=r"^the plan or the integers in it were changed after it was written; copy"
    ):
        restored(checkpoint)
    del checkpoint["hash"]
    with pytest.raises(CheckpointError, match=f"^it holds .*{sentence}") as error:
        restored(checkpoint)
    assert str(error.value).endswith("it is damaged: write it again with --quantize-eval")


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("plan", "bits: 8", "bits: 4"),
        ("plan", "max: 1.7296", "max: 9.7296"),
        ("plan", "mode: asym_u", "mode: asym_s"),
        ("arch", "net", "ten"),
        ("num_classes", 3, 4),
        ("hash", "", "x"),
    ],
    ids=["bits", "range", "mode", "model", "classes", "hash"],
)
def test_an_edited_plan_is_refused(key: str, old: Any, new: Any) -> None:
    checkpoint = dict(WRITTEN["8 bits"])
    before = checkpoint[key]
    checkpoint[key] = before.replace(old, new, 1) if isinstance(before, str) else new
    assert checkpoint[key] != before
    with pytest.raises(CheckpointError) as error:
        read_header(checkpoint, "it")
    assert str(error.value) == (
        "the plan or the integers in it were changed after it was written; copy it again, or change the plan in"
        " layer_quant_params.yaml and give that with --quantize-eval --qe-config-file"
    )


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("num_classes", -1, "has the num_classes -1; allowed: a whole number from 1 to 100000"),
        ("num_classes", 0, "has the num_classes 0; allowed: a whole"),
        ("num_classes", True, "has the num_classes True; allowed: a whole"),
        ("num_classes", 10**12, "has the num_classes 1000000000000; allowed: a whole"),
        ("num_classes", 3.0, "has the num_classes 3.0; allowed: a whole"),
        ("arch", "a\x1b[2J", r"has the arch 'a\\x1b\[2J'; allowed: text of 1 to 1000 printable characters"),
        ("arch", "", "has the arch ''; allowed: text"),
        ("arch", "a" * 5000, r"has the arch 'a{59}\.\.\.; allowed: text"),
        ("dataset", None, "has the dataset None; allowed: text"),
        ("plan", b"x", "has the plan a bytes; allowed: text"),
        ("version", 2, "is of version 2, not 1"),
        ("version", "1", "is of version '1', not 1"),
    ],
    ids=lambda value: None if isinstance(value, str) and " " in value else str(value)[:12],
)
def test_headers_that_are_none(key: str, value: Any, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=f"^the quantized checkpoint it {sentence}") as error:
        read_header({**WRITTEN["8 bits"], key: value}, "it")
    assert str(error.value).endswith("; write it again with --quantize-eval")


def test_integers_of_another_plan_are_refused() -> None:
    mixed = {**WRITTEN["8 bits"], "plan": WRITTEN["4 bits"]["plan"]}
    del mixed["hash"]
    with pytest.raises(
        CheckpointError, match=r"0.weight_codes as a tensor of uint8, 5x3x3x3, where the plan gives a tensor"
    ):
        restored(mixed)
