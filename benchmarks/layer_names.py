"""The names and kinds of all layers of all models by name, against those that statistics files and plans have.

    python benchmarks/layer_names.py [MODEL ...]

`layer_names.json` holds a hash for each model, of the names that the first version gave; those of Swin v2, MaxViT and
the pre-activation ResNets are of later ones (see CHANGELOG.md). Prints the models whose names differ, and exits with 1
then.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from qlib.graph import capture, kind_of
from qlib.graph.ir import layers, name_of
from qlib.models import find_model

KNOWN: dict[str, str] = json.loads(Path(__file__).with_suffix(".json").read_text())


def names_hash(arch: str) -> str:
    """The hash of names and kinds of the layers of a model, in the order of execution."""
    spec = find_model(arch)
    graph = capture(spec.build(spec.num_classes).eval(), torch.zeros(2, *spec.input_shape))
    text = "\n".join(f"{name_of(node)} {kind_of(module)}" for node, module in layers(graph))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> int:
    """Compares them."""
    differ = 0
    for arch in sys.argv[1:] or KNOWN:
        same = names_hash(arch) == KNOWN[arch]
        differ += not same
        print(f"{arch}: {'the same' if same else 'other names'}", flush=True)
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
