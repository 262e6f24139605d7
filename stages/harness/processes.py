"""What a process owes to the one that started it: to end with it, however that ends."""

import os
import signal
import sys

DIES_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def die_with_parent(parent: int, by: signal.Signals = signal.SIGTERM) -> None:
    """Asks the kernel to end this process when its parent ends, and ends it where that has ended: a killed dvc leaves nothing running."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, by)
    if os.getppid() != parent:
        os._exit(128 + by)
