"""Models by name: architectures, layer names, transforms, pretrained weights, and a user's own file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from PIL import Image
from torch import fx

from qlib.data.datasets import open_dataset
from qlib.data.names import DATASETS
from qlib.errors import ModelError
from qlib.models import create_model, find_model, model_names
from qlib.models.names import FAMILIES
from qlib.models.transforms import evaluation_transform, known_datasets

SMALL = [name for family in FAMILIES if family != "torchvision_models" for name in FAMILIES[family].split()]


def test_listing_names_imports_no_torch() -> None:
    code = "import sys, qlib.data, qlib.models; qlib.models.model_names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_torchvision_classifiers_are_named() -> None:
    ours = FAMILIES["torchvision_models"].split()
    assert sorted(ours) == sorted(torchvision.models.list_models(module=torchvision.models))
    assert len(ours) == 80


def test_names_are_unique() -> None:
    assert len(set(model_names())) == len(model_names())


def test_the_dataset_of_each_model_is_the_one_its_name_implies() -> None:
    parts = {"cifar": "cifar10", "mnist": "mnist", "digits": "digits"}
    implied = {name: next((parts[part] for part in parts if part in name), "imagenet") for name in SMALL}
    assert {name: find_model(name).dataset for name in SMALL} == implied
    assert set(known_datasets()) == set(DATASETS)


@pytest.mark.parametrize("arch", [name for name in SMALL if "110" not in name and "182" not in name])
def test_small_models_run_and_trace(arch: str) -> None:
    spec = find_model(arch)
    with torch.device("meta"):
        model = spec.build(7).eval()
    graph = fx.symbolic_trace(model)
    assert graph(torch.zeros(2, *spec.input_shape, device="meta")).shape == (2, 7)


# Weights of convolutions and linear layers, as the ancestor's models of these names have.
@pytest.mark.parametrize(
    ("arch", "weights"),
    [
        ("resnet20_cifar", 270_896),
        ("resnet110_cifar", 1_722_416),
        ("preact_resnet20_cifar", 268_336),
        ("preact_resnet20_cifar_conv_ds", 270_896),
        ("plain20_cifar", 268_336),
        ("vgg11_cifar", 9_222_848),
        ("vgg19_bn_cifar", 20_024_000),
        ("simplenet_cifar", 61_770),
        ("simplenet_mnist", 430_500),
        ("simplenet_v2_mnist", 26_000),
    ],
)
def test_sizes(arch: str, weights: int) -> None:
    with torch.device("meta"):
        model = find_model(arch).build(10)
    assert sum(value.numel() for value in model.parameters() if value.dim() > 1) == weights


# Convolutions and linear layers of 1,000 classes as the papers' tables give them: those of the networks of the same
# depth without pre-activation, and the products of channels and kernels.
@pytest.mark.parametrize(
    ("arch", "weights"),
    [
        ("alexnet_bn", 60_961_280),
        ("preact_resnet18", 11_678_912),
        ("preact_resnet34", 21_779_648),
        ("preact_resnet50", 25_502_912),
        ("preact_resnet101", 44_442_816),
        ("preact_resnet152", 60_040_384),
        ("mobilenet", 4_209_088),
        ("mobilenet_075", 2_568_144),
        ("mobilenet_050", 1_319_648),
        ("mobilenet_025", 463_600),
        ("mobilenet_v1_dropout", 4_209_088),
        ("mobilenet_v1_dropout_050", 1_319_648),
        ("resnext101_32x4d", 44_038_848),
    ],
)
def test_sizes_for_imagenet(arch: str, weights: int) -> None:
    with torch.device("meta"):
        model = find_model(arch).build(1000)
    assert sum(value.numel() for value in model.parameters() if value.dim() > 1) == weights


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        (
            "resnet20_cifar",
            "layer2.0.conv1 layer2.0.bn1 layer2.0.relu1 layer2.0.conv2 layer2.0.bn2 layer2.0.residual_eltwiseadd "
            "layer2.0.relu2 layer2.0.downsample.0 layer2.0.downsample.1 avgpool fc",
        ),
        ("preact_resnet20_cifar", "layer2.0.pre_bn layer2.0.pre_relu layer2.0.bn layer2.0.downsample.1 final_bn fc"),
        ("plain20_cifar", "conv1 bn1 relu layer3.2.relu2 avgpool fc"),
        ("vgg11_bn_cifar", "features.0 features.1 features.28 classifier"),
        ("simplenet_cifar", "relu_conv1 pool1 relu_fc2 fc3"),
        ("simplenet_mnist", "relu1 pool2 relu3 fc2"),
        ("digits_cnn", "depthwise.conv pointwise.bn residual_eltwiseadd maxpool avgpool fc"),
        ("alexnet_bn", "features.0 features.1 features.3 features.16 classifier.1 classifier.5 classifier.6"),
        (
            "preact_resnet18",
            "conv1 bn1 relu1 layer1.0.conv1 layer1.0.bn2 layer1.0.relu2 layer1.0.conv2 layer1.0.residual_eltwiseadd "
            "layer1.1.pre_bn layer1.1.pre_relu layer2.0.downsample.0 final_bn final_relu avgpool fc",
        ),
        ("preact_resnet50", "layer1.0.downsample.0 layer1.0.relu3 layer4.2.conv3"),
        ("mobilenet", "model.0.0 model.0.2 model.1.0 model.1.1 model.1.2 model.1.3 model.13.5 model.14 fc"),
        ("mobilenet_v1_dropout", "conv1.0 conv1.2 features.0.0 features.0.4 features.12.5 classifier.0 classifier.1"),
        ("resnext101_32x4d", "conv1 layer1.0.conv2 layer1.0.downsample.1 layer3.22.bn3 fc"),
    ],
)
def test_layer_names(arch: str, names: str) -> None:
    with torch.device("meta"):
        model = find_model(arch).build(10)
    assert set(names.split()) <= {name for name, _ in model.named_modules()}


@pytest.mark.parametrize(
    ("arch", "shape"),
    [("ResNet18", (3, 224, 224)), ("inception_v3", (3, 299, 299)), ("efficientnet_b1", (3, 240, 240))],
)
def test_torchvision_transforms(arch: str, shape: tuple[int, int, int]) -> None:
    spec = find_model(arch)
    image = Image.effect_noise((400, 300), 50).convert("RGB")
    own = torchvision.models.get_model_weights(arch.lower()).DEFAULT.transforms()
    assert spec.input_shape == shape == spec.transform(image).shape
    assert torch.equal(spec.transform(image), own(image))


@pytest.mark.parametrize(
    ("dataset", "size", "shape", "value"),
    [
        ("cifar10", (32, 32), (3, 32, 32), (128 / 255 - 0.5) / 0.5),
        ("cifar100", (64, 48), (3, 32, 32), (128 / 255 - 0.5) / 0.5),
        ("mnist", (28, 28), (1, 28, 28), (128 / 255 - 0.1307) / 0.3081),
        ("digits", (8, 8), (1, 8, 8), (128 / 255 - 0.3053) / 0.3760),
    ],
)
def test_small_image_transforms(dataset: str, size: tuple[int, int], shape: tuple[int, int, int], value: float) -> None:
    image = evaluation_transform(dataset)(Image.new("RGB", size, (128, 128, 128)))
    assert image.shape == shape
    assert image.flatten().tolist() == pytest.approx([value] * image.numel(), abs=1e-6)


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_inceptions_have_no_auxiliary_heads_and_fit_the_published_weights(arch: str) -> None:
    with torch.device("meta"):
        model = find_model(arch).build(1000)
    assert model.transform_input
    assert not any("aux" in name.lower() for name, _ in model.named_parameters())


class TestPretrained:
    """Weights that ship, that are downloaded, and that do not exist."""

    def test_digits(self) -> None:
        spec = find_model("digits_cnn")
        model = create_model(spec, pretrained=True)
        dataset = open_dataset("digits", None, "val", spec.transform, num_classes=10)
        images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
        with torch.inference_mode():
            right = model(torch.stack(images)).argmax(1) == torch.tensor(labels)
        assert 100 * right.float().mean() >= 97

    def test_from_the_folder_of_torch_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        spec = find_model("squeezenet1_1")
        state = {name: torch.full_like(value, 2) for name, value in spec.build(1000).state_dict().items()}
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        torch.save(state, tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
        model = create_model(spec, pretrained=True)
        assert all(bool((value == 2).all()) for value in model.parameters())
        (tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"PK\x03\x04")
        with pytest.raises(
            ModelError, match=r"cannot read the weights of squeezenet1_1 \(.*\); delete .* and try again"
        ):
            create_model(spec, pretrained=True)

    def test_without_a_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: object, **__: object) -> None:
            raise URLError("no network")

        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr("torch.hub.download_url_to_file", fails)
        with pytest.raises(ModelError) as error:
            create_model(find_model("squeezenet1_1"), pretrained=True)
        assert str(error.value) == (
            "cannot download the weights of squeezenet1_1 from "
            "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth (<urlopen error no network>); "
            f"save that file as {tmp_path}/hub/checkpoints/squeezenet1_1-b8a52dc0.pth, "
            "or give a checkpoint with --exp-load-weights-from"
        )

    @pytest.mark.parametrize(
        ("arch", "num_classes", "sentence"),
        [
            (
                "resnet20_cifar",
                10,
                "there are no pretrained weights for resnet20_cifar; "
                "give a checkpoint with --exp-load-weights-from instead",
            ),
            (
                "digits_cnn",
                7,
                "the pretrained digits_cnn has 10 classes, not 7; "
                "give a checkpoint of your own with --exp-load-weights-from, or data with 10 classes",
            ),
        ],
        ids=["none", "other classes"],
    )
    def test_impossible(self, arch: str, num_classes: int, sentence: str) -> None:
        with pytest.raises(ModelError) as error:
            create_model(find_model(arch), num_classes=num_classes, pretrained=True)
        assert str(error.value) == sentence


USER_FILE = """
from torch import nn
import neighbour

