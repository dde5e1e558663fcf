"""The field with which a request gives texts, one or many, as text or as token ids."""

from typing import Annotated, cast

from inferflux.errors import RequestError
from inferflux.server.http.schemas.field_schema import field_schema

Prompts = Annotated[str | list[str | int | Annotated[list[int], field_schema(minItems=1)]], field_schema(minItems=1)]


def split_prompts(given: Prompts, name: str, most: int) -> list[str] | list[list[int]]:
    """Returns them one by one: all texts, or all token ids. Raises RequestError naming the field `name`."""
    if isinstance(given, str):
        return [given]
    match set(map(type, given)):
        case kinds if kinds == {int}:
            return [cast(list[int], given)]
        case kinds if kinds in ({str}, {list}):
            if len(given) > most:
                raise RequestError(f"{name}: at most {most} {name}s in one request", param=name)
            return cast(list[str] | list[list[int]], given)
    raise RequestError(
        f"{name}: must be a string, a list of strings, a list of token ids or a list of such lists, and not empty",
        param=name,
    )
