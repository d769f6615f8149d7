"The highest resident memory of a process so far, for tests that measure a process of their own."
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak():
    """Bytes.

    On Linux not `ru_maxrss`: a process that is started inherits the peak of the one that starts it (man 2 getrusage), so a small child of a
    large test would seem as large as the test.
    """
    if STATUS.exists(): return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
