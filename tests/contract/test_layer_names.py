"""Names of layers stay what they are: statistics files and plans of earlier versions have them."""

from __future__ import annotations

import pytest
from layer_names import KNOWN, names_hash

from qlib.models import model_names

QUICK = """
    resnet18 squeezenet1_1 shufflenet_v2_x1_0 mnasnet0_5 regnet_x_400mf mobilenet_v3_small vit_b_32 alexnet
    resnet20_cifar preact_resnet20_cifar plain20_cifar vgg11_bn_cifar simplenet_cifar simplenet_mnist digits_cnn
    alexnet_bn preact_resnet18 mobilenet_025
"""


@pytest.mark.parametrize("arch", QUICK.split())
def test_names_stay(arch: str) -> None:
    assert names_hash(arch) == KNOWN[arch]


def test_all_but_the_two_largest_models_are_known() -> None:
    assert set(model_names()) - set(KNOWN) == {"vit_h_14", "regnet_y_128gf"}
