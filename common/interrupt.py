"""Ctrl-C while a script loads its libraries ends in one line, exit code 130. A script imports this first."""

import os
import signal
import sys
from pathlib import Path


def _stop(*_: object) -> None:
    os.write(2, f"{Path(sys.argv[0]).name}: stopped\n".encode())
    os._exit(130)


# Only for a script of this suite, whose `common.config.run` takes over later; a shell's background jobs ignore Ctrl-C.
main = Path(getattr(sys.modules["__main__"], "__file__", "")).resolve()
if main.parent == Path(__file__).resolve().parent.parent and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, _stop)
