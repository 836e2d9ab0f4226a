"""cc-proxyctl, the command that people use by hand; `python -m cc_proxy.cli.ctl` runs it too."""

from cc_proxy.linux.standard_fds import give_up_stderr, guard_standard_fds

# Before the other imports: some libraries keep a file open, and if stdin is closed, that would become stdin.
guard_standard_fds()

import signal
import sys
from argparse import ArgumentParser

from cc_proxy.api import ProxyError
from cc_proxy.ctl import parser
from cc_proxy.ctl.commands import COMMANDS
from cc_proxy.ctl.errors import (
    STATUS_FAILED,
    STATUS_MISUSE,
    STATUS_SIGNALLED,
    Failure,
    Interrupted,
    explain,
    say,
)
from cc_proxy.ctl.stdio import show


def build_parser() -> ArgumentParser:
    """Return the parser of the whole command line. The man page and the completion are made from it."""
    return parser.build(COMMANDS)


def main(argv: list[str] | None = None) -> int:
    """Carry out a command line (default: this process's); returns the exit status."""
    try:
        return _do(argv)
    except Interrupted as interrupted:
        return interrupted.status
    except KeyboardInterrupt:
        return STATUS_SIGNALLED + signal.SIGINT
    except Failure as failure:
        say(explain(failure))
        return failure.status
    except UnicodeEncodeError as error:  # from the environment, or the path of the working directory
        say(f"not valid UTF-8: {error.object!r}")
        return STATUS_MISUSE
    except (ProxyError, OSError) as error:
        say(explain(error))
        return STATUS_FAILED
    finally:
        give_up_stderr()


def _do(argv: list[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as end:  # argparse has printed help, or an error
        show()
        return int(end.code or 0)
    status: int = args.main(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
