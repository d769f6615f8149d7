"No test asks the network, touches the cache of whoever runs it, or depends on a GPU that happens to be there."
import gc, os, signal, sys, tempfile

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp(prefix="devsky-tests-"), "CUDA_VISIBLE_DEVICES": ""}  # before torch is imported

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell; what tests start would ignore Ctrl-C, too

LONG = ("test_ray.py", "test_estimate.py", "test_bulk.py", "test_precision.py", "test_benchmarks.py", "test_quantization.py", "test_cli.py")


def pytest_addoption(parser):
    parser.addoption("--pretend", metavar="GPU", help="run as on a machine with a GPU: cuda, cuda:2 (two of them) or mps; see pretended_gpu.py")


def pytest_configure(config):
    if not config.getoption("--pretend"): return
    from pretended_gpu import pretend
    machine = pretend(config.getoption("--pretend"))
    machine.__enter__()
    config.add_cleanup(lambda: machine.__exit__(None, None, None))


def pytest_collection_modifyitems(items):
    "Files that take long go first: a worker takes whole files, and none should be left alone with a long one at the end."
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


looked_at = 0  # modules that were loaded when the collector was last relieved


@pytest.fixture(autouse=True)
def libraries_are_no_garbage():
    """Take the objects of libraries that were loaded by an earlier test out of the collector's sight.

    Memory is released again and again here, and each time the collector would look at a million of them.
    """
    global looked_at
    if len(sys.modules) - looked_at < 300: return
    looked_at = len(sys.modules)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device(request):
    "Where a test marked `device` runs: on the last of the pretended GPUs, else on the CPU."
    kind, _, count = (request.config.getoption("--pretend") or "cpu").partition(":")
    return f"{kind}:{int(count) - 1}" if count else kind


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
