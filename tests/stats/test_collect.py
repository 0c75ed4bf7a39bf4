"""One-pass statistics against two passes in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from qlib.errors import OutputError, StatsError
from qlib.graph import Graph, capture, fold_batch_norm
from qlib.graph.ir import layer_inputs, layers, name_of
from qlib.models.resnet_cifar import ResNetCifar
from qlib.stats.collect import MICRO_BATCH, Collector
from qlib.stats.histogram import Histogram
from qlib.stats.tensor_stats import LayerStats, TensorStats
from qlib.tensor_file import read_tensors, write_tensors

TOTAL = 100
FINGERPRINT = {"arch": "net", "samples": 20}


def images(count: int, *shape: int, seed: int = 0) -> Tensor:
    """Images whose brightness and contrast vary, so that samples differ."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(count, 1, 1, 1, generator=generator) * 2
    return torch.randn(count, *shape, generator=generator) * spread + spread


def resnet() -> tuple[Graph, Tensor]:
    torch.manual_seed(0)
    model = ResNetCifar(1, 10)
    with torch.no_grad():  # batch-norms with statistics of their own
        model.train()(images(16, 3, 32, 32, seed=1))
    graph = capture(model, torch.zeros(1, 3, 32, 32))
    fold_batch_norm(graph)
    return graph, images(20, 3, 32, 32)


