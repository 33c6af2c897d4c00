"""What tests of execution share: one parent of all ranks that they fork."""

from collections.abc import Iterator

import pytest

from tests.exec.forking import Forked, forking


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """Runs a rank program in forked ranks."""
    with forking() as run:
        yield run
