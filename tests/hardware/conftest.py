"""How the users of the reader compute."""

import jax
import pytest


@pytest.fixture(scope="module")
def users_promotion():
    """Flax mixes dtypes, as its users' code does."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
