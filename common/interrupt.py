"""Ctrl-C while a script loads its libraries ends in one line, exit code 130. A script imports this first."""

import os
import signal
import sys
from pathlib import Path


def _stop(*_: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(130)


# Only for a script of this suite, whose `common.config.run` takes over later; a shell's background jobs ignore Ctrl-C.
own = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]
if own and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, _stop)
