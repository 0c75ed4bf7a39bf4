"""Sigmoids without ties: ONNX Runtime's table and ours are the same."""

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


def sigmoid_plan(scale_in: float, zero_in: int, scale_out: float, spec: QuantSpec = ASYM) -> tuple[Graph, Plan]:
    """A captured sigmoid and its plan with grids of these scales."""
    graph = capture(nn.Sequential(nn.Sigmoid()), torch.zeros(2, 256))
    low = -zero_in * scale_in
    given = TensorPlan(ASYM, min=low, max=low + 255 * scale_in)
    made = TensorPlan(spec, min=0.0, max=255 * scale_out)
    return graph, Plan({"0": LayerPlan("float_op", (given,), output=made)})


TIES = [
    pytest.param(0.00131511, 100, 0.0020153506, id="252.5"),
    pytest.param(0.004637492, 69, 0.0025127134, id="181.5"),
    pytest.param(0.029899469, 117, 0.00364029, id="237.5"),
    pytest.param(0.009872788, 81, 0.0030518756, id="209.5"),
]
"""Grids for which a code of ONNX Runtime's table was found to differ, with the value that is a tie."""


@pytest.mark.parametrize(("scale_in", "zero_in", "scale_out"), TIES)
def test_tables_are_the_same(scale_in: float, zero_in: int, scale_out: float, tmp_path: Path) -> None:
    graph, plan = sigmoid_plan(scale_in, zero_in, scale_out)
    fitted, raised = fit(graph, plan)
    assert not raised
    was, now = plan.layers["0"].output, fitted.layers["0"].output
    assert was is not None
    assert now is not None
    assert now.max != was.max
    assert now.max == pytest.approx(was.max, rel=1e-4)
    assert fit(graph, fitted)[0] == fitted
    model, path = lower(graph, fitted), tmp_path / "sigmoid.onnx"
    images = (torch.arange(256.0) - zero_in) * scale_in
    images = images.expand(2, 256).contiguous()
    export_quantized(model, images, path, opset=17, metadata={})
    (deployed,) = run_session(open_session(path), images, None)
    assert torch.equal(model(images), deployed)


def test_what_has_no_ties_stays() -> None:
    graph, plan = sigmoid_plan(0.05, 128, 0.0039)
    assert fit(graph, plan)[0] is plan


def test_powers_of_two_stay() -> None:
    graph, plan = sigmoid_plan(0.004637492, 69, 0.0025127134, replace(ASYM, pow2=True))
    assert fit(graph, plan)[0] == plan
