"""Functions of one value without ties: ONNX Runtime's codes and ours are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qlib.deploy.export import export_quantized
from qlib.deploy.session import open_session, run_session
from qlib.graph import Graph, capture
from qlib.lower import lower
from qlib.lower.fit import fit
from qlib.quant.plan import LayerPlan, Plan, TensorPlan
from qlib.quant.spec import QuantSpec

ASYM = QuantSpec.of_mode("asym_u", 8)


def planned(
    function: nn.Module, scale_in: float, zero_in: int, scale_out: float, zero_out: int = 0, spec: QuantSpec = ASYM
) -> tuple[Graph, Plan]:
    """A captured function and its plan with these grids."""
    graph = capture(nn.Sequential(function), torch.zeros(2, 256))
    given = TensorPlan(ASYM, min=-zero_in * scale_in, max=(255 - zero_in) * scale_in)
    made = TensorPlan(spec, min=-zero_out * scale_out, max=(255 - zero_out) * scale_out)
    return graph, Plan({"0": LayerPlan("float_op", (given,), output=made)})


FOUND = [
    pytest.param(0.00131511, 100, 0.0020153506, id="252.5"),
    pytest.param(0.004637492, 69, 0.0025127134, id="181.5"),
    pytest.param(0.029899469, 117, 0.00364029, id="237.5"),
    pytest.param(0.009872788, 81, 0.0030518756, id="209.5"),
]
"""Grids of sigmoids for which a code of ONNX Runtime's table was found to differ, with the value that is a tie."""


@pytest.mark.parametrize(("scale_in", "zero_in", "scale_out"), FOUND)
def test_tables_of_sigmoids(scale_in: float, zero_in: int, scale_out: float, tmp_path: Path) -> None:
    assert_same_codes(*planned(nn.Sigmoid(), scale_in, zero_in, scale_out), tmp_path)


@pytest.mark.parametrize("function", [nn.SiLU(), nn.GELU(), nn.Tanh(), nn.ELU(), nn.Softplus(), nn.Mish()], ids=repr)
def test_functions_in_float(function: nn.Module, tmp_path: Path) -> None:
    value = float(function(torch.tensor(156 * 0.02)))  # of the last code but 0; its own tie is put at 150.5
    assert_same_codes(*planned(function, 0.02, 99, value / 150.5, 100), tmp_path)


def assert_same_codes(graph: Graph, plan: Plan, folder: Path) -> None:
    """The scale has changed a little, once, and ONNX Runtime computes what the exact model does."""
    fitted, _ = fit(graph, plan)
    was, now, given = plan.layers["0"].output, fitted.layers["0"].output, plan.layers["0"].inputs[0]
    assert was is not None
    assert now is not None
    assert given is not None
    assert now.max != was.max
    assert now.max == pytest.approx(was.max, rel=1e-3)
    assert fit(graph, fitted)[0] == fitted
    model, path = lower(graph, fitted), folder / "function.onnx"
    params = given.qparams()
    images = ((torch.arange(256) - params.zero_point) * params.scale).expand(2, 256).contiguous()
    export_quantized(model, images, path, opset=17, metadata={})
    (deployed,) = run_session(open_session(path), images)
    assert torch.equal(model(images), deployed)


def test_what_has_no_ties_stays() -> None:
    graph, plan = planned(nn.Sigmoid(), 0.05, 128, 0.0039)
    assert fit(graph, plan)[0] is plan


def test_powers_of_two_stay() -> None:
    graph, plan = planned(nn.Sigmoid(), 0.004637492, 69, 0.0025127134, spec=replace(ASYM, pow2=True))
    assert fit(graph, plan)[0] == plan
