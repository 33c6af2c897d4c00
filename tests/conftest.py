"""Tests leave no trace outside their temporary folders and give the same result every time."""

import gc
import os
from pathlib import Path

import hypothesis
import pytest

# Before torch and numpy are imported: workers take every core already, and threads that wait for
# each other on small tensors spin. Commands that tests start see it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from mist.files import write_text
from tests.small_models import MODELS

hypothesis.settings.register_profile("mist", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("mist")


# Files that take longest, which begin first: else one worker ends long after the other.
LONG = (
    "exec/test_parity.py",
    "workflow/test_verifying.py",
    "exec/test_apply.py",
    "test_cli.py",
    "test_golden.py",
    "test_tune.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the rest stays in its order."""
    items.sort(key=lambda item: not item.nodeid.split("::")[0].endswith(LONG))


def pytest_collection_finish() -> None:
    """What is imported by now stays: garbage collections need not look at it again."""
    gc.collect()
    gc.freeze()


def of_the_run(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all workers of a run share; each has temporary folders of its own."""
    base = factory.getbasetemp()
    folder: Path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The trace cache and the user's profiles: empty at the start, shared by all tests of a run.

    Set in the environment, so that the commands which tests start see them too.
    """
    home = of_the_run(tmp_path_factory, "home")
    patch = pytest.MonkeyPatch()
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR"):
        patch.setenv(name, str(home / name.lower()))
    patch.setenv("MPLBACKEND", "Agg")
    # Ranks and dry runs import nothing from the current folder; tests have programs of their own.
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small model files; one for the run, so that each is traced once."""
    folder = of_the_run(tmp_path_factory, "models")
    for name, text in MODELS.items():
        write_text(folder / name, text)  # in one piece: another worker may be reading
    return folder
