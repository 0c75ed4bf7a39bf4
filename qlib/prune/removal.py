"""What magnitude pruning removes from one weight of a model: elements, filters or input channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from qlib.graph.weights import swap_channels
from qlib.prune.magnitude import smallest_channels_mask, smallest_elements_mask, smallest_filters_mask

__all__ = ["REMOVALS", "Removal", "Weight", "weights_of"]


@dataclass(frozen=True)
class Removal:
    """What goes together: `mask` keeps the rest of a weight ``[out, in / groups, ...]``, in which it lies on `axis`.

    It is looked for in weights of as many dimensions as `dims` names.
    """

    mask: Callable[[Tensor, float], Tensor]
    axis: int | None
    dims: tuple[int, ...]


REMOVALS: Mapping[str, Removal] = {
    "element": Removal(smallest_elements_mask, None, (2, 4)),
    "filter": Removal(smallest_filters_mask, 0, (4,)),
    "channel": Removal(smallest_channels_mask, 1, (4,)),
}
"""Name on the command line -> what is removed; of filters and channels, those of convolutions."""


@dataclass(frozen=True)
class Weight:
    """A parameter of a model, and the module that holds it: a transposed convolution has its filters on axis 1."""

    name: str
    parameter: nn.Parameter
    owner: nn.Module

    def count(self, removal: Removal, level: float = 1.0) -> int:
        """How many elements, filters or channels are removed at a level: rounded down."""
        weight = swap_channels(self.owner, self.parameter.detach())
        return int(level * (weight.numel() if removal.axis is None else weight.shape[removal.axis]))

    def mask(self, removal: Removal, level: float) -> Tensor:
        """The mask, laid out as the parameter is.

        >>> layer = nn.ConvTranspose2d(2, 4, 1)
        >>> layer.weight.data[:, 3] = 0
        >>> (weight,) = weights_of(layer, REMOVALS["filter"])
        >>> weight.mask(REMOVALS["filter"], 0.25)[:, :, 0, 0]
        tensor([[ True,  True,  True, False],
                [ True,  True,  True, False]])
        """
        weight = swap_channels(self.owner, self.parameter.detach())
        return swap_channels(self.owner, removal.mask(weight, level).contiguous())


def weights_of(model: nn.Module, removal: Removal) -> list[Weight]:
    """The weights in which something can be removed, in the order of the model's parameters."""
    named = ((name, each) for name, each in model.named_parameters() if each.ndim in removal.dims)
    return [Weight(name, each, model.get_submodule(name.rpartition(".")[0])) for name, each in named]
