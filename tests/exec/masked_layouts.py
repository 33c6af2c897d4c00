"""The layouts under which masked labels must give what one process does, and their models."""

from itertools import product
from pathlib import Path

from mist.plans.workload import ScheduleKind
from tests.exec.layouts import PLAIN, S, Variant, write_models

PLAIN_WITH_LABELS = """

class Labelled(MyTransformer):
    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids)


def build_model() -> nn.Module:
    return Labelled()


def make_batch(batch: int, seq: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB_SIZE, (batch, seq))
    return {"input_ids": ids, "labels": ids.where(torch.rand(batch, seq) < 0.5, -100)}
"""
PAIR = """

def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    labels = batch["labels"]
    total = F.cross_entropy(output.float().flatten(0, 1), labels.flatten(), reduction="sum")
    return total, (labels != -100).sum()
"""
MEAN = """

def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(output.float().flatten(0, 1), batch["labels"].flatten())
"""
BY_HAND = """

def loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    learned = batch["labels"] != -100
    places = batch["labels"].where(learned, 0).unsqueeze(-1)
    losses = -output.float().log_softmax(-1).gather(-1, places).squeeze(-1)
    return (losses * learned).sum() / learned.sum()
"""
LOSSES = {"pair": PAIR, "mean": MEAN, "by_hand": BY_HAND, "default": ""}


def write_masked_models(folder: Path) -> None:
    """The tiny models, and a plain one that is given labels, with each kind of loss."""
    write_models(folder)
    plain = (folder / PLAIN.with_name("plain.py").name).read_text()
    for name, loss in LOSSES.items():
        (folder / f"{name}.py").write_text(plain + PLAIN_WITH_LABELS + loss)


DATA, TENSOR = (S(dp=2, zero=2),), (S(tp=2),)
HALVES = (S(layers=(2,)), S(layers=(2,)))
TWO = {
    "dp2": {"stages": DATA, "micro": 4},
    "tp2": {"stages": TENSOR, "micro": 4},
    "pp2": {"stages": HALVES, "micro": 4},
}
FOUR = {
    "dp2 pp2": {"stages": (S(layers=(2,), dp=2, zero=1), S(layers=(2,), dp=2, zero=2)), "micro": 4},
    "dp2 tp2": {"stages": (S(dp=2, tp=2, zero=3),), "micro": 4},
}
EVERY = tuple(
    Variant(name=f"{model.split('.')[0]} {name}", model=model, **layout)  # type: ignore[arg-type]
    for model, (name, layout) in product(
        ("llama.json", "pair.py", "mean.py"), {**TWO, **FOUR}.items()
    )
)
# What sums a loss and what divides the model are each met in another of the fast layouts.
REPEATED = (
    *("pair dp2", "pair pp2", "mean tp2", "mean pp2"),
    *("llama dp2", "llama tp2", "llama pp2"),
)
LAYOUTS = (
    *(each for each in EVERY if each.name not in REPEATED),
    Variant(name="by hand pp2", model="by_hand.py", **TWO["pp2"]),  # type: ignore[arg-type]
    Variant(name="default tp2", model="default.py", stages=TENSOR, micro=4),
    Variant(name="gpt2 tied pp2 padded", model="gpt2.json", stages=HALVES, micro=4, max_norm=0.1),
    Variant(name="gpt2 tied dp2 pp2", model="gpt2.json", **FOUR["dp2 pp2"]),  # type: ignore[arg-type]
    Variant(name="llama pp2 packed", stages=HALVES, micro=4),
)
MORE = (
    *(each for each in EVERY if each.name in REPEATED),
    *(
        Variant(name=f"by hand {name}", model="by_hand.py", **layout)  # type: ignore[arg-type]
        for name, layout in {**TWO, **FOUR}.items()
        if name != "pp2"
    ),
    Variant(name="gpt2 tied dp2", model="gpt2.json", stages=DATA, micro=4),
    Variant(name="llama dp2 padded", stages=(S(dp=2, zero=3, full=2),), micro=8),
    Variant(name="llama tp2 sp padded", stages=(S(tp=2, sp=True),), micro=8, max_norm=0.1),
    Variant(name="llama tp2 packed", stages=TENSOR, micro=8),
    Variant(name="llama zero-bubble", kind=ScheduleKind.ZERO_BUBBLE, stages=HALVES, micro=4),
    Variant(name="pair gpipe", model="pair.py", kind=ScheduleKind.GPIPE, stages=HALVES, micro=4),
    Variant(
        name="llama interleaved padded",
        kind=ScheduleKind.INTERLEAVED,
        stages=(S(layers=(1, 1)), S(layers=(1, 1))),
        micro=4,
    ),
    Variant(
        name="llama dp2 to tp2 padded",
        stages=(S(layers=(1,), dp=2, zero=3), S(layers=(3,), tp=2)),
        micro=4,
    ),
    Variant(
        name="mean tp2 sp to dp2",
        model="mean.py",
        stages=(S(layers=(2,), tp=2, sp=True), S(layers=(2,), dp=2, zero=2)),
        micro=4,
    ),
    Variant(name="llama hsdp", stages=(S(dp=4, zero=3, dp_replicate=2),), micro=4),
)
