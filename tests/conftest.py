"No test asks the network or touches the cache of whoever runs it."
import os, tempfile

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp(prefix="devsky-tests-")}

LONG = ("test_cluster.py", "test_vram.py", "test_bulk.py", "test_precision.py", "test_benchmarks.py", "test_quantization.py", "test_cli.py")


def pytest_collection_modifyitems(items):
    "Files that take long go first: a worker takes whole files, and none should be left alone with a long one at the end."
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def browser():
    "One Chromium for all browser tests of a process."
    from browser import chromium
    with chromium() as running: yield running


@pytest.fixture(scope="session")
def site():
    "The address of the built site."
    from browser import served_site
    with served_site() as address: yield address
