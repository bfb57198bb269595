"""What several test files want."""

import pytest


@pytest.fixture
def inference():
    """No gradients: for files that say `pytestmark = pytest.mark.usefixtures("inference")`."""
    import torch

    with torch.no_grad():
        yield
