"""Each layer alone: gradients against finite differences, float64, and the plain layer of torch."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mist.layers.activation_functions import ACTIVATIONS, activate, gated
from mist.layers.dropout_attention import attend
from mist.layers.gelu_inverse import minimum, right_of_minimum, slope_from_output
from mist.layers.linears import drops_input, linear_of_dropped
from mist.layers.masks import Masks, dropout, pack_bits, unpack_bits
from mist.layers.norms import GEMMA_NORM, LAYER_NORM, LLAMA_NORM, RMS_NORM, NormForm, NormOp
from mist.layers.recipes import recipe_of

FORMS = {"layer": LAYER_NORM, "rms": RMS_NORM, "llama": LLAMA_NORM, "gemma": GEMMA_NORM}
EXACT_RUNGS = ("fused", "drop")
WIDTH = 13  # odd: no vector width divides it
TINY = 1e-10
# Of fp32: 6e-8 for the type, a dozen roundings in a row of sums.
FP32_CLOSE = 1e-6
# Eager layers are as far from float64 as theirs; exact rungs must not be further.
BF16_RATIO = 1.1


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator) * scale


def plain_norm(
    form: NormForm, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """As the models write it, by autograd."""
    if form.centered:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    xhat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form.rounds_first:
        return weight * xhat.to(x.dtype)
    return (xhat * (form.offset + weight.to(xhat.dtype))).to(x.dtype)


def gradients(
    function: Callable[..., Tensor], arguments: Sequence[Tensor], seed: int = 9
) -> list[Tensor]:
    """The output, and gradients of its product with random numbers."""
    leaves = [each.detach().clone().requires_grad_() for each in arguments]
    out = function(*leaves)
    out.backward(numbers(*out.shape, seed=seed).to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of a tensor, by norms."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b).norm() / (b.norm() + 1e-300)) for a, b in pairs)


def norm_linear(form: NormForm, rung: str) -> Callable[..., Tensor]:
    op = NormOp(form=form, eps=1e-6, rung=rung)  # type: ignore[arg-type]

    def run(x: Tensor, scale: Tensor, matrix: Tensor, *bias: Tensor) -> Tensor:
        y = op(x, scale, bias[0] if bias else None)
        return linear(y, matrix)

    return run


def linear(x: Tensor, matrix: Tensor) -> Tensor:
    if drops_input(x, matrix):
        return linear_of_dropped(x, matrix, None, flipped=False)
    return F.linear(x, matrix)


def plain_norm_linear(form: NormForm) -> Callable[..., Tensor]:
    def run(x: Tensor, scale: Tensor, matrix: Tensor, *bias: Tensor) -> Tensor:
        return F.linear(plain_norm(form, x, scale, bias[0] if bias else None, 1e-6), matrix)

    return run


def norm_arguments(form: NormForm, scale: Tensor, size: float = 1.0) -> list[Tensor]:
    bias = [numbers(WIDTH, seed=3, scale=0.1)] if form.centered else []
    return [numbers(2, 3, WIDTH, scale=size), scale, numbers(5, WIDTH, seed=2), *bias]


@pytest.mark.parametrize("rung", ["fused", "drop", "output"])
@pytest.mark.parametrize("form", FORMS)
def test_norms_by_finite_differences(form: str, rung: str) -> None:
    scale = numbers(WIDTH, seed=1)
    scale[::4] = 0 if FORMS[form].offset == 0 else -1  # where the result tells nothing of x
    arguments = [each.requires_grad_() for each in norm_arguments(FORMS[form], scale)]
    assert torch.autograd.gradcheck(norm_linear(FORMS[form], rung), arguments)


SCALES = {
    "usual": 1 + 0.1 * numbers(WIDTH, seed=1),
    "zero": torch.where(numbers(WIDTH, seed=1) > 0, 0.0, numbers(WIDTH, seed=4)),
    "tiny": TINY * numbers(WIDTH, seed=1),
    "small": 0.02 * numbers(WIDTH, seed=1),
}


# Above 1e12 the cube of 1 / deviation, which torch's own LayerNorm makes, is no normal number.
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e12])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", FORMS)
def test_norms_against_float64(form: str, scale: str, size: float) -> None:
    row = FORMS[form]
    single = [each.float() for each in norm_arguments(row, SCALES[scale] - row.offset, size)]
    reference = gradients(plain_norm_linear(row), [each.double() for each in single])
    for rung in (*EXACT_RUNGS, "output"):
        assert error(gradients(norm_linear(row, rung), single), reference) < FP32_CLOSE, rung


def low_errors(
    function: Callable[..., Tensor], plain: Callable[..., Tensor], arguments: Sequence[Tensor]
) -> tuple[float, float]:
    """In bf16, of a layer and of the plain one: the error of all gradients together."""
    low = [each.bfloat16() for each in arguments]
    reference = torch.cat([g.flatten() for g in gradients(plain, [each.double() for each in low])])
    ours, theirs = (
        torch.cat([g.double().flatten() for g in gradients(each, low)])
        for each in (function, plain)
    )
    return error([ours], [reference]), error([theirs], [reference])


@pytest.mark.parametrize("rung", EXACT_RUNGS)
@pytest.mark.parametrize("form", FORMS)
def test_exact_norms_in_bf16(form: str, rung: str) -> None:
    row = FORMS[form]
    arguments = norm_arguments(row, SCALES["usual"] - row.offset)
    arguments[0] = numbers(64, WIDTH)
    ours, eager = low_errors(norm_linear(row, rung), plain_norm_linear(row), arguments)
    assert 0 < ours <= BF16_RATIO * eager


def test_a_norm_keeps_columns_only_where_the_scale_loses_digits() -> None:
    op = NormOp(form=LAYER_NORM, eps=1e-5, rung="output")
    x, bias = numbers(4, WIDTH).requires_grad_(), torch.full((WIDTH,), 0.1).double()
    for scale, columns in ((1.0, 0), (0.03, 0), (0.02, WIDTH), (0.0, WIDTH)):
        found = op(x, torch.full((WIDTH,), scale).double(), bias).grad_fn
        assert found is not None
        kept = found.saved_tensors[-1]
        assert (0 if kept is None else kept.shape[-1]) == columns


def activation_linear(name: str, rung: str) -> Callable[..., Tensor]:
    return lambda x, matrix: linear(activate(x, name, rung), matrix)  # type: ignore[arg-type]


def gated_linear(name: str, rung: str) -> Callable[..., Tensor]:
    return lambda g, u, matrix: linear(gated(g, u, name, rung), matrix)  # type: ignore[arg-type]


def hard_inputs(name: str) -> Tensor:
    """Ordinary numbers, those around the minimum, and far ones."""
    low = minimum(name)[0] if ACTIVATIONS[name].invertible else -1.2784645
    near = low + torch.tensor([0.0, 1e-8, -1e-8, 1e-4, -1e-4, 0.01, -0.01, 0.1])
    far = torch.tensor([-1e4, -30.0, -12.0, -6.0, -3.0, 0.0, 3.0, 8.0, 9.0, 1e4])
    return torch.cat([numbers(400), near, far, numbers(8, scale=3.0)])[: 2 * 3 * 71 - 3].view(-1, 3)


@pytest.mark.parametrize("rung", ["fused", "drop", "output"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_finite_differences(name: str, rung: str) -> None:
    arguments = [numbers(3, WIDTH), numbers(5, WIDTH, seed=1)]
    leaves = [each.requires_grad_() for each in arguments]
    assert torch.autograd.gradcheck(activation_linear(name, rung), leaves)
    leaves = [each.requires_grad_() for each in (numbers(3, WIDTH, seed=4), *arguments)]
    assert torch.autograd.gradcheck(gated_linear(name, rung), leaves)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_against_float64(name: str) -> None:
    run, x = ACTIVATIONS[name].run, hard_inputs(name).float()
    matrix = numbers(5, 3, seed=1).float()
    reference = gradients(lambda x, w: F.linear(run(x), w), [x.double(), matrix.double()])
    for rung in EXACT_RUNGS:
        found = gradients(activation_linear(name, rung), [x, matrix])
        assert error(found, reference) < FP32_CLOSE, rung
    up = numbers(*x.shape, seed=5).float()
    both = [x, up, matrix]
    reference = gradients(lambda g, u, w: F.linear(run(g) * u, w), [e.double() for e in both])
    assert error(gradients(gated_linear(name, "drop"), both), reference) < FP32_CLOSE


@pytest.mark.parametrize("name", ["gelu", "gelu-tanh"])
def test_gelu_from_its_output_in_fp32(name: str) -> None:
    run, matrix = ACTIVATIONS[name].run, numbers(5, 3, seed=1).float()
    # At the minimum y has digits for half of those of x: the slope there is good to the root of
    # the distance of two numbers of the size of y, 1.5e-8, times two for the steepest gradient.
    for x, close in ((numbers(300, 3).float(), FP32_CLOSE), (hard_inputs(name).float(), 1e-5)):
        reference = gradients(lambda x, w: F.linear(run(x), w), [x.double(), matrix.double()])
        found = gradients(activation_linear(name, "output"), [x, matrix])
        assert error(found, reference) < close
        assert float((found[1] - reference[1]).abs().max()) < 2 * 1.5e-8**0.5


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_exact_activations_in_bf16(name: str) -> None:
    run = ACTIVATIONS[name].run
    arguments = [hard_inputs(name)[:130], numbers(5, 3, seed=1)]
    plain = lambda x, w: F.linear(run(x), w)  # noqa: E731
    ours, eager = low_errors(activation_linear(name, "drop"), plain, arguments)
    assert 0 < ours <= BF16_RATIO * eager
    arguments = [numbers(130, 3), numbers(130, 3, seed=6), arguments[1]]
    gate = lambda g, u, w: F.linear(run(g) * u, w)  # noqa: E731
    ours, eager = low_errors(gated_linear(name, "drop"), gate, arguments)
    assert 0 < ours <= BF16_RATIO * eager


@pytest.mark.parametrize("name", ["gelu", "gelu-tanh"])
def test_the_slope_of_gelu_from_its_output_is_accurate_everywhere(name: str) -> None:
    x = torch.linspace(-14, 12, 200_001, dtype=torch.float64)
    exact = ACTIVATIONS[name].back(torch.ones_like(x), x)
    y, right = ACTIVATIONS[name].run(x), right_of_minimum(x, name)
    error = (slope_from_output(y, right, name) - exact).abs()
    # At the minimum fp64 tells y to 1e-17, which is x to 1e-8; elsewhere the steps lose nothing.
    assert float(error.max()) < 1e-8
    assert float(error[(x - minimum(name)[0]).abs() > 1e-3].max()) < 1e-12
    # A linear table of 2^15 steps; the published polynomials are off by up to 2.69.
    apart = (x - minimum(name)[0]).abs() > 0.1  # of which fp32 tells less
    single = slope_from_output(y.float(), right, name)
    assert float((single - exact)[apart].abs().max()) < 1e-6


def test_views_and_strides_change_nothing() -> None:
    wide = numbers(4, 2 * WIDTH)
    matrix = numbers(5, WIDTH, seed=1)
    for part in (wide[:, ::2], wide.t()[:WIDTH].t(), wide[:, WIDTH:]):
        assert not part.is_contiguous()
        x = part.detach().requires_grad_()
        y = activate(x, "gelu", "drop")
        linear(y, matrix.requires_grad_()).sum().backward()
        assert x.grad is not None
        whole = part.clone().requires_grad_()
        F.linear(F.gelu(whole), matrix).sum().backward()
        assert torch.allclose(x.grad, whole.grad, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]


def test_a_result_that_is_changed_in_place_is_kept() -> None:
    x, matrix = numbers(4, WIDTH).requires_grad_(), numbers(5, WIDTH, seed=1).requires_grad_()
    y = activate(x, "silu", "drop")
    assert drops_input(y, matrix)
    y.add_(1.0)
    assert recipe_of(y) is None
    linear(y, matrix).sum().backward()
    assert torch.allclose(matrix.grad, (F.silu(x) + 1).sum(0).expand(5, -1))  # type: ignore[arg-type]


def test_a_dropped_input_is_made_once_for_all_that_read_it() -> None:
    calls: list[int] = []
    x = numbers(4, WIDTH).requires_grad_()
    y = activate(x, "gelu", "drop")
    recipe = recipe_of(y)
    assert recipe is not None
    compute = recipe.rebuild.compute
    recipe.rebuild.compute = lambda *sources: (calls.append(1), compute(*sources))[1]  # type: ignore[func-returns-value]
    matrices = [numbers(5, WIDTH, seed=i).requires_grad_() for i in range(3)]
    out = sum(linear(y, each) for each in matrices).sum()  # type: ignore[union-attr]
    for number in (1, 2):
        out.backward(retain_graph=True)
        assert len(calls) == number
    assert recipe.rebuild._value is None
    for each in matrices:
        assert torch.allclose(each.grad, 2 * F.gelu(x).sum(0).expand(5, -1))  # type: ignore[arg-type]


@pytest.mark.parametrize("masks", ["byte", "bit"])
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5, 13)])
def test_masks_come_back(shape: tuple[int, ...], masks: Masks) -> None:
    mask = numbers(*shape) > 0
    packed = pack_bits(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(packed, mask), mask)
    torch.manual_seed(0)
    x = numbers(*shape).requires_grad_()
    y = dropout(x, 0.3, masks)
    y.sum().backward()
    assert torch.allclose(y, x * x.grad)
    assert set(x.grad.tolist() if x.dim() == 1 else x.grad.flatten().tolist()) <= {0.0, 1 / 0.7}  # type: ignore[union-attr]


@pytest.mark.parametrize("masks", ["byte", "bit"])
def test_dropout_behind_an_activation_is_made_again_too(masks: Masks) -> None:
    x, matrix = numbers(6, WIDTH).requires_grad_(), numbers(5, WIDTH, seed=1).requires_grad_()
    y = dropout(activate(x, "gelu", "drop"), 0.4, masks)
    value = y.detach().clone()
    assert drops_input(y, matrix)
    linear(y, matrix).sum().backward()
    assert torch.allclose(matrix.grad, value.sum(0).expand(5, -1))  # type: ignore[arg-type]


@pytest.mark.parametrize("masks", ["byte", "bit"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_dropout(causal: bool, masks: Masks) -> None:
    arguments = [numbers(1, 2, 5, 3, seed=i).requires_grad_() for i in range(3)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)  # finite differences need one mask
        return attend(q, k, v, None, scale=0.5, p=0.25, causal=causal, masks=masks)

    assert torch.autograd.gradcheck(ours, arguments)
    torch.manual_seed(5)
    scores = arguments[0] @ arguments[1].transpose(-2, -1) * 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    dropped = torch.native_dropout(scores.softmax(-1), 0.25, True)[0]
    assert torch.allclose(ours(*arguments), dropped @ arguments[2])


def test_autocast_keeps_the_weight_as_it_is() -> None:
    x, matrix = numbers(6, WIDTH).float().requires_grad_(), numbers(5, WIDTH).float()
    matrix.requires_grad_()
    kept: list[Tensor] = []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),  # type: ignore[func-returns-value]
    ):
        out = linear(activate(x, "gelu", "drop"), matrix)
        plain = F.linear(F.gelu(x), matrix)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, plain)
    out.float().sum().backward()
    assert matrix.grad is not None and matrix.grad.dtype == torch.float32
