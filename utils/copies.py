"""What a copy of a command does first: it ends when the process that started it does (see workers.run_copies)."""

import contextlib
import ctypes
import os
import runpy
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal to get when the parent dies


def be_copy() -> None:
    """Run the script named on the command line, after the number of the process that started this one."""
    parent, script = int(sys.argv[1]), sys.argv[2]
    with contextlib.suppress(AttributeError, OSError, TypeError):  # at once, whatever this process is doing
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if sys.platform != "win32":  # where the parent of a Python of an environment is its launcher
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()  # elsewhere, or if it is gone
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)
