"""Names are the cache's border between tenants and its memory across restarts: they separate what differs, for ever."""

import hashlib
import struct

from inferflux.engine.kv.hashing import PageNamer

TOKENS = list(range(100, 112))


def names_of(tokens: list[int], num_pages: int, namer: PageNamer | None = None, **root: bytes) -> list[bytes]:
    names: list[bytes] = []
    (namer or PageNamer(b"model", 4)).extend(names, tokens, num_pages, **{"salt": b"", **root})
    return names


def test_names_are_the_chain_that_the_docstring_states() -> None:
    root = hashlib.sha256()
    for part in (b"model", b"salt", b""):
        root.update(struct.pack("<Q", len(part)) + part)
    first = hashlib.sha256(root.digest() + struct.pack("<4i", *TOKENS[:4])).digest()
    second = hashlib.sha256(first + struct.pack("<4i", *TOKENS[4:8])).digest()
    assert names_of(TOKENS, 2, salt=b"salt") == [first, second]
    assert len(first) == 32


def test_extending_gives_the_same_names_as_naming_at_once() -> None:
    namer = PageNamer(b"model", 4)
    names: list[bytes] = []
    for num_pages in (1, 1, 3):
        namer.extend(names, TOKENS, num_pages, b"s")
    assert names == names_of(TOKENS, 3, salt=b"s")


def test_known_names_are_not_hashed_again() -> None:
    names = [b"x" * 32]
    PageNamer(b"model", 4).extend(names, TOKENS, 2, b"")
    assert names[0] == b"x" * 32
    assert names[1] == hashlib.sha256(names[0] + struct.pack("<4i", *TOKENS[4:8])).digest()


def test_whatever_differs_before_a_page_changes_its_name() -> None:
    last = {
        "plain": names_of(TOKENS, 3)[-1],
        "first token": names_of([0, *TOKENS[1:]], 3)[-1],
        "last token": names_of([*TOKENS[:-1], 0], 3)[-1],
        "salt": names_of(TOKENS, 3, salt=b"t")[-1],
        "adapter": names_of(TOKENS, 3, adapter=b"t")[-1],
        "model": names_of(TOKENS, 3, PageNamer(b"other", 4))[-1],
        "same tokens without a prefix": names_of(TOKENS[8:], 1)[-1],
    }
    assert len(set(last.values())) == len(last)


def test_parts_of_the_root_do_not_run_into_each_other() -> None:
    namer = PageNamer(b"m", 4)
    assert namer.root(b"ab", b"c") != namer.root(b"a", b"bc")
    assert PageNamer(b"ma", 4).root(b"b") != namer.root(b"ab")


def test_every_int32_token_id_can_be_named() -> None:
    assert len(names_of([0, 2**31 - 1, 1, 2], 1)) == 1
