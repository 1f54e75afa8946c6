"""The `orch` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 cannot be done like this, 130 interrupted.

    Every error that is not a bug is one line on stderr; with ORCH_DEBUG=1 the traceback comes too.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--version"], ["-V"]):
        from orch._version import __version__

        sys.stdout.write(f"orch {__version__}\n")
        return 0

    from orch.cli.output import report_error
    from orch.cli.verbs import dispatch

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # `orch run >&-`: Python has none then
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    code = 0
    try:
        code = dispatch(words)
    except BrokenPipeError:
        pass
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = report_error(error)
    try:
        sys.stdout.flush()
    except OSError:
        # Somebody's `| head` is satisfied. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
