"""Imported first by each script, for its effect: what must hold before the heavy imports. Elsewhere it does nothing."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def begin() -> None:
    """See to it that stdin, stdout and stderr exist and can print every character, and that Ctrl-C is one line."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would get what is printed
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the encoding of a terminal may lack σ
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


def stop(*_: Any) -> None:
    """Answer Ctrl-C until `cli.one_line_errors` does."""
    print("\nstopped: the same command continues", file=sys.stderr, flush=True)
    os._exit(130)


if Path(getattr(sys.modules["__main__"], "__file__", "") or "").resolve().parent == ROOT:
    begin()
