import pytest
import torch

torch.set_num_threads(1)
# Memory from torch.empty is filled with NaN, so that nothing can be read before it is written.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
