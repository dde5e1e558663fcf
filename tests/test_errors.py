"""What error messages are made of."""

from inferflux.errors import did_you_mean


def test_the_nearest_known_word_is_suggested() -> None:
    assert did_you_mean("temprature", ["top_p", "temperature"]) == '; did you mean "temperature"?'
    assert did_you_mean("zzz", ["top_p", "temperature"]) == ""


def test_a_word_as_long_as_a_body_is_compared_with_nothing() -> None:
    """A caller chooses the word (a tool's name, say), and the comparison would hold up the event loop for seconds."""
    word = "x" * 10_000
    assert did_you_mean(word, [word, "x"]) == ""
