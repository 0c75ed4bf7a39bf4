"""Masks at work in training: what a step leaves zero, and what the optimizer forgets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import good
from saved import contents
from torch import Tensor, nn

from qlib.errors import ModelError
from qlib.models import create_model, find_model
from qlib.prune.masks import masks_of_zeros
from qlib.train.masking import LASTING, Masking, Mode
from qlib.train.policy import Batch

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.1, weight_decay=0.01),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.01),
}
BATCH = Batch(0, 0, [0], torch.zeros(1), torch.zeros(1))
MASK = torch.tensor([[True, False, True], [False, True, True]])


class _Steps:
    """A linear layer that trains under a mask."""

    def __init__(self, optimizer: str = "sgd", masks: dict[str, Tensor] | None = None) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.masking = Masking(self.layer, masks or {})
        self.optimizer = OPTIMIZERS[optimizer](list(self.layer.parameters()))
        self.masking.use(self.optimizer, 1)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight.detach()

    def step(self) -> Tensor:
        """Takes a step; the weights of the forward pass."""
        self.masking.on_minibatch_begin(BATCH)
        seen = self.weight.clone()
        self.optimizer.zero_grad()
        self.layer(torch.ones(4, 3)).square().sum().backward()
        self.masking.before_optimizer_step()
        self.optimizer.step()
        self.masking.on_minibatch_end(BATCH)
        return seen


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_pruned_stays_zero_and_the_rest_trains(optimizer: str) -> None:
    run = _Steps(optimizer)
    run.step()
    run.masking.set("weight", MASK)
    before = run.weight.clone()
    for _ in range(3):
        run.step()
        assert torch.equal(run.weight != 0, MASK)
    assert not torch.equal(run.weight[MASK], before[MASK])
    for kept in run.optimizer.state[run.layer.weight].values():
        if kept.shape == MASK.shape:
            assert torch.equal(kept != 0, MASK)


def test_what_comes_back_has_no_momentum_of_its_first_life() -> None:
    run = _Steps()
    run.step()
    run.masking.set("weight", MASK)
    run.masking.set("weight", torch.ones_like(MASK))
    momentum = run.optimizer.state[run.layer.weight]["momentum_buffer"]
    assert torch.equal(momentum != 0, MASK)


MODES = [
    pytest.param(Mode(forward_only=True), False, "from zero", id="forward only"),
    pytest.param(Mode(forward_only=True, gradients=True), False, "zero", id="forward only, gradients too"),
    pytest.param(Mode(double_copies=True), False, "from where they were", id="double copies"),
    pytest.param(LASTING, True, "zero", id="lasting"),
]


@pytest.mark.parametrize(("mode", "lasting", "dead"), MODES)
def test_modes(mode: Mode, lasting: bool, dead: str) -> None:
    run = _Steps()
    before = run.weight.clone()
    run.masking.set("weight", MASK, mode)
    assert torch.equal(run.weight == 0, ~MASK) == lasting
    assert torch.equal(run.step() == 0, ~MASK)
    now, was = run.weight[~MASK], before[~MASK]
    moved = run.layer.weight.grad
    assert moved is not None
    if dead == "zero":
        assert bool((now == 0).all())
    else:
        start = was if dead == "from where they were" else torch.zeros(2)
        decayed = moved[~MASK] + 0.01 * start
        assert torch.allclose(now, start - 0.1 * decayed)
    with run.masking.deployed():
        assert bool((run.weight[~MASK] == 0).all())
    assert torch.equal(run.weight[~MASK], now)
    run.masking.keep("weight")
    assert torch.equal(run.weight == 0, ~MASK)


def test_a_scale_is_that_of_the_forward_pass_alone() -> None:
    run = _Steps()
    before = run.weight.clone()
    run.masking.set("weight", MASK, Mode(double_copies=True, scale=2.0))
    assert torch.equal(run.step(), before * MASK * 2)
    assert not torch.equal(run.weight, before)


def test_the_state_goes_on_as_it_was() -> None:
    run = _Steps()
    run.masking.set("weight", MASK, Mode(double_copies=True, scale=2.0))
    other = Masking(run.layer, run.masking.masks)
    other.load_state_dict(run.masking.state_dict())
    assert other.state_dict() == run.masking.state_dict()
    assert run.masking.state_dict()["scale"] == {"weight": 2.0}


def test_parts_in_the_memory_of_a_parameter_are_masked() -> None:
    """As the projections of an attention train, which its quantized graph holds one by one."""
    layer = nn.Linear(3, 4)
    top, bottom = (nn.Parameter(layer.weight.detach()[half]) for half in (slice(2), slice(2, 4)))
    optimizer = torch.optim.SGD([top, bottom], lr=1.0, momentum=0.9)
    masking = Masking(layer, {})
    masking.use(optimizer, 1)
    mask = torch.cat([MASK, ~MASK])
    for part in (top, bottom):
        part.grad = torch.ones(2, 3)
    optimizer.step()
    masking.set("weight", mask)
    masking.before_optimizer_step()
    assert torch.equal(torch.cat([top.grad, bottom.grad]) != 0, mask)  # type: ignore[list-item]
    assert torch.equal(optimizer.state[bottom]["momentum_buffer"] != 0, ~MASK)
    optimizer.step()
    assert torch.equal(layer.weight != 0, mask)


def test_a_write_past_the_masks_is_told() -> None:
    run = _Steps(masks={"weight": MASK})
    run.masking.on_epoch_begin(0)
    run.layer.weight.data += 1
    with pytest.raises(ModelError, match=r"^2 weights of 'weight' that were pruned are not zero after epoch 3: "):
        run.masking.on_epoch_end(3, {})


def pruned(folder: Path) -> dict[str, Tensor]:
    """A checkpoint whose masks zero half of two weights; the masks."""
    state = dict(create_model(find_model("digits_cnn"), pretrained=True).state_dict())
    masks = {name: torch.rand(state[name].shape) < 0.5 for name in ("fc.weight", "wide.conv.weight")}
    found = {name: torch.where(masks[name], value, 0) if name in masks else value for name, value in state.items()}
    distillers = {f"module.{name}": mask.float() for name, mask in masks.items()}
    content = {"arch": "digits_cnn", "state_dict": found, "compression_sched": {"masks_dict": distillers}}
    torch.save(content, folder / "pruned.pth")
    return masks


def test_training_on_keeps_masks_unless_they_are_dropped(tmp_path: Path) -> None:
    masks = pruned(tmp_path)
    fast = "--epochs 1 --lr 0.01 -b 64 --etrs 0.2 --evs 0.1 --etes 0.1"
    kept = good(f"--resume-from pruned.pth {fast}", tmp_path)
    checkpoint = contents(kept.folder / "checkpoint.pth.tar")
    assert {name: mask.dtype for name, mask in checkpoint["masks"].items()} == dict.fromkeys(masks, torch.uint8)
    for name, mask in masks.items():
        assert torch.equal(checkpoint["state_dict"][name] != 0, mask)
    again = good(f"--resume-from {kept.folder}/best.pth.tar {fast} --epochs 2", tmp_path)
    state = contents(again.folder / "checkpoint.pth.tar")["state_dict"]
    assert all(torch.equal(state[name] != 0, mask) for name, mask in masks.items())
    assert not torch.equal(state["fc.weight"], checkpoint["state_dict"]["fc.weight"])
    dropped = good(f"--exp-load-weights-from {kept.folder}/best.pth.tar {fast}", tmp_path)
    checkpoint = contents(dropped.folder / "checkpoint.pth.tar")
    assert "masks" not in checkpoint
    assert int((checkpoint["state_dict"]["fc.weight"] == 0).sum()) == 0


def test_masks_last_through_training_in_integers(tmp_path: Path) -> None:
    masks = pruned(tmp_path)
    (tmp_path / "qat.yaml").write_text(
        "quantizers: {q: {class: QuantAwareTrainRangeLinearQuantizer, bits_activations: 8, bits_weights: 8}}\n"
        "policies: [{quantizer: {instance_name: q}, starting_epoch: 0, ending_epoch: 1, frequency: 1}]\n"
    )
    fast = "--epochs 1 --lr 0.01 -b 64 --etrs 0.2 --evs 0.1 --etes 0.1"
    done = good(f"--resume-from pruned.pth --compress qat.yaml {fast}", tmp_path)
    checkpoint = contents(done.folder / "checkpoint.pth.tar")
    model = create_model(find_model("digits_cnn"))
    model.load_state_dict(checkpoint["state_dict"])
    found = masks_of_zeros(model)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    integers = checkpoint["quantized"]["state_dict"]
    codes = [value for name, value in integers.items() if "fc" in name and value.dtype == torch.int8]
    assert any(bool((value[~masks["fc.weight"]] == 0).all()) for value in codes if value.shape == (10, 128))
