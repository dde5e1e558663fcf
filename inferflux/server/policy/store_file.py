"""PolicyFile: the policy store on disk. Opens it, checks it, saves the next generation, keeps the one before as .bak.

Beside `policy.enc` lie `policy.enc.bak` (the last good content before the present one) and `policy.enc.lock` (held by
the process that may write). Everything here blocks; the async face is `store`.
"""

import logging
from pathlib import Path

from inferflux.errors import ConfigError, InferFluxError
from inferflux.server.durable import (
    Lock,
    LockedError,
    make_private,
    read_file,
    real_file,
    sync_folder,
    write_file,
)
from inferflux.server.policy.document import PolicyDocument
from inferflux.server.policy.envelope import EnvelopeError, Opened, unwrap, wrap
from inferflux.server.sealed import Derivation, Seal

logger = logging.getLogger(__name__)


class PolicyPersistError(InferFluxError):
    """The change could not be written, and so was not made."""


class PolicyFile:
    """Holds the lock from construction until `close`. One thread at a time.

    generation: of the content on disk, 0 while there is none. Each save gets a higher one.
    """

    def __init__(self, path: Path, passphrase: str | None) -> None:
        """Raises ConfigError when another process holds the store, or the folder cannot be used."""
        path = real_file(path)
        self.path = path
        self.backup = path.with_name(path.name + ".bak")
        self.generation = 0
        self._passphrase = passphrase
        self._seal: Seal | None = None
        self._content: bytes | None = None
        self._last_tried = 0
        self._lock = _lock(path)

    @property
    def encrypted(self) -> bool:
        """Whether what it loads and saves is under a passphrase."""
        return self._passphrase is not None

    def close(self) -> None:
        self._lock.close()

    def load(self) -> PolicyDocument | None:
        """Returns the stored document, None before the first save. Writes nothing.

        Raises ConfigError for a store that cannot be read or trusted, and for a lost one (its .bak is there).
        """
        content = _read(self.path)
        if content is None:
            if _read(self.backup) is not None:
                raise ConfigError(
                    f"policy.store: {self.path}: is missing, but {self.backup.name} exists; restore it with "
                    "`inferflux policy restore`, or remove it to start from the configuration"
                )
            return None
        opened = self._unwrap(self.path, content)
        self._tighten()
        self._content = content
        self._seal = opened.seal
        self.generation = self._last_tried = opened.generation
        return opened.document

    def load_backup(self) -> Opened:
        """Returns what .bak holds. Raises ConfigError."""
        content = _read(self.backup)
        if content is None:
            raise ConfigError(f"policy.store: {self.backup}: there is no such file to restore from")
        return self._unwrap(self.backup, content)

    def save(self, document: PolicyDocument) -> None:
        """Writes the document as the next generation; it is on the disk when this returns.

        Raises PolicyPersistError, and RequestError for a document that could not be read again; the store on disk is
        then the one before.
        """
        content = wrap(document, self._next_generation(), self._current_seal())
        self._write(self._content, content)

    def skip_to(self, generation: int) -> None:
        """Makes the next save a later generation than this one."""
        self._last_tried = max(self._last_tried, generation)

    def set_aside(self) -> Path | None:
        """Renames an unusable store to .damaged, so that a save neither overwrites it nor takes it for a good copy.

        Returns where it is now, None when there was none. Raises PolicyPersistError.
        """
        aside = self.path.with_name(self.path.name + ".damaged")
        try:
            self.path.replace(aside)
            sync_folder(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PolicyPersistError(f"{self.path} could not be renamed: {error.strerror}") from error
        return aside

    def change_passphrase(self, document: PolicyDocument, passphrase: str) -> None:
        """Writes the document, and .bak with it, under another passphrase and a fresh salt: nothing stays that the
        old one opens. Raises PolicyPersistError; the store is then still under the old one, and this may be repeated.
        """
        seal = Seal(passphrase, Derivation.fresh())
        backup = wrap(document, self._next_generation(), seal)
        self._write(backup, wrap(document, self._next_generation(), seal))
        self._passphrase = passphrase
        self._seal = seal

    def _write(self, backup: bytes | None, content: bytes) -> None:
        try:
            before = read_file(self.backup)
        except OSError as error:
            raise _not_written(error) from error
        try:
            if backup is not None:
                write_file(self.backup, backup)
            write_file(self.path, content)
        except OSError as error:
            _put_back(self.path, self._content)
            _put_back(self.backup, before)
            raise _not_written(error) from error
        self._content = content
        self.generation = self._last_tried

    def _next_generation(self) -> int:
        self._last_tried += 1
        return self._last_tried

    def _current_seal(self) -> Seal | None:
        if self._seal is None and self._passphrase is not None:
            self._seal = Seal(self._passphrase, Derivation.fresh())
        return self._seal

    def _unwrap(self, path: Path, content: bytes) -> Opened:
        try:
            return unwrap(content, self._passphrase)
        except EnvelopeError as error:
            raise ConfigError(f"policy.store: {path}: {error}") from None

    def _tighten(self) -> None:
        for path in (self.path, self.backup):
            try:
                if make_private(path):
                    logger.warning("the policy store %s was open to other users; now it is not", path)
            except FileNotFoundError:
                continue  # there is no .bak before the second save
            except OSError as error:
                logger.warning("the policy store %s is open to other users: %s", path, error.strerror)


def _not_written(error: OSError) -> PolicyPersistError:
    return PolicyPersistError(
        f"the policy store could not be written, nothing was changed: {error.strerror or str(error)}"
    )


def _put_back(path: Path, content: bytes | None) -> None:
    """After a failed write, one behind the rename (the folder's flush) too, makes sure that the old content is the one
    in place; None: that there is no file."""
    try:
        if read_file(path) == content:
            return
        if content is None:
            path.unlink()
            sync_folder(path)
        else:
            write_file(path, content)
    except OSError as error:
        logger.critical("the policy store %s may hold a change that was refused: %s", path, error.strerror)


def _lock(path: Path) -> Lock:
    try:
        return Lock(path.with_name(path.name + ".lock"))
    except LockedError as error:
        holder = f" (process {error.holder})" if error.holder else ""
        raise ConfigError(
            f"policy.store: {path}: is in use by another InferFlux{holder}; stop that one first"
        ) from None
    except OSError as error:
        raise ConfigError(f"policy.store: {path}: must be in a folder that can be written ({error.strerror})") from None


def _read(path: Path) -> bytes | None:
    try:
        return read_file(path)
    except OSError as error:
        raise ConfigError(f"policy.store: {path}: cannot be read: {error.strerror or error}") from None
