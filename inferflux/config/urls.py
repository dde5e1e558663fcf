"""Which URLs the server itself may call: those whose traffic cannot be read or forged on the way."""

import ipaddress
from urllib.parse import urlsplit


def is_safe_url(url: str) -> bool:
    """True for https URLs, and for http ones that stay on this machine; else as `is_http_url`."""
    if not is_http_url(url):
        return False
    parts = urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.hostname or "")


def is_http_url(url: str) -> bool:
    """True for http and https URLs with a host, without user and fragment."""
    try:
        parts = urlsplit(url)
        is_sound = (parts.port is None or parts.port > 0) and is_host(parts.hostname or "")
    except ValueError:
        return False
    clean = url.isascii() and url.isprintable() and " " not in url and parts.username is None and not parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and clean and is_sound


def is_host(name: str) -> bool:
    """True for addresses and names that can be looked up. Others (with an empty label, or one of more than 63 letters)
    raise unusual errors, which code that opens a connection does not expect."""
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return True


def is_address(host: str) -> bool:
    """True for `localhost` and IP addresses, with or without a port: what no name server has a say in."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    try:
        return name.lower() == "localhost" or bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
