"""The audit log's key: made once, private, encrypted when there is a passphrase."""

import json
from pathlib import Path

import pytest

from inferflux.errors import ConfigError
from inferflux.server.audit.keys import key_path, open_keys, read_keys, reseal_key


def test_a_key_is_made_once_and_for_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "audit.log.key"
    assert read_keys(path, None) is None
    keys = open_keys(path, None)
    assert path.stat().st_mode & 0o777 == 0o600
    assert open_keys(path, None) == keys == read_keys(path, None)
    assert open_keys(tmp_path / "other.key", None).id != keys.id
    assert keys.text != keys.line
    assert keys.text.hex() not in repr(keys)


def test_a_key_others_could_read_becomes_private(tmp_path: Path) -> None:
    path = tmp_path / "audit.log.key"
    open_keys(path, None)
    path.chmod(0o644)
    open_keys(path, None)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_passphrase_encrypts_the_key_and_changes_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "audit.log.key"
    keys = open_keys(path, None)
    master = json.loads(path.read_text())["key"]
    assert open_keys(path, "one") == keys
    assert master not in path.read_text()
    with pytest.raises(ConfigError, match="INFERFLUX_POLICY_PASSPHRASE"):
        open_keys(path, None)
    with pytest.raises(ConfigError, match="wrong passphrase"):
        open_keys(path, "two")
    reseal_key(path, "one", "two")
    assert open_keys(path, "two") == keys


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"type":"plain","key":"00"}', b'{"type":"plain","key":"zz"}', b"\xff"]
)
def test_a_damaged_key_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "audit.log.key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"audit\.log\.key"):
        open_keys(path, None)
    assert path.read_bytes() == content


def test_a_flipped_bit_of_a_sealed_key_is_found(tmp_path: Path) -> None:
    path = tmp_path / "audit.log.key"
    open_keys(path, "one")
    fields = json.loads(path.read_text())
    fields["key"] = f"{int(fields['key'][0], 16) ^ 1:x}" + fields["key"][1:]
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="damaged"):
        open_keys(path, "one")


def test_a_link_to_the_key_stays_when_the_passphrase_changes(tmp_path: Path) -> None:
    real, link = tmp_path / "vault", tmp_path / "audit.log.key"
    link.symlink_to(real)
    keys = open_keys(key_path(tmp_path / "audit.log"), "one")
    assert reseal_key(key_path(tmp_path / "audit.log"), "one", "two")
    assert link.is_symlink()
    assert read_keys(real, "two") == keys