class Mixed(nn.Module):
    """Ops of one, two and three inputs; moves; a constant operand; a tensor far from zero; an output of all zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.gain = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        x = torch.cat([F.relu(a), b, a], 1)[:, :8] * self.gain
        y = F.relu6(x + 300.0) - F.relu(-x * x)
        return self.fc((x + y).mean((2, 3)))


def mixed() -> tuple[Graph, Tensor]:
    return capture(Mixed(), torch.zeros(1, 3, 8, 8)), images(20, 3, 8, 8)


NETS: dict[str, Callable[[], tuple[Graph, Tensor]]] = {"resnet": resnet, "mixed": mixed}


def two_passes(graph: Graph, batch: Tensor) -> dict[str, LayerStats]:
    """The same statistics from all values at once."""
    values: dict[fx.Node, Tensor] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            values[n] = value.clone() if isinstance(value, Tensor) else value
            return value

    with torch.no_grad():
        Record(graph).run(batch)

    def stats(node: fx.Node) -> TensorStats:
        x = values[node].double().numpy()
        rows = x.reshape(len(batch), -1) if node.op != "get_attr" else x.reshape(1, -1)
        return TensorStats(
            x.size, len(rows), float(x.min()), float(x.max()), float(rows.min(1).mean()), float(rows.max(1).mean()),
            float(x.mean()), float(x.std()), float(np.abs(x - x.mean()).mean()),
        )  # fmt: skip

    return {name_of(node): LayerStats(tuple(map(stats, layer_inputs(node))), stats(node)) for node, _ in layers(graph)}


def collect(graph: Graph, batch: Tensor, size: int = 8) -> Collector:
    collector = Collector(graph)
    for part in batch.split(size):
        collector.update(part)
    return collector


def assert_close(got: TensorStats, want: TensorStats, what: str, b: float = 0.01) -> None:
    scale = max(abs(want.min), abs(want.max), 1e-30)
    assert (got.count, got.samples) == (want.count, want.samples), what
    for name in ("min", "max", "avg_min", "avg_max", "mean", "std"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-5, abs=1e-5 * scale), f"{name} of {what}"
    assert got.b == pytest.approx(want.b, rel=b, abs=1e-6 * scale), f"b of {what}"


def assert_all_close(got: dict[str, LayerStats], want: dict[str, LayerStats], b: float = 0.01) -> None:
    assert list(got) == list(want)
    for name, layer in want.items():
        assert len(got[name].inputs) == len(layer.inputs), name
        for index, (ours, theirs) in enumerate(zip(got[name].inputs, layer.inputs, strict=True)):
            assert_close(ours, theirs, f"input {index} of {name}", b)
        assert_close(got[name].output, layer.output, f"output of {name}", b)


@pytest.mark.parametrize("name", NETS)
def test_equal_to_two_passes(name: str) -> None:
    graph, batch = NETS[name]()
    assert_all_close(collect(graph, batch).result(), two_passes(graph, batch))


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "transpose": (lambda x: x.transpose(1, 2), 0),
    "swapaxes": (lambda x: x.swapaxes(1, 2), 0),
    "movedim": (lambda x: x.movedim(1, 2), 0),
    "squeeze of an axis": (lambda x: x.unsqueeze(1).squeeze(1), 0),
    "contiguous": (lambda x: x.permute(0, 2, 1).contiguous(), 0),
    "reshape": (lambda x: x.reshape(-1, 8, 2, 4).flatten(2), 0),
    "roll": (lambda x: x.roll(1, 1), 0),
    "a part": (lambda x: x[:, :4], 1),
    "padding": (lambda x: F.pad(x, (0, 0, 1, 1)), 1),
}


@pytest.mark.parametrize(("move", "more"), MOVES.values(), ids=MOVES)
def test_what_only_moves_all_values_is_not_measured_again(move: Callable[[Tensor], Tensor], more: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(move(self.first(x)))  # type: ignore[no-any-return]

    collector = Collector(capture(Net(), torch.zeros(2, 8, 8)))
    collector.update(torch.randn(4, 8, 8))
    assert len(collector._nodes) == 3 + more
    found = collector.result()
    assert (found["second"].inputs[0] == found["first"].output) == (not more)


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_batch_size_does_not_matter(size: int) -> None:
    graph, batch = mixed()
    assert_all_close(collect(graph, batch, size).result(), two_passes(graph, batch))


def test_channels_last_does_not_matter() -> None:
    graph, batch = resnet()
    want = two_passes(graph, batch)
    moved = capture(graph, batch[:1]).to(memory_format=torch.channels_last)
    got = collect(moved, batch.contiguous(memory_format=torch.channels_last)).result()
    assert list(got) == list(want)
    for name, layer in want.items():
        assert_close(got[name].output, layer.output, name)


def test_first_batch_unlike_the_rest() -> None:
    """All but b are exact still; b, whose pivot is the mean so far, is worse where a tenth of the images mislead it."""
    graph, _ = mixed()
    batch = images(10 * MICRO_BATCH, 3, 8, 8)
    batch[:MICRO_BATCH] = batch[:MICRO_BATCH] * 0.5 - 1
    assert_all_close(collect(graph, batch, 32).result(), two_passes(graph, batch), b=0.2)


def test_halves_merge_into_the_whole() -> None:
    graph, batch = resnet()
    left, right = (collect(graph, part).result() for part in (batch[:8], batch[8:]))
    want = two_passes(graph, batch)
    merged = {
        name: LayerStats(
            tuple(a.merge(b) for a, b in zip(layer.inputs, right[name].inputs, strict=True)),
            layer.output.merge(right[name].output),
        )
        for name, layer in left.items()
    }
    assert list(merged) == list(want)
    for name, layer in want.items():
        ours, theirs = merged[name].output, layer.output
        assert (ours.count, ours.samples, ours.min, ours.max) == (theirs.count, theirs.samples, theirs.min, theirs.max)
        for field in ("avg_min", "avg_max", "mean", "std"):
            assert getattr(ours, field) == pytest.approx(getattr(theirs, field), rel=1e-5, abs=1e-5), (name, field)
        assert ours.b == pytest.approx(theirs.b, rel=0.05), name


@pytest.mark.parametrize("cut", [8, 12])
def test_a_killed_collection_resumes_to_the_same_bits(tmp_path: Path, cut: int) -> None:
    graph, batch = mixed()
    path = tmp_path / "deep" / "partial.safetensors"
    batches = batch.split(4)
    whole, first, second = Collector(graph), Collector(graph), Collector(graph)
    for part in batches:
        whole.update(part)
    for part in batches[: cut // 4]:
        first.update(part)
    first.save(path, FINGERPRINT)
    assert second.load(path, FINGERPRINT, TOTAL) == cut
    assert second.samples == cut
    for part in batches[cut // 4 :]:
        second.update(part)
    got, want = second.result(), whole.result()
    assert [astuple(layer) for layer in got.values()] == [astuple(layer) for layer in want.values()]
    assert [path.name for path in path.parent.iterdir()] == [path.name], "no temporary file is left"


def test_images_that_were_left_out_count_as_consumed(tmp_path: Path) -> None:
    graph, batch = mixed()
    first, second = Collector(graph), Collector(graph)
    first.update(batch[:5], consumed=8)
    first.save(tmp_path / "partial", FINGERPRINT)
    assert second.load(tmp_path / "partial", FINGERPRINT, TOTAL) == 8
    assert second.samples == 5


def other_fingerprint(path: Path, collector: Collector) -> None:
    collector.save(path, {**FINGERPRINT, "arch": "other"})


def truncated(path: Path, collector: Collector) -> None:
    collector.save(path, FINGERPRINT)
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    "write", [other_fingerprint, truncated, lambda path, collector: None], ids=["other", "truncated", "absent"]
)
def test_what_cannot_be_resumed_starts_anew(tmp_path: Path, write: Callable[[Path, Collector], None]) -> None:
    graph, batch = mixed()
    write(tmp_path / "partial", collect(graph, batch))
    fresh = Collector(graph)
    assert fresh.load(tmp_path / "partial", FINGERPRINT, TOTAL) == 0
    assert fresh.samples == 0


def edited(**values: Tensor) -> Callable[[Path, Collector], None]:
    """A partial file with other tensors, whole in itself."""

    def write(path: Path, collector: Collector) -> None:
        collector.save(path, FINGERPRINT)
        tensors, texts = read_tensors(path, ours=True)
        write_tensors(path, {**tensors, **values}, "statistics", texts)

    return write


@pytest.mark.parametrize(
    "write",
    [
        edited(consumed=torch.tensor([TOTAL + 1.0]).double()),
        edited(consumed=torch.tensor([-1.0]).double()),
        edited(samples=torch.tensor([50.0]).double()),
        edited(samples=torch.tensor([0.0]).double()),
        edited(samples=torch.tensor([float("nan")]).double()),
        edited(s1=torch.zeros(3).double()),
        edited(min=torch.ones(17).bool()),
        edited(more=torch.zeros(3)),
    ],
    ids=["too many", "below 0", "more than consumed", "none", "NaN", "shape", "type", "more"],
)
def test_a_state_that_cannot_be_is_not_taken_up(tmp_path: Path, write: Callable[[Path, Collector], None]) -> None:
    graph, batch = mixed()
    write(tmp_path / "partial", collect(graph, batch))
    fresh = Collector(graph)
    assert fresh.load(tmp_path / "partial", FINGERPRINT, TOTAL) == 0
    assert fresh.samples == 0


def test_a_state_without_our_hash_is_not_taken_up(tmp_path: Path) -> None:
    graph, batch = mixed()
    collect(graph, batch).save(tmp_path / "partial", FINGERPRINT)
    tensors, texts = read_tensors(tmp_path / "partial")
    save_file(tensors, tmp_path / "partial", texts)
    assert Collector(graph).load(tmp_path / "partial", FINGERPRINT, TOTAL) == 0


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    graph, batch = mixed()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write the statistics so far .*; give a folder that can be written"):
        collect(graph, batch).save(tmp_path / "file" / "partial", FINGERPRINT)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_name_the_layer(bad: float) -> None:
    graph, batch = resnet()
    layer = graph.get_submodule("layer2.0.conv1")
    assert isinstance(layer.bias, Tensor)
    layer.bias.data[3] = bad
    with pytest.raises(StatsError, match=r"the output of 'layer2\.0\.conv1' holds NaN or infinity"):
        collect(graph, batch)


def test_an_image_that_is_not_finite_is_found_in_its_batch() -> None:
    graph, _ = mixed()
    batch = images(2 * MICRO_BATCH, 3, 8, 8)
    batch[MICRO_BATCH + 1, 0, 0, 0] = float("nan")
    with pytest.raises(StatsError, match=f"in images {MICRO_BATCH} to {2 * MICRO_BATCH - 1} of the calibration set"):
        collect(graph, batch)


def test_no_images() -> None:
    with pytest.raises(StatsError, match=r"no image was seen.*calibrate on at least one image"):
        Collector(mixed()[0]).result()


def test_memory_does_not_grow_with_images(tmp_path: Path) -> None:
    graph, batch = mixed()
    sizes = []
    for count in (8, 20):
        collect(graph, batch[:count]).save(tmp_path / str(count), FINGERPRINT)
        sizes.append((tmp_path / str(count)).stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 16  # digits in the header


def test_stats_of_a_constant_operand() -> None:
    graph, batch = mixed()
    gain = graph.get_parameter("gain").detach()
    stats = collect(graph, batch).result()["mul"].inputs[1]
    assert (stats.min, stats.max) == (float(gain.min()), float(gain.max()))
    assert stats.shape == (8, 1, 1)


def with_histograms(graph: Graph, batches: list[Tensor]) -> Collector:
    collector = Collector(graph, histograms=True)
    for part in batches:
        collector.update(part)
    return collector


@pytest.mark.parametrize("name", NETS)
def test_histograms_count_all_of_small_tensors(name: str) -> None:
    graph, batch = NETS[name]()
    batch = batch[:4]
    values: dict[str, np.ndarray] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                values[name_of(n) if n.op == "call_module" else n.name] = value.numpy().copy()
            return value

    with torch.no_grad():
        Record(graph).run(batch)
    got = with_histograms(graph, [batch]).result()
    for node, module in layers(graph):
        stats, x = got[name_of(node)].output, values[name_of(node)]
        assert stats.histogram is not None
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            assert stats.histogram.total == sampled(x.size)
            assert stats.histogram.zeros <= (x == 0).sum()
        elif sampled(x.size) == x.size:
            assert stats.histogram == Histogram.of(x)
        assert stats.histogram.low <= stats.min
        assert stats.max <= stats.histogram.high


def sampled(size: int) -> int:
    """How many values of a tensor are counted."""
    return size if size // 1021 < 64 else size // 1021 * 127


def test_histograms_change_nothing_else() -> None:
    graph, batch = resnet()
    plain, rich = collect(graph, batch).result(), with_histograms(graph, list(batch.split(8))).result()
    for name, layer in rich.items():
        assert replace(layer.output, histogram=None) == plain[name].output


def test_histograms_of_halves_merge_into_those_of_the_whole() -> None:
    graph, batch = mixed()
    left, right, whole = (with_histograms(graph, [part]).result() for part in (batch[:8], batch[8:], batch))
    for name, layer in whole.items():
        assert left[name].output.histogram is not None
        if name not in ("relu", "relu_1", "relu6"):  # those keep the finer bins of the parts
            assert left[name].output.merge(right[name].output).histogram == layer.output.histogram, name


def test_a_killed_collection_of_histograms_resumes_to_the_same_bits(tmp_path: Path) -> None:
    graph, batch = resnet()
    path, batches = tmp_path / "partial.safetensors", list(batch.split(4))
    first, second = with_histograms(graph, batches[:3]), Collector(graph, histograms=True)
    first.save(path, FINGERPRINT)
    assert second.load(path, FINGERPRINT, TOTAL) == 12
    for part in batches[3:]:
        second.update(part)
    assert second.result() == with_histograms(graph, batches).result()
    assert Collector(graph).load(path, FINGERPRINT, TOTAL) == 0, "one without histograms begins anew"
    collect(graph, batch).save(path, FINGERPRINT)
    assert Collector(graph, histograms=True).load(path, FINGERPRINT, TOTAL) == 0