def net(num_classes=5):
    model = nn.Sequential(nn.Flatten(), nn.Linear(neighbour.SIDE ** 2, num_classes))
    model.dataset, model.input_shape, model.num_classes = "mnist", (1, neighbour.SIDE, neighbour.SIDE), 5
    return model

def plain(num_classes):
    return nn.Linear(2, num_classes)

def fixed():
    return nn.Linear(2, 3)

def fails():
    raise KeyError("depth")

def nothing():
    return 3

def odd():
    model = nn.Linear(2, 3)
    model.input_shape = (224, 224)
    return model

def stray():
    model = nn.Linear(2, 3)
    model.dataset = "cats"
    return model
"""


class TestUserModel:
    """`-a file.py:function`."""

    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(sys, "path", list(sys.path))
        (tmp_path / "neighbour.py").write_text("SIDE = 16\n")
        file = tmp_path / "Mine.py"
        file.write_text(USER_FILE)
        return file

    def test_attributes_are_taken(self, file: Path) -> None:
        spec = find_model(f"{file}:net")
        assert (spec.dataset, spec.num_classes, spec.input_shape) == ("mnist", 5, (1, 16, 16))
        image = spec.transform(Image.new("RGB", (40, 20)))
        assert create_model(spec, num_classes=4)(image[None]).shape == (1, 4)

    @pytest.mark.parametrize(("function", "classes"), [("plain", 1000), ("fixed", 3)])
    def test_defaults(self, file: Path, function: str, classes: int) -> None:
        spec = find_model(f"{file}:{function}")
        assert (spec.dataset, spec.num_classes, spec.input_shape) == ("imagenet", 1000, (3, 224, 224))
        assert create_model(spec).out_features == classes

    @pytest.mark.parametrize(
        ("arch", "sentence"),
        [
            ("{file}", "'{file}' names no function; write it as path/to/file.py:function"),
            (
                "no.py:net",
                "there is no model file 'no.py'; give a file that exists, as path/to/file.py:function",
            ),
            (
                "{file}:nett",
                "'{file}' has no function 'nett'; define it there, returning an nn.Module; did you mean net?",
            ),
            ("{file}:fails", "'{file}:fails' fails with KeyError ('depth') at {file}:17; correct it there"),
            ("{file}:nothing", "'{file}:nothing' returns 'int', not an nn.Module; make it return the model"),
            (
                "{file}:odd",
                "'{file}:odd' has the attribute input_shape = (224, 224); make it (channels, height, width), "
                "such as (3, 224, 224)",
            ),
            (
                "{file}:stray",
                "'{file}:stray' has the attribute dataset = 'cats'; make it one of imagenet, imagefolder, cifar10, "
                "cifar100, mnist, fashion-mnist, digits",
            ),
        ],
    )
    def test_mistakes(self, file: Path, arch: str, sentence: str) -> None:
        with pytest.raises(ModelError) as error:
            find_model(arch.format(file=file))
        assert str(error.value) == sentence.format(file=file)

    def test_a_file_that_cannot_be_imported(self, tmp_path: Path) -> None:
        (tmp_path / "bad.py").write_text("def net(:\n")
        with pytest.raises(ModelError, match=r"bad.py' fails with SyntaxError \(invalid syntax"):
            find_model(f"{tmp_path}/bad.py:net")
