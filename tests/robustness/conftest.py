import pytest

from tests.robustness.digits import Digits, train


@pytest.fixture(scope="session")
def digits() -> Digits:
    return train()
