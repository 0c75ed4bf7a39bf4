"""Other names of layers, which are understood wherever a file or a flag names a layer; what is written has ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

__all__ = ["in_own_names", "spellings_of"]

T = TypeVar("T")

_BLOCK = r"(?P<block>(?:.*\.)?layer\d+\.\d+\.)"

_ALIASES: tuple[tuple[str, str, str], ...] = (
    # Distiller's ResNets of torchvision: a module for each ReLU of a block, which has one that is used again
    (rf"{_BLOCK}relu", r"\g<block>relu1", r"\g<block>relu_1"),
    (rf"{_BLOCK}relu_1", r"\g<block>relu2", r"\g<block>relu"),
    (rf"{_BLOCK}relu_2", r"\g<block>relu3", r"\g<block>relu"),
    # Distiller's pre-activation ResNets for ImageNet: between which convolutions they stand
    (rf"{_BLOCK}(?P<kind>bn|relu)2", r"\g<block>\g<kind>1_2", ""),
    (rf"{_BLOCK}(?P<kind>bn|relu)3", r"\g<block>\g<kind>2_3", ""),
    # Distiller's MobileNet-v2: its additions are modules
    (r"(?P<block>features\.\d+\.)add", r"\g<block>residual_eltwiseadd", ""),
    # torchvision's DenseNets before 0.3, as their published weights are
    (r"(?P<block>.*denselayer\d+\.(?:norm|conv))(?P<number>[12])", r"\g<block>.\g<number>", ""),
)
"""Our name, as a regular expression of the whole, the other name, and a layer that must be there too, if any."""


def spellings_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Each of a model's names of layers -> itself, and how it is called elsewhere.

    Law: no two layers share a spelling, and a name of the model's own is never another layer's.

    >>> spellings_of(["layer1.0.relu", "layer1.0.relu_1"])["layer1.0.relu_1"]
    ('layer1.0.relu_1', 'layer1.0.relu2')
    >>> spellings_of(["layer1.0.relu", "layer1.0.relu1"])["layer1.0.relu"]
    ('layer1.0.relu',)
    """
    own = dict.fromkeys(names)
    return {name: (name, *_aliases(name, own)) for name in own}


def _aliases(name: str, own: Mapping[str, None]) -> Iterable[str]:
    for pattern, other, beside in _ALIASES:
        match = re.fullmatch(pattern, name)
        if match and (not beside or match.expand(beside) in own) and match.expand(other) not in own:
            yield match.expand(other)


def in_own_names(entries: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    """Entries by the name of a layer, with the model's own `names`; what names none of its layers stays as it is.

    So does an entry beside one that has the layer's own name.

    >>> in_own_names({"layer1.0.relu2": 3, "fc": 4}, ["layer1.0.relu", "layer1.0.relu_1", "fc"])
    {'layer1.0.relu_1': 3, 'fc': 4}
    """
    own = {other: name for name, (_, *others) in spellings_of(names).items() for other in others}
    taken = own.values() & entries.keys()
    return {name if own.get(name) in taken else own.get(name, name): value for name, value in entries.items()}
