"""A layer in the form of a level: what conversion makes of it, and the layer as it was."""

import copy

import torch
from torch import nn

from mist.layers import RUNGS, convert_layer, layer_form


class Gated(nn.Module):
    """A norm and a gated product around three matrices, with a layer of its own in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.inner = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x + self.inner[0](x)


def kept_bytes(layer: nn.Module, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Bytes that autograd keeps besides the parameters, and the result."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    return sum(kept.values()), y


def tables(layer: nn.Module) -> list[dict[str, object]]:
    """Attributes of all modules, hooks by number."""
    return [
        {name: len(value) if "hooks" in name else value for name, value in vars(module).items()}  # type: ignore[arg-type]
        for module in layer.modules()
    ]


def test_a_form_keeps_what_the_converted_layer_keeps_and_comes_off_again() -> None:
    torch.manual_seed(0)
    layer, x = Gated(), torch.randn(2, 3, 8, requires_grad=True)
    before, (plain_bytes, plain) = tables(layer), kept_bytes(layer, x)
    for level in RUNGS:
        converted, other = copy.deepcopy(layer), Gated()
        other.load_state_dict(layer.state_dict())
        convert_layer(converted, level)
        expected = kept_bytes(converted, x)[0]
        form = layer_form(layer, level)
        # The form of one layer fits another of its kind, and leaves no trace on either.
        for each in (layer, other):
            with form.worn_by(each, each.forward):
                found, y = kept_bytes(each, x)
            assert found == expected < plain_bytes
            torch.testing.assert_close(y, plain)
        assert tables(layer) == before
        assert kept_bytes(other, x)[0] == plain_bytes
