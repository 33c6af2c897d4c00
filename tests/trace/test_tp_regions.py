"""Regions from what each matrix reads: written down here by hand, not traced."""

from collections.abc import Sequence

from torch import nn

from mist.trace.tensor_parallel.tp_regions import Reader, regions_of
from mist.trace.tensor_parallel.tp_sharding import Matrix, Region, matrix_of

HIDDEN, HEADS, HEAD_DIM = 32, 4, 8


def linear(num_in: int, num_out: int) -> nn.Linear:
    return nn.Linear(num_in, num_out, bias=False, device="meta")


def matrix(module: nn.Module) -> Matrix:
    found = matrix_of(module)
    assert found is not None
    return found


def reads(
    module: nn.Module,
    *sources: nn.Module,
    residual: bool = False,
    normed: bool = False,
    is_linear: bool = False,
    attends: bool = False,
    heads_alike: bool = True,
    pairs: Sequence[nn.Linear] = (),
) -> Reader:
    matrices = map(matrix, sources)
    return Reader(
        matrix=matrix(module),
        sources={id(each.weight): each for each in matrices},
        residual=residual,
        norms=(),
        normed=normed,
        linear=is_linear,
        head_dim=HEAD_DIM if attends else None,
        heads_alike=heads_alike,
        pairs=frozenset(id(module.weight) for module in pairs),
    )


def names(layer: nn.Module, region: Region) -> dict[str, list[str]]:
    name_of = {module: name for name, module in layer.named_modules()}
    return {
        "columns": sorted(name_of[each.module] for each in region.colwise),
        "rows": sorted(name_of[each.module] for each in region.rowwise),
        "entered": sorted(name_of[each] for each in region.entered),
        "ends": sorted(name_of[each] for each in region.ends),
    }


class Adapted(nn.Module):
    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.base, self.down, self.up = (
            linear(num_in, num_out),
            linear(num_in, 2),
            linear(2, num_out),
        )


def test_a_product_of_low_rank_is_whole_where_it_is_far_from_the_heads() -> None:
    layer = nn.ModuleDict({"fc": Adapted(HIDDEN, 64), "out": Adapted(64, HIDDEN)})
    fc, out = layer["fc"], layer["out"]
    assert isinstance(fc, Adapted) and isinstance(out, Adapted)
    readers = [
        reads(fc.base, residual=True, is_linear=True),
        reads(fc.down, residual=True, is_linear=True),
        reads(fc.up, fc.down, is_linear=True),
        reads(out.base, fc.base, fc.up),
        reads(out.down, fc.base, fc.up),
        reads(out.up, out.down, is_linear=True),
    ]
    (region,) = regions_of(layer, readers)
    assert names(layer, region) == {
        "columns": ["fc.base", "fc.up"],
        "rows": ["out.base", "out.down"],
        "entered": ["fc"],
        "ends": ["out"],
    }
    assert region.unit == 64


def test_a_product_of_low_rank_right_in_a_layer_is_in_no_region() -> None:
    layer = Adapted(HIDDEN, HIDDEN)
    out = linear(HIDDEN, HIDDEN)
    layer.add_module("out", out)
    readers = [
        reads(layer.base, residual=True),
        reads(layer.down, residual=True, is_linear=True),
        reads(layer.up, layer.down, is_linear=True),
        reads(out, layer.base, layer.up),
    ]
    assert list(regions_of(layer, readers)) == []


def test_a_latent_that_all_heads_share_stays_whole() -> None:
    attention = nn.ModuleDict(
        {
            "q": linear(HIDDEN, HEADS * 12),
            "kv_a": linear(HIDDEN, 10),
            "kv_b": linear(6, HEADS * 16),
            "out": linear(HEADS * HEAD_DIM, HIDDEN),
        }
    )
    layer = nn.ModuleDict({"attention": attention})
    readers = [
        reads(attention["q"], residual=True),
        reads(attention["kv_a"], residual=True),
        reads(attention["kv_b"], attention["kv_a"], normed=True),
        reads(
            attention["out"],
            *(attention["q"], attention["kv_a"], attention["kv_b"]),
            attends=True,
            heads_alike=False,
        ),
    ]
    (region,) = regions_of(layer, readers)
    assert names(layer, region) == {
        "columns": ["attention.kv_b", "attention.q"],
        "rows": ["attention.out"],
        "entered": ["attention"],
        "ends": ["attention.out"],
    }
    assert region.unit == HEADS


def test_rows_that_share_columns_are_one_region_with_an_end_each() -> None:
    width = HEADS * HEAD_DIM
    layer = nn.ModuleDict({name: linear(HIDDEN, width) for name in ("q", "k", "v", "q2")})
    layer.update({name: linear(width, HIDDEN) for name in ("out", "out2")})
    columns = [layer[name] for name in ("q", "k", "v", "q2")]
    readers = [
        *(reads(each, residual=True) for each in columns),
        reads(layer["out"], *columns, attends=True),
        reads(layer["out2"], *columns, attends=True),
    ]
    (region,) = regions_of(layer, readers)
    assert names(layer, region)["ends"] == ["out", "out2"]
    assert region.unit == HEADS


def test_keys_and_values_in_one_matrix_are_half_as_many_heads() -> None:
    """Four heads of queries; the other matrix is as wide, so has two of keys and two of values."""
    width = HEADS * HEAD_DIM
    q, kv, out = linear(HIDDEN, width), linear(HIDDEN, width), linear(width, HIDDEN)
    layer = nn.ModuleDict({"q": q, "kv": kv, "out": out})
    readers = [
        reads(q, residual=True),
        reads(kv, residual=True),
        reads(out, q, kv, attends=True, pairs=[kv]),
    ]
    (region,) = regions_of(layer, readers)
    assert (region.unit, region.counts) == (HEADS // 2, {HEADS, HEADS // 2})
