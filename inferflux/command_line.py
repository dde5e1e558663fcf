"""What all commands have in common: exit codes, standard streams, usage errors on one line, numbers that must be
positive.

Knows no command.
"""

import argparse
import difflib
import errno
import io
import os
import re
import sys
from typing import Any, Final, NoReturn

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
_OUTPUT_ERRORS: Final = frozenset((errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))


class Parser(argparse.ArgumentParser):
    """Takes options by their full name only, and reports a usage error on one line, with exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}{_nearest(message)} (see {self.prog} --help)\n")


def _nearest(message: str) -> str:
    """Of a word that is none of those accepted, which Python's parser lists."""
    found = re.search(r"invalid choice: '(.+)' \(choose from (.+)\)", message)
    close = difflib.get_close_matches(found[1], re.findall(r"[\w.-]+", found[2]), n=1) if found else ()
    return f'; did you mean "{close[0]}"?' if close else ""


def positive(text: str) -> int:
    """Reads an option's value; a usage error says what it must be."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number (got {text!r})") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1 (got {value})")
    return value


def open_streams() -> None:
    """Opens standard streams that the caller has closed on /dev/null. Else the next file to be opened, perhaps the
    audit log, would get the number of one, and with it whatever a library prints. Characters that the terminal's
    encoding lacks (an emoji in latin-1) are printed as question marks."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
            setattr(sys, name, os.fdopen(number, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def give_up_output(program: str, error: OSError) -> int:
    """Our output cannot be written: the disk is full, or its reader (head, less) has left, which nobody wants to hear
    of. Python would complain again when it flushes at exit. Returns the exit code; raises errors of any other kind."""
    if error.errno not in _OUTPUT_ERRORS:
        raise error
    if error.errno != errno.EPIPE:
        print(f"{program}: the output cannot be written: {error.strerror}", file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FAILED
