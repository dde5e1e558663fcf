"""`inferflux audit verify FILE...`: finds what was changed in an audit log."""

import argparse
import sys
from pathlib import Path

from inferflux.config.process_env import passphrase_of_process
from inferflux.errors import ConfigError, InferFluxError
from inferflux.server.audit.keys import AuditKeys, key_path, read_keys
from inferflux.server.audit.verify import describe, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="verify")
    check = actions.add_parser("verify", help="exit 1 if a line was changed, removed, added or moved")
    check.add_argument("files", type=Path, nargs="+", metavar="FILE", help="logs, oldest first, rotated ones included")
    check.add_argument("--key", type=Path, metavar="FILE", help="the log's key (default: FILE.key, where it exists)")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError for a key that cannot be used, InferFluxError for a file that cannot be read."""
    keys = _find_keys(args.files[-1], args.key)
    try:
        report = verify(args.files, keys)
    except OSError as error:
        raise InferFluxError(f"{error.filename}: {error.strerror}") from error
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    if keys is None:
        print("note: the log's key is not here, so who wrote the lines was not checked (--key)", file=sys.stderr)
    for line in describe(report):
        print(line, file=sys.stderr)
    if report.findings:
        return 1
    print(f"{', '.join(map(str, args.files))}: ok, {report.num_lines} lines, the last with digest {report.head}")
    return 0


def _find_keys(log: Path, given: Path | None) -> AuditKeys | None:
    """Looks beside the log: audit.log.1 was written as audit.log, with audit.log.key."""
    passphrase = passphrase_of_process()
    if given is not None:
        keys = read_keys(given, passphrase)
        if keys is None:
            raise ConfigError(f"--key: {given}: no such file")
        return keys
    while True:
        keys = read_keys(key_path(log), passphrase)
        if keys is not None or not log.suffix:
            return keys
        log = log.with_suffix("")
