"""Converted models: the same parameters and outputs, gradients as good, less kept."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mist.errors import InputError
from mist.layers import RUNGS, Conversion, convert
from tests.layers.families import FAMILIES, batch, without_dropout

SLOW = pytest.mark.slow
FAST = {"llama", "gemma2", "gpt2", "bert", "mixtral"}  # one of each kind of norm, matrix and layer
EXACT = [name for name, rung in RUNGS.items() if rung.exact]
# Two fp32 layers deep, of the whole gradient: eager models are at 2e-7 to 4e-7.
FP32_CLOSE = 1e-6


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = without_dropout(FAMILIES[family]()).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # scales of 1 and biases of 0 hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradient(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The output and the gradient of all parameters, flat, in float64."""
    model.zero_grad()
    found = model(**batch(model, 2, 9))
    out = found.logits
    (out.double() * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return out.detach().double(), torch.cat([g.flatten().double() for g in grads])


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=() if each in FAST else SLOW) for each in FAMILIES]
)
def test_every_family_is_converted_and_stays_itself(family: str) -> None:
    plain = model_of(family)
    # Grouped products of experts have no float64: there the plain model is what is compared with.
    exact = plain if family == "mixtral" else copy.deepcopy(plain).double()
    out, reference = gradient(exact)
    for level in RUNGS:
        model = copy.deepcopy(plain)
        result = convert(model, level)
        assert not result.left_alone or family in {"mixtral", "gemma2"}
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        found = gradient(model)
        assert distance(found[0], out) < FP32_CLOSE, level
        assert distance(found[1], reference) < FP32_CLOSE, level


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_attention_that_is_written_out_masks_as_before(family: str) -> None:
    plain = model_of(family)
    plain.set_attn_implementation("eager")  # type: ignore[operator]
    padding = {"attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])}
    converted = copy.deepcopy(plain)
    result = convert(converted, "drop-norm")
    assert sum("written out" in change.what for change in result.changes) == 2  # of two layers
    for more in ({}, padding):
        inputs = batch(plain, 2, 9) | more
        exact, found = (
            torch.autograd.grad(model(**inputs).logits[:, :6].square().sum(), [*model.parameters()])
            for model in (copy.deepcopy(plain).double(), converted)
        )
        flat = [torch.cat([g.flatten().double() for g in grads]) for grads in (found, exact)]
        assert distance(*flat) < FP32_CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_levels_are_as_good_as_eager_in_bf16(family: str) -> None:
    low = model_of(family).bfloat16()
    exact = copy.deepcopy(low)
    reference = gradient(exact.float() if family == "mixtral" else exact.double())[1]
    eager = distance(gradient(low)[1], reference)
    for level in EXACT:
        model = copy.deepcopy(low)
        convert(model, level)
        assert 0 < distance(gradient(model)[1], reference) <= 1.1 * eager


class HandWritten(nn.Module):
    """A block as people write it: functions, not modules; a norm of their own."""

    class Norm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))
            self.bias = None

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)

    class Mlp(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(width, 40), nn.Linear(width, 40)
            self.down, self.dropout = nn.Linear(40, width), 0.2

        def forward(self, x: Tensor) -> Tensor:
            product = self.up(x) * F.silu(self.gate(x))
            return F.dropout(self.down(product), self.dropout, self.training)

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.mlp = self.Norm(width), self.Mlp(width)
        self.tail = nn.Sequential(
            nn.RMSNorm(width),
            nn.Linear(width, 24),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(24, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm(x))
        return x + self.tail(x)


def test_what_people_write_by_hand_is_converted() -> None:
    model = HandWritten()
    result = convert(model, "drop-norm", masks="bit")
    found = [(c.path, c.what) for c in result.changes if not c.what.startswith("linear")]
    assert found == [
        ("norm", "LayerNorm, made again"),
        ("tail.0", "RMSNorm, made again"),
        ("tail.2", "gelu, made again"),
        ("tail.3", "dropout, keeps a bit an element"),
        ("mlp", "silu times a second matrix, made again"),
        ("mlp", "dropout, keeps a bit an element"),
    ]


def test_dropout_of_a_function_follows_the_mode() -> None:
    model = HandWritten()
    convert(model, "drop-activation")
    x = torch.randn(64, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("level", EXACT)
def test_converted_layers_run_under_checkpointing(level: str) -> None:
    model = HandWritten()
    convert(model, level)
    x = torch.randn(4, 16, requires_grad=True)
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        model.zero_grad()
        run(x).square().sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    assert torch.equal(*results)


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps, parameters excluded."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_frozen_matrices_keep_neither_input_nor_sources() -> None:
    layers: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
        nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)
    )
    x = torch.randn(8, 16)
    sizes = {}
    for level in ("", "drop-norm"):
        model = layers()
        for linear in (model[1], model[3]):  # type: ignore[index]
            linear.requires_grad_(False)
        if level:
            convert(model, level)
        sizes[level] = kept(model, x)
    # The input of LayerNorm with mean and deviation, and that of GELU.
    assert sizes[""] == sizes["drop-norm"] == 4 * (8 * 16 + 2 * 8 + 8 * 24)


def test_a_layer_keeps_its_own_input_whatever_came_before() -> None:
    layers = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(2)]
    model = nn.Sequential(*layers)
    convert(model, "drop-norm")
    # Of each layer the input, that of its norm, and two numbers a row: eight rows in fp32.
    assert kept(model, torch.randn(8, 16)) == 2 * 4 * (2 * 8 * 16 + 2 * 8)


def left(module: nn.Module, level: str = "drop-norm") -> Conversion:
    return convert(nn.Sequential(nn.LayerNorm(4), module), level)


class Wrong(nn.LayerNorm):
    """Called a norm, but it computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Wrong(4), "Wrong computes none of the norms that are known"),
        (nn.BatchNorm1d(4), "BatchNorm1d computes none of the norms that are known"),
        (nn.Mish(), "Mish is none of the activations that are known"),
        (Scaled(4, 4), "Scaled has a matrix, but does not compute input times weight"),
        (nn.Dropout(0.1, inplace=True), "Dropout is not plain dropout"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention runs as one function"),
    ],
)
def test_what_is_not_recognised_is_left_with_a_reason(module: nn.Module, reason: str) -> None:
    (found,) = left(module).left_alone
    assert (found.path, found.reason) == ("1", reason)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(InputError) as refused:
        convert(nn.LayerNorm(4), "drop-nrm")
    assert (
        str(refused.value)
        == "level 'drop-nrm' is unknown. Did you mean drop-norm or drop-activation?"
    )
    model = nn.Sequential(nn.LayerNorm(4))
    convert(model, "fused")
    with pytest.raises(InputError) as refused:
        convert(model, "tempo")
    assert str(refused.value) == (
        "this model was converted before. Convert a new one, with one level."
    )
    with pytest.raises(InputError) as refused:
        convert(nn.Sequential(nn.Linear(4, 4)), "tempo")
    assert str(refused.value) == (
        "level tempo: nothing in Sequential was recognised: no norm, no activation with a slope, "
        "no dropout."
    )


def test_converting_leaves_the_random_state_as_it_is() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU())
    state = torch.get_rng_state()
    convert(model, "drop-norm")
    assert torch.equal(torch.get_rng_state(), state)
