"""JSON Schema keywords for a field in /openapi.json, beyond its type: limits that the body's own checks enforce.

Changes nothing about how bodies are read.
"""

from typing import Any

from msgspec import Meta


def field_schema(**keywords: Any) -> Meta:
    """Returns a type annotation with these JSON Schema keywords."""
    return Meta(extra_json_schema=keywords)
