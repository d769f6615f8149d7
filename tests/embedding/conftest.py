"What the tests of data sets share."
import faulthandler, os, shutil, tempfile
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")  # Linux has a file system in memory there


@pytest.fixture
def tmp_path(tmp_path):
    "In memory, where there is room: a job flushes every file, and none of these tests is about how long a disk takes for it."
    if not os.access(MEMORY, os.W_OK) or shutil.disk_usage(MEMORY).free < 2**30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="devsky-tests-", dir=MEMORY, ignore_cleanup_errors=True) as folder: yield Path(folder)


@pytest.fixture
def nothing_hangs():
    "A hang ends the whole run, with the place where it hung."
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
