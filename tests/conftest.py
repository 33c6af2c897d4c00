"""Tests leave no trace outside their temporary folders and give the same result every time."""

import os
from pathlib import Path

import hypothesis
import pytest

# Before torch and numpy are imported: workers take every core already, and threads that wait for
# each other on small tensors spin. Commands that tests start see it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.small_models import MODELS

hypothesis.settings.register_profile("mist", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("mist")


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The trace cache and the user's profiles: empty at the start, shared by all tests of a run.

    Set in the environment, so that the commands which tests start see them too.
    """
    home: Path = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR"):
        patch.setenv(name, str(home / name.lower()))
    patch.setenv("MPLBACKEND", "Agg")
    # Ranks and dry runs import nothing from the current folder; tests have programs of their own.
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small model files; one for the session, so that each is traced once."""
    folder: Path = tmp_path_factory.mktemp("models")
    for name, text in MODELS.items():
        (folder / name).write_text(text)
    return folder
