"""Code that shows that it ran, by a file: what none of the files of others may bring about."""

import io
import os
import pickle
from pathlib import Path


class Bomb:
    """An object whose unpickling makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def pickled(canary: Path) -> bytes:
    """A pickle that makes the file when it is read."""
    return pickle.dumps(Bomb(canary))


def statement(canary: Path) -> str:
    """A line of Python that makes the file."""
    return f"import os; os.system('touch {canary}')"


def expression(canary: Path) -> str:
    """An expression of Python that makes the file."""
    return f"__import__('os').system('touch {canary}')"


def went_off(canary: Path) -> bool:
    """Whether any of these ran; the bombs are known to work."""
    return canary.exists()


def check_bombs(canary: Path) -> None:
    """Each of them makes the file when it is let, so that a test without one shows something."""
    for run in (
        lambda: pickle.load(io.BytesIO(pickled(canary))),
        lambda: exec(statement(canary)),
        lambda: eval(expression(canary)),
    ):
        run()
        assert went_off(canary)
        canary.unlink()
