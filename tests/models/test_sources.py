"""Models from other packages, and what models may answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from qlib.errors import ModelError
from qlib.graph import capture, fold_batch_norm
from qlib.graph.ir import layers
from qlib.models import create_model, find_model
from qlib.models.logits import find_logits, with_logits

IMAGE = Image.new("RGB", (300, 260), (200, 20, 90))


def captured_exactly(model: nn.Module, shape: tuple[int, ...]) -> set[str]:
    """The classes of layers left in a model's folded graph, which computes what the model does."""
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    graph = capture(model, images[:2])
    fold_batch_norm(graph)
    with torch.no_grad():
        expected = model(images)
        assert torch.allclose(graph(images), expected, atol=1e-4 * float(expected.abs().max()))
    return {type(module).__name__ for _, module in layers(graph)}


class TestTimm:
    """``timm/NAME``."""

    @pytest.fixture(autouse=True)
    def needs_timm(self) -> None:
        pytest.importorskip("timm")

    @pytest.mark.parametrize(
        ("name", "absent"),
        [
            ("test_efficientnet", {"BatchNorm2d"}),
            ("test_resnet", {"BatchNorm2d"}),
            ("test_vit", {"Function"}),
            ("test_convnext", {"BatchNorm2d"}),
            ("test_byobnet", {"BatchNorm2d"}),
            ("test_nfnet", set()),
        ],
    )
    def test_a_model_is_captured(self, name: str, absent: set[str]) -> None:
        spec = find_model(f"timm/{name}")
        assert spec.transform(IMAGE).shape == spec.input_shape
        model = create_model(spec, num_classes=7)
        found = captured_exactly(model, spec.input_shape)
        assert not absent & found

    def test_an_unknown_name(self) -> None:
        with pytest.raises(ModelError, match=r"timm has no model 'resnet1'; did you mean resnet"):
            find_model("timm/resnet1")


class TestHuggingFace:
    """``hf/FOLDER``."""

    @pytest.fixture(autouse=True)
    def needs_transformers(self) -> None:
        pytest.importorskip("transformers")

    @pytest.mark.parametrize("kind", ["ViT", "ResNet", "MobileNetV2"])
    def test_a_folder(self, tmp_path: Path, kind: str) -> None:
        import transformers

        options: dict[str, Any] = {
            "ViT": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
            "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
            "MobileNetV2": {"depth_multiplier": 0.35},
        }[kind]
        config = getattr(transformers, f"{kind}Config")(image_size=64, num_labels=5, **options)
        made = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
        made.save_pretrained(tmp_path)
        spec = find_model(f"hf/{tmp_path}")
        assert spec.num_classes == 5
        model = create_model(spec, pretrained=True)
        assert spec.weights is not None
        shape = (3, 64, 64)
        images = torch.randn(2, *shape)
        with torch.no_grad():
            assert torch.equal(model(images), made(images).logits)
        captured_exactly(model, shape)

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"there is no model in the folder .*; give one that"):
            find_model(f"hf/{tmp_path}")


@dataclass
class Answer:
    features: Tensor
    scores: Tensor


LOGITS, FEATURES, OTHER = torch.zeros(2, 3), torch.zeros(2, 4, 5, 5), torch.ones(2, 8)


@pytest.mark.parametrize(
    "output",
    [LOGITS, (FEATURES, LOGITS), {"features": OTHER, "logits": LOGITS}, [LOGITS], Answer(FEATURES, LOGITS)],
    ids=["tensor", "tuple", "logits in a dictionary", "list", "dataclass"],
)
def test_logits_are_found(output: object) -> None:
    assert find_logits(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ((LOGITS, OTHER), r"'tuple' with more than one tensor that could be its logits \(number 0, number 1\)"),
        ({"a": LOGITS, "b": OTHER}, r"'dict' with more than one tensor that could be its logits \('a', 'b'\)"),
        ([FEATURES], "'list' with no tensor of logits"),
        (None, "'NoneType' with no tensor of logits"),
    ],
    ids=["tuple", "dictionary", "features", "nothing"],
)
def test_logits_that_cannot_be_told(output: object, sentence: str) -> None:
    with pytest.raises(ModelError, match=f"the model returns {sentence}; make it return its logits alone"):
        find_logits(output)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.conv(x)
        return {"features": features, "logits": self.fc(features.mean((2, 3)))}


def test_a_model_that_answers_a_dictionary_is_captured() -> None:
    model = with_logits(TwoHeads().eval())
    assert "Conv2d" in captured_exactly(model, (3, 8, 8))
