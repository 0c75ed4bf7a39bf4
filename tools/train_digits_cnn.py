"""Trains `digits_cnn` on scikit-learn's digits and writes the weights that come with the package.

    python tools/train_digits_cnn.py [OUTPUT.safetensors]

It takes less than a minute on a CPU, and gives the same weights each time on the same machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qlib.data.datasets import Split, open_dataset
from qlib.models import find_model
from qlib.models.digits_cnn import WEIGHTS, DigitsCnn

EPOCHS, BATCH_SIZE, LEARNING_RATE, SEED = 60, 64, 0.01, 0
SPREAD = 1.2


def load(split: Split) -> tuple[Tensor, Tensor]:
    """All images, (N, 1, 8, 8), and labels of a split."""
    spec = find_model("digits_cnn")
    dataset = open_dataset(spec.dataset, None, split, spec.transform, num_classes=spec.num_classes)
    images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def shifted(images: Tensor) -> Tensor:
    """The images, all moved by up to one pixel in each direction."""
    dy, dx = (int(torch.randint(-1, 2, ())) for _ in range(2))
    return torch.roll(F.pad(images, (1, 1, 1, 1), value=float(images.min())), (dy, dx), (2, 3))[..., 1:-1, 1:-1]


def spread_channels(model: DigitsCnn) -> None:
    """Starts the channels of the first two layers at scales from exp(-SPREAD) to exp(SPREAD).

    In large depthwise networks training alone makes the channels differ so, and low bit-widths suffer from it; a
    network as small as this one stays too even to show that.
    """
    for layer in (model.stem, model.depthwise):
        nn.init.uniform_(layer.get_parameter("bn.weight"), -SPREAD, SPREAD).data.exp_()


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Adam under one cycle of the learning rate."""
    steps_an_epoch = len(images) // BATCH_SIZE
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps_an_epoch)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images))[: steps_an_epoch * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(shifted(images[batch])), labels[batch]))
            optimizer.step()
            cycle.step()
    model.eval()


def main(output: Path) -> None:
    """Trains, prints the accuracy on the evaluation split and writes the weights."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    model = DigitsCnn(10)
    spread_channels(model)
    train(model, *load("train"))
    images, labels = load("val")
    with torch.inference_mode():
        top1 = 100 * (model(images).argmax(1) == labels).float().mean()
    print(f"Top1 {top1:.2f}")
    save_file(model.state_dict(), output)
    output.chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS)
