"""Every key of the tree is reachable from each source, has a description, and is known where keys are listed."""

import json
from typing import Any

import msgspec
import pytest

from inferflux.config.descriptions import DESCRIPTIONS
from inferflux.config.env import FLAGS, SHORT_NAMES, TORCHRUN_NAMES, key_of_name
from inferflux.config.load import load_config
from inferflux.config.schema import ANY_INDEX, Key, default_of, env_name, find, format_key, schema_leaves
from inferflux.config.values import check

LEAVES = dict(schema_leaves())


def at_zero(key: Key) -> Key:
    return tuple(0 if part == ANY_INDEX else part for part in key)


@pytest.mark.parametrize("key", LEAVES, ids=format_key)
def test_every_key_has_its_variable(key: Key) -> None:
    assert key_of_name(env_name(at_zero(key))) == at_zero(key)


@pytest.mark.parametrize("key", LEAVES, ids=format_key)
def test_every_default_is_accepted_in_a_file(key: Key) -> None:
    default: Any = default_of(LEAVES[key])
    if default is not msgspec.NODEFAULT:
        plain = json.loads(json.dumps(default))
        assert check(LEAVES[key].type, plain, key) == plain


def test_every_key_is_described_once() -> None:
    assert list(DESCRIPTIONS) == [format_key(key) for key in LEAVES]


def test_names_point_at_keys() -> None:
    for key in [*SHORT_NAMES.values(), *TORCHRUN_NAMES.values(), *FLAGS.values()]:
        assert find(key) is not None, key


def test_defaults_alone_are_a_valid_configuration() -> None:
    assert load_config(None, {}, {}).origins == {}
