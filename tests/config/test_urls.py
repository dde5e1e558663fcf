"""URLs the server may call itself."""

import pytest

from inferflux.config.urls import is_safe_url


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://id.example.org", True),
        ("http://127.0.0.1:9000/realm", True),
        ("http://localhost:9000", True),
        ("http://[::1]:9000", True),
        ("http://id.example.org", False),
        ("http://127.0.0.1.example.org", False),
        ("https://user:secret@id.example.org", False),
        ("https://id.example.org/#x", False),
        ("https://", False),
        ("ftp://id.example.org", False),
        ("https://id.example.org/\n", False),
        ("id.example.org", False),
        ("https://id.example.org:99999", False),
        ("https://id.example.org:x", False),
        ("https://id..example.org", False),
        (f"https://{'a' * 64}.example.org", False),
        (f"https://{'a' * 63}.example.org:8443/realms/one", True),
        ("https://id example.org", False),
    ],
)
def test_safe_urls(url: str, safe: bool) -> None:
    assert is_safe_url(url) is safe
