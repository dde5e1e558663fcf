"""`inferflux policy restore` and `inferflux policy rekey`: on the store's file, while no server uses it. What else the
passphrase encrypts, the key of the audit log, is rekeyed with the store."""

import argparse
import getpass
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inferflux.config import Config
from inferflux.config.from_process import config_help, load_from_process
from inferflux.config.process_env import PASSPHRASE_VARIABLE, passphrase_of_process, without_line_end
from inferflux.errors import ConfigError
from inferflux.log import escape
from inferflux.server.audit.keys import key_path, put_key_back, reseal_key
from inferflux.server.policy.document import PolicyDocument
from inferflux.server.policy.store_file import PolicyFile, PolicyPersistError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="restore|rekey")
    restore = actions.add_parser("restore", help="restore the store's last good copy (.bak)")
    restore.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    restore.set_defaults(run=_restore)
    rekey = actions.add_parser(
        "rekey", help=f"encrypt under a new passphrase; {PASSPHRASE_VARIABLE} holds the current one, if any"
    )
    rekey.add_argument(
        "--new-passphrase-file", metavar="FILE", help="file with the new passphrase, - for stdin (default: ask)"
    )
    rekey.add_argument(
        "--audit-log", type=Path, metavar="FILE", help="log whose key is encrypted, too (default: logging.audit_log)"
    )
    rekey.set_defaults(run=_rekey)
    for action in (restore, rekey):
        action.add_argument("--store", type=Path, metavar="FILE", help="the store (default: policy.store)")
        action.add_argument("--config", type=Path, metavar="FILE", help=config_help())


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError for a store that cannot be used, PolicyPersistError when it cannot be written."""
    code: int = args.run(args)
    return code


def _restore(args: argparse.Namespace) -> int:
    with _open_file(args) as file:
        backup = file.load_backup()
        try:
            current = file.load()
        except ConfigError as error:
            print(f"{error}\nWhat was changed after generation {backup.generation} is lost.", file=sys.stderr)
            current = None
        else:
            assert current is not None, "load refuses a store of which only .bak is left"
        _warn_of_revived_keys(backup.document, current)
        if not _confirmed(f"Restore generation {backup.generation} of {file.path}?", args.yes):
            print("nothing was changed", file=sys.stderr)
            return 1
        if current is None and (aside := file.set_aside()) is not None:
            print(f"the unusable store is now {aside}")
        file.skip_to(backup.generation)
        file.save(backup.document)
        print(f"{file.path}: restored generation {backup.generation}, as generation {file.generation}")
    return 0


def _rekey(args: argparse.Namespace) -> int:
    """The audit log's key first: interrupted after that, the command may be repeated; the key is then left alone. Where
    the store cannot be written, the key is as it was, too."""
    audit_log = args.audit_log or _configured(args).logging.audit_log
    with _open_file(args) as file:
        document = file.load()
        if document is None:
            raise ConfigError(f"policy.store: {file.path}: there is no such file")
        passphrase = _new_passphrase(args.new_passphrase_file)
        key = key_path(Path(audit_log)) if audit_log is not None else None
        before = reseal_key(key, passphrase_of_process(), passphrase) if key is not None else None
        try:
            file.change_passphrase(document, passphrase)
        except PolicyPersistError:
            if key is not None and before is not None:
                put_key_back(key, before)
            raise
        if before is not None:
            print(f"{key}: under the new passphrase")
        print(f"{file.path}: generation {file.generation}, under the new passphrase; put it in {PASSPHRASE_VARIABLE}")
    return 0


@contextmanager
def _open_file(args: argparse.Namespace) -> Iterator[PolicyFile]:
    store = args.store or _configured(args).policy.store
    if store is None:
        raise ConfigError("policy.store: must be set, or pass --store FILE")
    file = PolicyFile(Path(store), passphrase_of_process())
    try:
        yield file
    finally:
        file.close()


def _configured(args: argparse.Namespace) -> Config:
    return load_from_process(args.config, {}).config


def _warn_of_revived_keys(backup: PolicyDocument, current: PolicyDocument | None) -> None:
    known = {record.id for record in current.api_keys} if current is not None else set()
    for record in backup.api_keys:
        if record.id not in known:
            print(f"API key {record.id} ({escape(record.name)}) works again after this", file=sys.stderr)


def _confirmed(question: str, yes: bool) -> bool:
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError("cannot ask for confirmation without a terminal; pass --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _new_passphrase(source: str | None) -> str:
    """Returns what the file (`-`: stdin) holds, less the line's end; without a file, what is typed twice."""
    if source is None:
        if not sys.stdin.isatty():
            raise ConfigError("--new-passphrase-file: is required without a terminal (- is stdin)")
        passphrase = getpass.getpass("New passphrase: ")
        if getpass.getpass("Again: ") != passphrase:
            raise ConfigError("the two passphrases differ")
    else:
        passphrase = _read_passphrase(source)
    if not passphrase or "\n" in passphrase or "\0" in passphrase:
        raise ConfigError("the new passphrase must be one line, and not empty")
    return passphrase


def _read_passphrase(source: str) -> str:
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return without_line_end(content.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--new-passphrase-file: {source}: cannot be read ({error})") from None
