"""The samples of two steps as a target takes them, and whether its losses are those of Mist.

Scripts of targets import it from their own folder: nothing but torch and numpy is needed.
"""

import json
from pathlib import Path

import numpy as np
import torch

STEPS, SAMPLES, SEQ_LEN = 2, 8, 32
LR = 1e-3
# Sums of fp32 in another order: about a hundred roundings of 6e-8 each.
TOLERANCE = 1e-5
MASKED = -100


def samples(folder: Path, step: int, micro_batch: int, dp: int, rank: int) -> torch.Tensor:
    """Those of a data-parallel rank in a step (from 0): ids of [micro-batch, sample, token]."""
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")).view(STEPS, SAMPLES, SEQ_LEN)
    return tokens[step].view(-1, dp, micro_batch, SEQ_LEN)[:, rank]


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """The labels of ids: the next one of each; the last has none."""
    return torch.cat([ids[..., 1:], torch.full_like(ids[..., :1], MASKED)], dim=-1)


def compare(case: Path, losses: list[float], name: str) -> None:
    """Say that they are equal, or raise."""
    expected = json.loads((case / "expected.json").read_text())
    pairs = zip(losses, expected, strict=True)
    assert all(abs(a / b - 1) < TOLERANCE for a, b in pairs), (case, losses, expected)
    shown = ", ".join(f"{loss:.6f}" for loss in losses)
    print(f"{name}: two steps of {case.parent.name}/{case.name} have mist apply's losses: {shown}")
