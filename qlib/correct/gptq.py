"""GPTQ: weights are rounded one input after the other, and the rest of the row makes up for each error."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlib.correct._base import CORRECTIONS, CalibrationImages
from qlib.correct._stream import Buffer, Stream, track_nodes
from qlib.correct._write_back import write_back
from qlib.graph import Graph
from qlib.lower.fake import FakeLayer, FakeWeight, fake_quantize, lower_fake
from qlib.quant.plan import Plan
from qlib.stats.gram import gram

__all__ = ["gptq", "round_rows"]

DAMPING = 0.01
"""Added to the diagonal of the Hessian, as a share of its mean."""


@CORRECTIONS.register("gptq", order=10, choice="rounding", images=True)
@torch.no_grad()
def gptq(graph: Graph, plan: Plan, images: CalibrationImages) -> Plan:
    """Rounds the weights of convolutions and linear layers, layer after layer; those of `graph` are set to that.

    ``min |W x_q - W~ x_q|^2`` for the inputs x_q that the fake-quantized layers before it give. Transposed convolutions
    are rounded to nearest.

    References: Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers",
    2023, section 3; Frantar and Alistarh, "Optimal brain compression", 2022.
    """
    fake = lower_fake(graph, plan)
    with Buffer(images.folder) as buffer:
        stream = Stream(fake, images.batches(), buffer)
        for node in track_nodes(fake, "GPTQ"):
            layer = fake.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, FakeLayer) and isinstance(layer.weight, FakeWeight):
                _round_layer(layer, layer.weight, [layer.inputs[0](x) for x in stream[node.all_input_nodes[0]]])
            stream.advance(node)
    return write_back(graph, fake, plan)


def _round_layer(layer: FakeLayer, rounding: FakeWeight, inputs: list[Tensor]) -> None:
    module = layer.module
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        return
    groups = getattr(module, "groups", 1)
    rows = torch.unflatten(module.weight.detach().flatten(1), 0, (groups, -1))  # [groups, out, in]
    hessian = sum((gram(module, x) for x in inputs), torch.zeros(()))
    shape = (groups, rows.shape[1], 1)

    def per_row(values: Tensor) -> Tensor:
        return values.reshape(-1, 1).expand(len(module.weight), 1).reshape(shape)

    scale, low, high = (per_row(values) for values in (rounding.scale, rounding.low, rounding.high))
    rounded = [round_rows(*parts) for parts in zip(rows, hessian, scale, low, high, strict=True)]
    module.weight.copy_(torch.cat(rounded).view_as(module.weight))


def round_rows(rows: Tensor, hessian: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Rounded ``rows [out, in]`` that change ``rows @ x`` little for inputs with ``sum x x^T = hessian [in, in]``.

    In the order of falling diagonal of the Hessian, each column is rounded to ``clamp(round(w / s), low, high) * s``
    (s, low and high ``[out, 1]``), and its error e spread over the columns that are left:
    ``w_j -= e * U_ij / U_ii`` with U the Cholesky factor of the inverse Hessian.

    What is 0 stays 0: pruned weights are not rounded, and what rounding left for them goes on to the others.

    Two inputs that are always equal: what rounding takes from one weight, the other gets.

    >>> ones = torch.ones(1, 1)
    >>> round_rows(torch.tensor([[0.4, 0.4]]), torch.ones(2, 2).double(), ones, -8 * ones, 7 * ones)
    tensor([[0., 1.]])
    """
    rows, hessian = rows.double(), hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    order = torch.argsort(diagonal, descending=True, stable=True)
    diagonal += DAMPING * diagonal.mean()
    pruned = rows[:, order] == 0
    left, hessian = rows[:, order], hessian[order][:, order]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for i in range(left.shape[1]):
        column = left[:, i]
        code = fake_quantize(column[:, None].float(), scale, low, high)[:, 0].double()
        code[pruned[:, i]] = 0.0
        error = (column - code) / factor[i, i]
        left[:, i] = code
        left[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    rounded = torch.empty_like(left)
    rounded[:, order] = left
    return rounded.float()
