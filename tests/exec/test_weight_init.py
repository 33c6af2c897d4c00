"""Initial weights: the same whichever part is drawn, and what the module's own class would give."""

import math

import pytest
import torch
from torch import nn

from mist.exec.build import weight_init as draw
from mist.exec.build.weight_init import Drawn, initial_values

CPU = torch.device("cpu")
SHAPES = [(), (7,), (9, 4), (3, 8, 5), (2, 3, 6, 4)]


class Parts(nn.Module):
    """Parameters of every number of dimensions, initialised in every way that can be noted."""

    def __init__(self) -> None:
        super().__init__()
        for index, shape in enumerate(SHAPES):
            self.register_parameter(f"p{index}", nn.Parameter(torch.empty(shape)))

    def reset_parameters(self) -> None:
        for index, parameter in enumerate(self.parameters()):
            nn.init.trunc_normal_(parameter, std=0.3, a=-0.5, b=0.5)
            if parameter.dim():
                nn.init.zeros_(parameter[1])
                parameter.data[0].fill_(float(index))


def values(module: nn.Module, seed: int = 3) -> dict[str, draw.Whole]:
    return dict(initial_values(module.to("meta"), "", seed, CPU))


def whole(value: draw.Whole, shape: tuple[int, ...]) -> torch.Tensor:
    return value[tuple(slice(0, size) for size in shape)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "BLOCK_ELEMENTS", 8)


def test_any_part_is_that_of_the_whole() -> None:
    found = values(Parts())
    for shape, value in zip(SHAPES, found.values(), strict=True):
        assert isinstance(value, Drawn)
        every = whole(value, shape)
        cuts = [
            tuple(slice(size // 3, size) for size in shape),
            tuple(slice(0, max(size // 2, 1)) for size in shape),
            tuple(slice(size - 1, size) for size in shape),
        ]
        for cut in cuts:
            assert torch.equal(value[cut], every[cut])


def test_everything_that_is_done_to_a_parameter_is_done() -> None:
    for index, (shape, value) in enumerate(zip(SHAPES, values(Parts()).values(), strict=True)):
        every = whole(value, shape)
        assert every.abs().max() <= max(0.5, index)
        if shape:
            assert torch.equal(every[0], torch.full(shape[1:], float(index)))
            assert not every[1].any()
            rest = every[2:]
            assert rest.unique().numel() == rest.numel()


def test_names_and_seeds_draw_apart() -> None:
    one, again, other = (values(nn.Linear(8, 8), seed) for seed in (1, 1, 2))
    shape = (8, 8)
    assert torch.equal(whole(one["weight"], shape), whole(again["weight"], shape))
    assert not torch.equal(whole(one["weight"], shape), whole(other["weight"], shape))
    linear = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to("meta")
    first, second = (initial_values(linear, name, 1, CPU)["weight"] for name in "01")
    assert not torch.equal(whole(first, shape), whole(second, shape))


@pytest.mark.parametrize("kind", ["linear", "embedding", "norm", "conv"])
def test_numbers_are_spread_as_torch_spreads_them(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "BLOCK_ELEMENTS", 1 << 12)
    made = {
        "linear": lambda: nn.Linear(300, 200),
        "embedding": lambda: nn.Embedding(500, 120, padding_idx=3),
        "norm": lambda: nn.LayerNorm(400),
        "conv": lambda: nn.Conv2d(16, 64, 5),
    }[kind]
    torch.manual_seed(0)
    theirs = dict(made().named_parameters())
    for name, value in values(made()).items():
        assert isinstance(value, Drawn), name
        mine, known = whole(value, tuple(theirs[name].shape)), theirs[name].detach()
        # Five standard errors of a mean, and of a standard deviation, of so many numbers.
        error = 5 * known.std(correction=0) / math.sqrt(known.numel())
        assert abs(mine.mean() - known.mean()) <= 2 * error + 1e-7
        assert abs(mine.std(correction=0) - known.std(correction=0)) <= 2 * error + 1e-7
        assert mine.abs().max() <= known.abs().max() * 1.5 + 1e-7
    if kind == "embedding":
        assert not whole(values(made())["weight"], (500, 120))[3].any()


class Odd(nn.Linear):
    """Initialised by an operation on the whole matrix."""

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)


def test_what_is_not_a_list_of_draws_is_done_as_it_is() -> None:
    found = values(Odd(6, 6))
    weight = whole(found["weight"], (6, 6))
    assert not isinstance(found["weight"], Drawn)
    torch.testing.assert_close(weight @ weight.T, torch.eye(6), rtol=0, atol=1e-5)
    assert torch.equal(weight, whole(values(Odd(6, 6))["weight"], (6, 6)))


class Outer(nn.Module):
    """A model that sets a matrix of the module around it, after all matrices."""

    def __init__(self, spread: float, inner: nn.Module) -> None:
        super().__init__()
        self.spread, self.inner = spread, inner
        self.pair = nn.ModuleDict({"scaled": nn.Linear(40, 40), "plain": nn.Linear(40, 40)})

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.spread)
        elif isinstance(module, nn.ModuleDict):
            nn.init.normal_(module["scaled"].weight, std=self.spread / 10)


def test_modules_around_and_models_within_say_how() -> None:
    model = Outer(0.5, Outer(0.05, nn.Identity())).to("meta")
    expected = {"pair.scaled": 0.05, "pair.plain": 0.5,
                "inner.pair.scaled": 0.005, "inner.pair.plain": 0.05}  # fmt: skip
    for name, spread in expected.items():
        found = whole(initial_values(model, name, 1, CPU)["weight"], (40, 40)).std().item()
        # 1,600 numbers: five standard errors are 5 / sqrt(2 * 1600), 9 %.
        assert found == pytest.approx(spread, rel=0.09), name


def test_the_model_is_left_as_it_was() -> None:
    model = Parts().to("meta")
    before = dict(model.named_parameters())
    initial_values(model, "", 1, CPU)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
