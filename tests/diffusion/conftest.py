"The small SDXL, loaded once for several files."
import copy

import pytest
import torch

from devsky_nb.hub.registry import load_model


@pytest.fixture(scope="session")
def loaded(device):
    "Not to be changed."
    return load_model("tiny-sdxl", device=device, dtype=torch.float32)


@pytest.fixture(scope="session")
def half(device):
    "In half precision; not to be changed."
    return load_model("tiny-sdxl", device=device, dtype=torch.float16)


@pytest.fixture
def pipeline(loaded):
    "One's own."
    return copy.deepcopy(loaded)
