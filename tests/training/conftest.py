"""One process that train.py is forked from, so that the tests start it quickly."""

import pytest

from support.forks import Forks
from support.runs import command


@pytest.fixture(scope="session")
def forks():
    keywords = command(None)[1]
    with Forks(env=keywords["env"], cwd=keywords["cwd"]) as forks:
        yield forks
