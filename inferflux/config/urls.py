"""Which URLs the server itself may call: those nobody on the way can read or answer in another's place."""

import ipaddress
from urllib.parse import urlsplit


def is_safe_url(url: str) -> bool:
    """True for https URLs, and for http ones that stay on this machine; without user and fragment."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    if not host or parts.username is not None or parts.fragment or not url.isascii() or not url.isprintable():
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
