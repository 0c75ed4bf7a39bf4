"""Three small networks in the manner of LeNet: one for CIFAR-10, two for MNIST."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlib.models.cifar import small_image_spec
from qlib.models.spec import ModelSpec


class SimplenetCifar(nn.Module):
    """Two convolutions and three linear layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.relu_conv1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.relu_conv2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.relu_fc1 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu_fc2 = nn.ReLU()
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, num_classes)."""
        x = self.pool1(self.relu_conv1(self.conv1(x)))
        x = self.pool2(self.relu_conv2(self.conv2(x)))
        x = self.relu_fc1(self.fc1(torch.flatten(x, 1)))
        out: Tensor = self.fc3(self.relu_fc2(self.fc2(x)))
        return out


class SimplenetMnist(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) -> (N, num_classes)."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        out: Tensor = self.fc2(self.relu3(self.fc1(torch.flatten(x, 1))))
        return out


class SimplenetV2Mnist(nn.Module):
    """Two convolutions, a global average and one small linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.avgpool = nn.AvgPool2d(4, stride=1)
        self.fc = nn.Linear(50, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) -> (N, num_classes)."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        out: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return out


_MODELS: dict[str, tuple[str, type[nn.Module]]] = {
    "simplenet_cifar": ("cifar10", SimplenetCifar),
    "simplenet_mnist": ("mnist", SimplenetMnist),
    "simplenet_v2_mnist": ("mnist", SimplenetV2Mnist),
}


def model_spec(arch: str) -> ModelSpec:
    """The spec of one of the three."""
    dataset, build = _MODELS[arch]
    return small_image_spec(arch, dataset, build)
