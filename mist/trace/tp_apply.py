"""What keeps `mist apply` from dividing matrices whose shares and costs the trace knows."""

from torch import nn

from mist.trace.tp import Sharding


def undivided(model: nn.Module, sharding: Sharding) -> str | None:
    """Why the regions of a model cannot be divided, as the end of a sentence; None if they can.

    Only plain linear layers that hold one matrix each can, and nothing may stay whole on a rank.
    """
    if sharding.whole:
        return "it has experts or attention that every rank would hold whole"
    modules = {id(module): (name, module) for name, module in model.named_modules()}
    for key, colwise in sharding.regions.items():
        _, row = modules[key]
        for name, module in (modules[key], *sorted(modules[each] for each in colwise)):
            if type(module) is not nn.Linear:
                kind = type(module).__name__
                return f"{name} is a {kind}, and mist apply divides torch.nn.Linear only"
            if module is not row and module.out_features > row.in_features:
                return f"{name} holds several matrices in one"
    return None
