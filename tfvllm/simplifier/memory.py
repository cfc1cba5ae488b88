"""Memory that is free goes back to the system."""

import ctypes
import sys


def trim() -> None:
    """Lets the C library hand freed memory back, where it can (glibc); else does nothing.

    Tracing and evaluating a graph frees many small blocks that would stay with the process: some 50 MB for a BERT.
    """
    if not sys.platform.startswith("linux"):
        return
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
