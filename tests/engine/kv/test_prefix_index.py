"""The index alone: chains, duplicates, and both directions staying together."""

import pytest

from inferflux.engine.kv.prefix_index import PrefixIndex


def test_the_longest_chain_ends_at_the_first_unknown_name() -> None:
    index = PrefixIndex()
    for page, name in enumerate((b"a", b"b", b"d")):
        index.hold(name, page)
    names = iter((b"a", b"b", b"c", b"d"))
    assert index.longest_chain(names) == [0, 1]
    assert list(names) == [b"d"], "nothing is named beyond the miss"


def test_the_first_page_of_a_name_keeps_it() -> None:
    index = PrefixIndex()
    assert index.hold(b"a", 1) == 1
    assert index.hold(b"a", 2) == 1
    assert index.name_of(2) is None
    assert index.forget(1) == b"a"
    assert index.page_of(b"a") is None
    assert index.hold(b"a", 2) == 2
    index.check_integrity()


def test_clearing_forgets_both_directions() -> None:
    index = PrefixIndex()
    index.hold(b"a", 1)
    index.clear()
    assert (len(index), index.name_of(1)) == (0, None)


def test_integrity_check_notices_disagreement() -> None:
    index = PrefixIndex()
    index.hold(b"a", 1)
    index._names[1] = b"b"
    with pytest.raises(AssertionError, match="disagree"):
        index.check_integrity()
