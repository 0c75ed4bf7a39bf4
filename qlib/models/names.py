"""The names of all models, by family: a literal, so that listing them imports nothing.

A family is a file beside this one with a function `model_spec(arch) -> ModelSpec`.
"""

from __future__ import annotations

import shlex

from qlib.errors import UsageError

FAMILIES: dict[str, str] = {
    "torchvision_models": """
        alexnet convnext_base convnext_large convnext_small convnext_tiny
        densenet121 densenet161 densenet169 densenet201
        efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5
        efficientnet_b6 efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s
        googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3
        mobilenet_v2 mobilenet_v3_large mobilenet_v3_small
        regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf
        regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf
        regnet_y_8gf
        resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d resnext101_64x4d resnext50_32x4d
        shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1
        swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t
        vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn
        vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2
    """,
    "resnet_cifar": "resnet20_cifar resnet32_cifar resnet44_cifar resnet56_cifar resnet110_cifar",
    "preact_resnet_cifar": """
        preact_resnet20_cifar preact_resnet32_cifar preact_resnet44_cifar
        preact_resnet56_cifar preact_resnet110_cifar preact_resnet182_cifar
        preact_resnet20_cifar_conv_ds preact_resnet32_cifar_conv_ds preact_resnet44_cifar_conv_ds
        preact_resnet56_cifar_conv_ds preact_resnet110_cifar_conv_ds preact_resnet182_cifar_conv_ds
    """,
    "plain_cifar": "plain20_cifar plain20_cifar_nobn",
    "vgg_cifar": """
        vgg11_cifar vgg13_cifar vgg16_cifar vgg19_cifar vgg11_bn_cifar vgg13_bn_cifar vgg16_bn_cifar vgg19_bn_cifar
    """,
    "simplenet": "simplenet_cifar simplenet_mnist simplenet_v2_mnist",
    "digits_cnn": "digits_cnn",
    "alexnet_bn": "alexnet_bn",
    "preact_resnet": "preact_resnet18 preact_resnet34 preact_resnet50 preact_resnet101 preact_resnet152",
    "mobilenet_v1": """
        mobilenet mobilenet_025 mobilenet_050 mobilenet_075
        mobilenet_v1_dropout mobilenet_v1_dropout_025 mobilenet_v1_dropout_050 mobilenet_v1_dropout_075
    """,
    "resnext": "resnext101_32x4d",
}

SOURCES = {"timm/": "timm_models", "hf/": "hf_models"}
"""How names of models of other packages begin, and the family that finds them."""


def model_names() -> list[str]:
    """Every model name, family after family.

    >>> len(model_names()), model_names()[0], "resnet20_cifar" in model_names()
    (126, 'alexnet', True)
    """
    return [name for names in FAMILIES.values() for name in names.split()]


def family_of(arch: str) -> str | None:
    """The family (a module of this package) that has `arch`, or None.

    >>> family_of("vgg11_bn_cifar"), family_of("vgg12")
    ('vgg_cifar', None)
    """
    return next((family for family, names in FAMILIES.items() if arch in names.split()), None)


def names_python_file(arch: str) -> bool:
    """Whether a model's name is that of a user's own file, which is run to build it.

    >>> names_python_file("models/mine.py:net"), names_python_file("resnet18")
    (True, False)
    """
    return ".py" in arch


def refuse_python_file(arch: str, source: str, flag: str, named: str | None = None) -> None:
    """Lets a file, `source`, name the model `arch` only if no Python file runs for it, or the user named that one too.

    `named` is what the command line gave with `flag`.

    Raises:
        UsageError: `arch` is another Python file than the one that the command line names.

    >>> refuse_python_file("mine.py:net", "a.yaml", "-a", named="mine.py:net")
    >>> refuse_python_file("mine.py:net", "a.yaml", "-a")
    Traceback (most recent call last):
    qlib.errors.UsageError: a.yaml names the Python file 'mine.py:net', and reading a file runs no other; if you trust \
it, name it on the command line: -a mine.py:net
    """
    if names_python_file(arch) and arch != named:
        raise UsageError(
            f"{source} names the Python file {arch!r}, and reading a file runs no other; if you trust it, name it on"
            f" the command line: {flag} {shlex.quote(arch)}"
        )
