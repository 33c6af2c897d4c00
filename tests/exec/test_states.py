"""Offload, optimizer, weights and data on one process: shares in bytes, and equal results."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mist.errors import InputError
from mist.exec.build.activations import Offloader, apply_memory_level
from mist.exec.build.adamw import BUCKET_BYTES, AdamW, Settings, chosen, make_slots
from mist.exec.build.batches import Batches, rank_rows
from mist.exec.build.empty_weights import load
from mist.exec.build.fsdp import divided_dim
from mist.exec.build.host_copies import Copy, Swapper
from mist.exec.build.rank_grid import RankGrid
from mist.plans.workload import Attention, MemoryLevel, Optimizer, Precision, Workload
from tests.exec.drawn import whole_values
from tests.exec.layouts import VOCAB, write_models

CPU = torch.device("cpu")


class Watched(Swapper):
    """Counts the bytes that go to the host, and the tensors that were asked back."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.out_bytes = self.num_back = 0

    def to_host(self, tensor: torch.Tensor, into: torch.Tensor | None = None) -> Copy:
        self.out_bytes += tensor.numel() * tensor.element_size()
        return super().to_host(tensor, into)

    def to_device(self, copy: Copy) -> Copy:
        self.num_back += 1
        return super().to_device(copy)


class Layer(nn.Module):
    """Saves its input (matrix product) and the input of the sine: [8, 16] each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.linear(x_BD))


def gradients(ratio: float, level: MemoryLevel) -> tuple[list[torch.Tensor], int]:
    torch.manual_seed(0)
    layers = nn.Sequential(*(Layer() for _ in range(10)))
    swapper = Watched()
    offloader = Offloader(ratio, swapper)
    for layer in layers:
        apply_memory_level(layer, level)
        if ratio:
            offloader.attach(layer)
    for _ in range(2):
        offloader.start()
        layers(torch.ones(8, 16).requires_grad_()).sum().backward()
    return [p.grad for p in layers.parameters() if p.grad is not None], swapper.out_bytes


@pytest.mark.parametrize("level", [MemoryLevel.NONE, MemoryLevel.FULL])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
def test_a_share_of_the_saved_bytes_goes_to_the_host(ratio: float, level: MemoryLevel) -> None:
    expected, _ = gradients(0.0, level)
    found, out_bytes = gradients(ratio, level)
    assert all(map(torch.equal, found, expected))
    per_layer = 2 if level is MemoryLevel.NONE else 1  # what a layer saves, or its input
    saved_bytes = 2 * 10 * per_layer * 8 * 16 * 4  # two micro-batches of ten layers
    assert out_bytes == pytest.approx(ratio * saved_bytes, abs=2 * 8 * 16 * 4)


def test_tensors_are_asked_back_one_layer_ahead() -> None:
    layers = nn.Sequential(*(Layer() for _ in range(5)))
    swapper = Watched()
    offloader = Offloader(1.0, swapper)
    before: list[int] = []  # copies asked for when the backward pass of a layer begins
    for layer in layers:
        offloader.attach(layer)
        layer.register_forward_hook(
            lambda module, args, output: (
                output.register_hook(lambda grad: before.append(swapper.num_back)) and None
            )
        )
    layers(torch.ones(8, 16).requires_grad_()).sum().backward()
    # Two tensors a layer: with the last layer's own come those of the layer before it, and so on.
    assert before == [0, 4, 6, 8, 10]
    assert swapper.num_back == 10


class Twice(nn.Module):
    """Saves one storage as [8, 16], transposed, and as [128]; and a part of it."""

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        x_BD = x_BD * 2
        flat = x_BD.view(-1).sin()
        return flat.view(8, 16) + x_BD.t().cos().t() + x_BD[:4].exp().sum()


def test_a_storage_in_several_shapes_is_one_copy() -> None:
    found = []
    for ratio in (0.0, 0.5, 1.0):
        layer, swapper = Twice(), Watched()
        if ratio:
            Offloader(ratio, swapper).attach(layer)
        x_BD = torch.linspace(-1, 1, 128).view(8, 16).requires_grad_()
        layer(x_BD).sum().backward()
        found.append((x_BD.grad, swapper.out_bytes))
    (expected, _), (half, half_bytes), (every, out_bytes) = found
    assert torch.equal(half, expected) and torch.equal(every, expected)
    # The storage of 128 numbers once, not twice, and the result of exp, 4 x 16.
    assert out_bytes == 4 * (128 + 4 * 16)
    assert half_bytes <= out_bytes / 2


@pytest.mark.parametrize("bucket_bytes", [BUCKET_BYTES, 100])  # all at once; three rows at a time
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_adamw_is_torchs_wherever_its_moments_live(
    ratio: float, bucket_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mist.exec.build.adamw.BUCKET_BYTES", bucket_bytes)
    torch.manual_seed(0)
    ours = {str(i): nn.Parameter(torch.randn(8, 4, dtype=torch.float64)) for i in range(10)}
    theirs = [nn.Parameter(p.detach().clone()) for p in ours.values()]
    settings = Settings(lr=1e-2)
    swapper = Watched()
    slots = list(make_slots(ours, frozenset({"9"}), ratio, swapper))
    optimizer = AdamW(settings, swapper, slots)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=settings.betas, weight_decay=0.1)
    for step in range(3):
        for mine, known in zip(ours.values(), theirs, strict=True):
            known.grad = torch.full_like(known, 0.1 * (step + 1))
            mine.grad = 2 * known.grad
        optimizer.step(torch.tensor(0.5))
        reference.step()
        optimizer.zero_grad()
    for mine, known in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(mine, known, rtol=0, atol=1e-14)  # of float64, on any CPU
    assert sum(slot.moments_on_host for slot in slots) == round(10 * ratio)
    moments = 2 * round(10 * ratio) + 1  # and the value of the offloaded parameter
    assert swapper.out_bytes == 3 * moments * 8 * 4 * 8


@given(
    sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=12),
    ratio=st.sampled_from([0.0, 0.125, 0.5, 0.875, 1.0]),
)
def test_moments_on_the_host_fill_their_share_but_for_less_than_any_left(
    sizes: list[int], ratio: float
) -> None:
    named = {str(index): size for index, size in enumerate(sizes)}
    names = chosen(named, ratio)
    missing = round(ratio * sum(sizes)) - sum(named[name] for name in names)
    left = [size for name, size in named.items() if size and name not in names]
    assert 0 <= missing < min(left, default=1)


def test_weights_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    write_models(tmp_path)
    model = load(str(tmp_path / "llama.json"), Attention.FLASH).module
    name = "model.layers.1.mlp.up_proj"
    value = whole_values(model, name, 7)["weight"]
    whole_values(model, "model.embed_tokens", 7)
    assert torch.equal(value, whole_values(model, name, 7)["weight"])
    assert not torch.equal(value, whole_values(model, name, 8)["weight"])
    assert value.std().item() == pytest.approx(0.02, rel=0.05)  # the configuration's
    assert all(parameter.is_meta for parameter in model.parameters())


def workload(global_batch: int = 8) -> Workload:
    return Workload(
        seq_len=16,
        global_batch=global_batch,
        precision=Precision.FP32,
        optimizer=Optimizer.ADAMW,
        attention=Attention.FLASH,
        compile=False,
    )


def test_ranks_divide_the_samples_of_a_step(tmp_path: Path) -> None:
    write_models(tmp_path)
    loaded = load(str(tmp_path / "plain.py"), Attention.FLASH)
    ids = Batches(loaded, workload(), 7).step(3)
    assert isinstance(ids, torch.Tensor) and ids.shape == (8, 16) and int(ids.max()) < VOCAB
    grid = RankGrid(
        first_rank=0, dp=2, dp_replicate=1, tp=1, sequence_parallel=False, rows=4, columns=16
    )
    first, second = (rank_rows(ids, grid, i, 2) for i in range(2))
    assert torch.equal(first, ids[[0, 1, 4, 5]]) and torch.equal(second, ids[[2, 3, 6, 7]])


def test_a_file_is_read_in_order_and_from_its_start_again(tmp_path: Path) -> None:
    write_models(tmp_path)
    loaded = load(str(tmp_path / "llama.json"), Attention.FLASH)
    (tmp_path / "text").write_bytes(bytes(range(1, 101)))  # no zero: it is a text
    batches = Batches(loaded, workload(2), 7, tmp_path / "text")
    for step in (0, 3):
        batch = batches.step(step)
        expected = (torch.arange(32) + 32 * step) % 100 + 1
        assert torch.equal(batch["input_ids"].flatten(), expected)  # type: ignore[index]
        assert torch.equal(batch["labels"], batch["input_ids"])  # type: ignore[index]


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    write_models(tmp_path)
    loaded = load(str(tmp_path / "llama.json"), Attention.FLASH)
    file = tmp_path / "tokens.npy"
    np.save(file, np.full(64, VOCAB))
    with pytest.raises(InputError, match=f"has token {VOCAB}, but the vocabulary of .* has 256"):
        Batches(loaded, workload(2), 7, file)
    (tmp_path / "short").write_bytes(b"short")
    with pytest.raises(InputError, match="holds 5 values of type uint8; a sample needs 16"):
        Batches(loaded, workload(2), 7, tmp_path / "short")


@pytest.mark.parametrize(
    ("shape", "num_ranks", "dim"),
    [
        ((8, 24, 16), 8, None),  # even: the first dimension, as FSDP2 does
        ((8, 24, 16), 64, None),  # nothing divides evenly: padded
        ((8, 128, 16), 64, 1),  # eight experts on 64 ranks
        ((3, 5, 16), 2, 2),
        ((50257, 64), 8, None),  # a little padding costs less than copies
        ((64,), 128, None),
    ],
)
def test_parameters_are_divided_where_little_is_padded(
    shape: tuple[int, ...], num_ranks: int, dim: int | None
) -> None:
    found = divided_dim(nn.Parameter(torch.empty(shape, device="meta")), num_ranks=num_ranks)
    assert (found and found.dim) == dim
