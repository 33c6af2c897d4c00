"""One call of a torch operation as the dispatcher sees it, with its arguments by name."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, slots=True)
class Call:
    """One dispatched call with its arguments by name."""

    func: OpOverload
    arguments: Mapping[str, object]
    out: object

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor argument."""
        value = self.arguments[name]
        assert isinstance(value, torch.Tensor), (self.func, name)
        return value

    @property
    def first_out(self) -> torch.Tensor:
        """The result, or the first of several."""
        value = self.out[0] if isinstance(self.out, tuple | list) else self.out
        assert isinstance(value, torch.Tensor), self.func
        return value


def bind(
    func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """The arguments of a call by name, in the schema's order and with its defaults."""
    schema = func._schema.arguments
    by_name = {a.name: value for a, value in zip(schema, args, strict=False)} | dict(kwargs)
    return {a.name: by_name.get(a.name, a.default_value) for a in schema}


def key_of(tensor: torch.Tensor) -> int:
    """The identity of a tensor's storage while it is alive."""
    # The address of the memory's owner, which all views share.
    key: int = tensor.untyped_storage()._cdata
    return key


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors of an argument or a result, which may be nested."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
