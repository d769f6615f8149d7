"How long a test waits for what must come: a guard against hanging, no measure of speed. A busy machine may be ten times slower than a quiet one."
import time
from collections.abc import Callable

PATIENCE = 900  # seconds


def wait_until(condition: Callable[[], object], pause: float = .005) -> None:
    "Return as soon as it holds."
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)
