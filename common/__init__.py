"""Command line, files, devices. Ctrl-C while a script loads its libraries ends it at once, without a traceback."""

import signal
import sys
from pathlib import Path

# Only a script of this suite, whose `common.config.run` takes over later; a shell's background jobs ignore Ctrl-C.
own = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]
if own and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
