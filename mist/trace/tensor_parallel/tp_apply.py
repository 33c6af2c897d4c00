"""What keeps `mist apply` from dividing matrices, or tokens, whose costs the trace knows."""

from collections.abc import Sequence, Set

from torch import nn

from mist.trace.tensor_parallel.local_sizes import UNKNOWN
from mist.trace.tensor_parallel.tp_sharding import Matrix, Sharding, matrix_of


def undivided(model: nn.Module, sharding: Sharding) -> str | None:
    """Why the regions of a model cannot be divided, as the end of a sentence; None if they can.

    Only linear layers can, transformers' Conv1D, and parameters with a matrix for each expert.
    """
    modules = {id(module): (name, module) for name, module in model.named_modules()}
    for region in sharding.regions:
        if region.columns == region.rows:  # experts, torch's attention: one module with both
            continue
        rows = dict(sorted(modules[each] for each in region.rows))
        row = next(filter(None, map(matrix_of, rows.values())), None)
        for name, module in {**rows, **dict(sorted(modules[e] for e in region.columns))}.items():
            matrix = matrix_of(module)
            if matrix is None or row is None:
                return f"{name} is a {type(module).__name__}, which mist apply does not divide"
            if name not in rows and widths_in(sharding, matrix, row) == UNKNOWN:
                return f"{name} holds several matrices in one, of unknown widths"
    return None


def whole_sequence(model: nn.Module, sharding: Sharding, exposed: Set[int]) -> str | None:
    """Why ranks cannot have a part of the tokens between regions; None if they can.

    `exposed`: column-parallel modules (by id) that no module around them was given the input for.
    """
    modules = {id(module): (name, module) for name, module in model.named_modules()}
    inside = {id(m) for key in sharding.whole & modules.keys() for m in modules[key][1].modules()}
    for region in sharding.regions:
        columns = [matrix_of(modules[each][1]) for each in region.columns]
        name, row = min(modules[each] for each in region.rows)
        separate = not region.ends & inside and region.entered & exposed
        if separate and attends(sharding, matrix_of(row), columns):
            return (
                f"attention around {name} is not in a module of its own that is given the "
                "activation"
            )
    return None


def attends(sharding: Sharding, row: Matrix | None, columns: Sequence[Matrix | None]) -> bool:
    """Whether columns are queries, keys and values: three matrices, or of unlike widths."""
    matrices = [matrix for matrix in columns if matrix is not None]
    if row is None:
        return False
    widths = [width for matrix in matrices for width in widths_in(sharding, matrix, row)]
    return len(widths) > 2 or len(set(widths)) > 1


def widths_in(sharding: Sharding, matrix: Matrix, row: Matrix) -> tuple[int, ...]:
    """The widths of the matrices that a column-parallel one holds side by side, or `UNKNOWN`.

    The model cuts its outputs into them. `row`: the row-parallel matrix behind it.
    """
    is_one = matrix.num_out <= row.num_in and id(matrix.weight) not in sharding.pairs
    single = (matrix.num_out,) if is_one else UNKNOWN
    return sharding.fused.get(id(matrix.module), single)
