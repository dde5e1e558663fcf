"""What /openapi.json says of a field beyond its type: the sizes and names that its body's own checks refuse, and word.

Changes nothing about how bodies are read.
"""

from typing import Any

from msgspec import Meta


def said(**words: Any) -> Meta:
    """Returns what to annotate a type with; words: of JSON Schema."""
    return Meta(extra_json_schema=words)
