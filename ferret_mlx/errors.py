"""How the command lines end: one line on stderr and an exit status, never a traceback."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Command(Protocol):
    def __call__(self, argv: Sequence[str] | None = None) -> None: ...


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, without abbreviated flags and without the usage block before an error."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        # argparse ends its own sentences without a full stop.
        self.exit(BAD_INPUT, f"{self.prog}: error: {one_line(message).rstrip('.')}.\n")


def run_command(
    main: Callable[[Sequence[str] | None], None],
) -> Command:
    """Decorate the main function of a command line.

    ValueError, FileNotFoundError, other errors about a named file and a full disk become one line
    on stderr and exit status 2; Ctrl-C exits with 130. Anything else is a bug and keeps its
    traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        # A locale without UTF-8 must not end an answer in the middle.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            main(argv)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            # The reader of stdout has gone, `generate.py ... | head` for one.
            _give_up_stdout()
            sys.exit(1)
        except (ValueError, FileNotFoundError) as error:
            _fail(error)
        except OSError as error:
            if error.filename is None and error.errno != errno.ENOSPC:
                raise
            if error.filename is None:
                _give_up_stdout()  # most likely what could not be written
            _fail(error)

    return run


def _give_up_stdout() -> None:
    """Nothing more can be written; Python's flush at the end must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def describe(error: Exception) -> str:
    """One line; of an error of the operating system with the file that it is about."""
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror}.")
    return one_line(error)


def _fail(error: Exception) -> NoReturn:
    program = os.path.basename(sys.argv[0]) or "ferret-mlx"
    print(f"{program}: error: {describe(error)}", file=sys.stderr)
    sys.exit(BAD_INPUT)
