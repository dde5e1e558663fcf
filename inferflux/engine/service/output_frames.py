"""Splits a step's outputs into frames that are never too large to send, and that neither side waits long for.

Nearly all outputs are small. The log-probabilities of a long prompt are not: they are sent in pieces, in order, the
last one together with the rest of the output. Knows frames; no socket.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final

from msgspec import structs

from inferflux.engine.interface import Output
from inferflux.engine.service.protocol import Outputs
from inferflux.engine.stats import EngineStats
from inferflux.engine.step import TokenLogprobs

# Log-probabilities in one frame: about a megabyte. One token's own always stay together.
MAX_LOGPROBS: Final = 65536


def output_frames(outputs: Iterable[Output], stats: EngineStats) -> Iterator[Outputs]:
    """Yields at least one frame, for the stats."""
    part: list[Output] = []
    size = 0
    for output in chain.from_iterable(map(_pieces, outputs)):
        added = 0 if output.prompt_logprobs is None else _num_values(output.prompt_logprobs)
        if part and size + added > MAX_LOGPROBS:
            yield Outputs(part, stats)
            part, size = [], 0
        part.append(output)
        size += added
    yield Outputs(part, stats)


def _pieces(output: Output) -> Iterable[Output]:
    entries = output.prompt_logprobs
    if entries is None or _num_values(entries) <= MAX_LOGPROBS:
        return (output,)
    count = max(1, MAX_LOGPROBS // max(1 + len(entry.top) for entry in entries))
    *firsts, last = (entries[start : start + count] for start in range(0, len(entries), count))
    pieces = [Output(output.request_id, prompt_logprobs=first) for first in firsts]
    return (*pieces, structs.replace(output, prompt_logprobs=last))


def _num_values(entries: Iterable[TokenLogprobs]) -> int:
    return sum(1 + len(entry.top) for entry in entries)
