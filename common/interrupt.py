"""Ctrl-C while a script loads its libraries ends in one line, exit code 130. A script imports this first."""

import os
import signal
import sys
from pathlib import Path


def _stop(*_: object) -> None:
    os.write(2, f"{Path(sys.argv[0]).name}: stopped\n".encode())
    os._exit(130)


# `common.config.run` takes over once the libraries are there. No other program's handler is replaced.
if Path(getattr(sys.modules["__main__"], "__file__", "")).parent.resolve() == Path(__file__).resolve().parent.parent:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _stop)
