"""What moves between layers without changing the output: equalization, absorbed biases, smoothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from qlib.correct._base import CalibrationImages
from qlib.correct._pairs import find_pairs
from qlib.correct.absorb_bias import absorb_bias
from qlib.correct.equalize import equalize
from qlib.correct.smooth import smooth
from qlib.graph import Graph, NormStatistics, after_folding, capture, fold_batch_norm, norm_statistics

IMAGES = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def folded(model: nn.Module, images: Tensor = IMAGES) -> tuple[Graph, dict[str, NormStatistics]]:
    """The folded graph of a model whose batch-norms know these images, and their statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, -2.0, 2.0)
        nn.init.normal_(norm.bias)
        norm.momentum = None
    with torch.no_grad():
        model.train()(images) if norms else None
    graph = capture(model, images[:2])
    statistics = norm_statistics(graph)
    return graph, after_folding(statistics, fold_batch_norm(graph))


def change(graph: Graph, before: Tensor, images: Tensor = IMAGES) -> float:
    with torch.no_grad():
        return float((graph(images) - before).abs().max() / before.abs().max())


def pairs_of(model: nn.Module) -> list[str]:
    return [str(pair) for pair in find_pairs(capture(model.eval(), IMAGES[:2]))]


class Fork(nn.Module):
    """The first layer is used twice, the second feeds an addition, the last is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.b(x)
        x = self.c(x)
        n, channels, height, width = x.shape
        x = x.reshape(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)
        out: Tensor = self.d(self.d(x))
        return out


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        pytest.param(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3)), ["0 -> 2"], id="relu"),
        pytest.param(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 3)), ["0 -> 2"], id="relu6"),
        pytest.param(nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)), ["0 -> 2"], id="pool"),
        pytest.param(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(256, 3)), ["0 -> 2"], id="flatten"),
        pytest.param(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.Linear(64, 3)), [], id="mixed by the move"),
        pytest.param(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 3)), [], id="sigmoid"),
        pytest.param(nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(6, 4, 3)), ["0 -> 1"], id="transposed"),
        pytest.param(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3)), ["0 -> 2"], id="zeros"),
        pytest.param(Fork(), [], id="used or called twice"),
    ],
)
def test_pairs(model: nn.Module, pairs: list[str]) -> None:
    assert pairs_of(model) == pairs


def test_the_channels_of_a_pair_follow_a_flatten() -> None:
    (pair,) = find_pairs(capture(nn.Sequential(nn.Conv2d(4, 2, 5), nn.Flatten(), nn.Linear(32, 3)), IMAGES[:2]))
    assert pair.channels.tolist() == [0] * 16 + [1] * 16
    assert not pair.padded


BLOCKS = {
    "plain": lambda: [nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()],
    "depthwise": lambda: [nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU()],
    "grouped": lambda: [nn.Conv2d(4, 4, 1, groups=2), nn.ReLU()],
    "relu6": lambda: [nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6()],
    "linear": lambda: [nn.Conv2d(4, 4, 1, bias=False)],
    "transposed": lambda: [nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2), nn.ReLU()],
    "max pool": lambda: [nn.Conv2d(4, 4, 1), nn.MaxPool2d(3, 1, 1)],
    "average pool": lambda: [nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AvgPool2d(3, 1, 1)],
}


def within_six_deviations(graph: Graph, norms: Mapping[str, NormStatistics]) -> bool:
    """Whether no value reaches beyond what equalization counts on before a ReLU6: mean + 6 standard deviations."""
    seen: dict[str, Tensor] = {}
    for name in norms:
        graph.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.update({name: args[2]}))
    with torch.no_grad():
        graph(IMAGES)
    return all(bool((seen[name].amax((0, 2, 3)) <= norm.bound(6.0)).all()) for name, norm in norms.items())


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=2, max_size=5), st.integers(0, 99))
def test_equalization_keeps_the_output(names: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(*(layer for name in names for layer in BLOCKS[name]()), nn.Flatten(), nn.Linear(256, 5))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.weight.data *= torch.logspace(-1, 1, 4).view(-1, 1, 1, 1)
    graph, norms = folded(model)
    assume(within_six_deviations(graph, norms))
    with torch.no_grad():
        before = graph(IMAGES)
    lines = equalize(graph, norms)
    assert len(lines) == len(names)
    assert change(graph, before) < 1e-5


def test_equal_ranges_are_the_geometric_means_of_both() -> None:
    torch.manual_seed(0)
    graph, norms = folded(nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 3)))
    first, second = graph.get_submodule("0").weight, graph.get_submodule("2").weight
    r1, r2 = first.detach().abs().amax((1, 2, 3)), second.detach().abs().amax((0, 2, 3))
    equalize(graph, norms)
    torch.testing.assert_close(first.abs().amax((1, 2, 3)), (r1 * r2).sqrt())
    torch.testing.assert_close(second.abs().amax((0, 2, 3)), (r1 * r2).sqrt())


def test_a_chain_of_layers_converges_to_equal_ranges() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 1)]
    graph, norms = folded(nn.Sequential(*layers))
    equalize(graph, norms)
    r = [graph.get_submodule(name).weight.detach().abs() for name in ("0", "2", "4")]
    torch.testing.assert_close(r[0].amax((1, 2, 3)), r[1].amax((1, 2, 3)), rtol=1e-3, atol=0)
    torch.testing.assert_close(r[1].amax((1, 2, 3)), r[2].amax((0, 2, 3)), rtol=1e-3, atol=0)


def test_statistics_are_scaled_along() -> None:
    torch.manual_seed(0)
    graph, norms = folded(nn.Sequential(*BLOCKS["plain"](), nn.Conv2d(4, 3, 3)))
    was, bias = norms["0"], graph.get_submodule("0").bias.detach().double().clone()
    equalize(graph, norms)
    factor = graph.get_submodule("0").bias.detach().double() / bias
    torch.testing.assert_close(norms["0"].mean / was.mean, factor, rtol=1e-5, atol=0)
    torch.testing.assert_close(norms["0"].std / was.std, factor, rtol=1e-5, atol=0)


def test_through_a_relu6_only_channels_below_6_are_scaled() -> None:
    torch.manual_seed(0)
    graph, _ = folded(nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU6(), nn.Conv2d(3, 2, 1)))
    norms = {"0": NormStatistics(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.1, 0.9, 0.9]))}
    graph.get_submodule("0").weight.data.fill_(0.01)
    weight = graph.get_submodule("2").weight
    before = weight.detach().clone()
    equalize(graph, norms)
    factor = (weight.detach() / before)[0, :, 0, 0]
    assert factor[0] < 0.2
    assert factor[1] == pytest.approx(0.9)
    assert factor[2] == 1
    assert norms["0"].bound(6.0).max() == pytest.approx(6.4)
    assert norms["0"].bound(6.0)[:2].max() <= 6.0 + 1e-6


def test_a_relu6_without_batch_norm_is_left_alone() -> None:
    graph, norms = folded(nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU6(), nn.Conv2d(3, 2, 1)))
    (line,) = equalize(graph, norms)
    assert line.startswith("Not equalized: 0 -> 2, as a ReLU6 lies between")


@pytest.mark.parametrize(
    ("between", "last"),
    [
        ([nn.ReLU()], nn.Conv2d(4, 3, 3)),
        ([nn.ReLU(), nn.MaxPool2d(3, 1, 1)], nn.Conv2d(4, 3, 3, groups=1)),
        ([nn.ReLU(), nn.AvgPool2d(2)], nn.Conv2d(4, 6, 3, groups=2, bias=False)),
        ([nn.Flatten()], nn.Linear(256, 3)),
    ],
)
def test_absorbing_keeps_the_output_above_the_shift(between: list[nn.Module], last: nn.Module) -> None:
    torch.manual_seed(0)
    graph, norms = folded(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *between, last))
    with torch.no_grad():
        graph.get_submodule("0").bias += 10.0
        y = graph.get_submodule("0")(IMAGES)
        before = graph(IMAGES)
    norms["0"] = NormStatistics(torch.full((4,), float(y.min()) + 0.3), torch.full((4,), 0.1))
    (line,) = absorb_bias(graph, norms)
    assert line.startswith(f"Absorbed bias: 0 -> {len(between) + 1}, 4 of 4 channels")
    assert change(graph, before) < 1e-5
    assert norms["0"].bound(-3.0).max() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    "last", [nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, 3, padding="same"), nn.ConvTranspose2d(4, 3, 2)]
)
def test_nothing_is_absorbed_where_zeros_are_padded(last: nn.Module) -> None:
    graph, norms = folded(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), last))
    norms["0"] = NormStatistics(torch.full((4,), 9.0), torch.ones(4))
    assert absorb_bias(graph, norms) == ["Bias not absorbed: 0 -> 2, as zeros are padded between them"]


def calibration(images: Tensor, folder: Path) -> CalibrationImages:
    return CalibrationImages(lambda: iter(images.split(2)), len(images), torch.device("cpu"), folder)


PICTURES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TRANSFORMERS = {
    "vit": lambda: VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5),
    "swin": lambda: SwinTransformer([2, 2], 8, [2, 2], [2, 2], [3, 3], num_classes=5),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_smoothing_keeps_the_output_and_evens_channels(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TRANSFORMERS[name]()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.bias)
            module.weight.data[0] = 50.0
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    graph = capture(model, PICTURES[:2])
    with torch.no_grad():
        before = graph(PICTURES)
    lines = smooth(graph, calibration(PICTURES, tmp_path), 0.5)
    smoothed = {line.split()[1]: line for line in lines if line.startswith("Smoothed")}
    expected = {
        "vit": {"encoder.layers.encoder_layer_0.ln_1": "self_attention.v_proj", "encoder.ln": "heads.head"},
        "swin": {"features.1.0.norm1": "features.1.0.attn.qkv", "norm": "head", "features.2.norm": "reduction"},
    }[name]
    for norm, reader in expected.items():
        assert reader in smoothed[norm]
    assert change(graph, before, PICTURES) < 1e-5


def test_smoothing_by_the_formula(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = capture(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3)), IMAGES[:2])
    with torch.no_grad():
        x = graph.get_submodule("0")(IMAGES).abs().amax((0, 1, 2))
    weight = graph.get_submodule("1").weight
    before = weight.detach().clone()
    smooth(graph, calibration(IMAGES, tmp_path), 0.7)
    expected = x**0.7 / before.abs().amax(0) ** 0.3
    torch.testing.assert_close(weight.detach() / before, expected.expand(3, -1))
    torch.testing.assert_close(graph.get_submodule("0").weight.detach(), 1 / expected)


def test_a_layer_norm_with_other_readers_is_not_smoothed(tmp_path: Path) -> None:
    graph = capture(nn.Sequential(nn.LayerNorm(8), nn.Sigmoid(), nn.Linear(8, 3)), IMAGES[:2])
    lines = smooth(graph, calibration(IMAGES, tmp_path), 0.5)
    assert lines[0] == "Not smoothed: 0, as '1' reads it"
    assert lines[1].startswith("Nothing to smooth")


@pytest.mark.parametrize(("activation", "factor"), [(nn.ReLU(), 2.0 / 8.0), (nn.Identity(), 4.0 / 8.0)])
def test_no_channel_grows_beyond_what_its_tensor_holds(activation: nn.Module, factor: float) -> None:
    """Hardly any weights, but a bias: the factor from the ranges alone would be 0.01."""
    graph, _ = folded(nn.Sequential(nn.Conv2d(4, 2, 1), activation, nn.Conv2d(2, 3, 1)))
    first, last = (graph.get_submodule(name) for name in ("0", "2"))
    first.weight.data = torch.tensor([1.0, 1e-4]).view(2, 1, 1, 1).expand(2, 4, 1, 1).clone()
    last.weight.data.fill_(1.0)
    norms = {"0": NormStatistics(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.5]))}  # -4 to 8, -4 to 2
    before = graph(IMAGES).detach()
    equalize(graph, norms)
    torch.testing.assert_close(last.weight[0].flatten().detach(), torch.tensor([1.0, factor]))
    assert change(graph, before) < 1e-5


def test_vanishing_weights_stay() -> None:
    graph, norms = folded(nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 1)))
    graph.get_submodule("0").weight.data[1] = 1e-12
    weight = graph.get_submodule("2").weight.detach()[:, 1].clone()
    equalize(graph, norms)
    assert torch.equal(graph.get_submodule("2").weight[:, 1], weight)
