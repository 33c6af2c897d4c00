"""What tests of execution share: one parent of all ranks that they fork."""

from collections.abc import Iterator

import pytest

from tests.conftest import of_the_run
from tests.exec.forking import Forked, forking


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """Runs a rank program in forked ranks."""
    with forking(of_the_run(tmp_path_factory, "subjects")) as run:
        yield run
