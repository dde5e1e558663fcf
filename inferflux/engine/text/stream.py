"""TextStream: the engine's outputs of one request, turned into text with its stop strings kept out.

Both faces use it: the HTTP handlers and the offline `LLM`. Knows tokens and text; no HTTP, no engine to call.
"""

from collections.abc import Sequence

import msgspec

from inferflux.engine.interface import Output
from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text.detokenizer import Detokenizer
from inferflux.engine.text.stops import StopMatcher
from inferflux.engine.text.tokenizer import Tokenizer
from inferflux.sampling_params import SamplingParams


class TextDelta(msgspec.Struct, gc=False):
    """What one Output adds. `logprobs` are those of `token_ids`, one each, when the request asked for them.

    Text comes later than its tokens while it is held back (half a character, the start of a stop string).
    finish_reason: stop, length, abort, error, or None while the text goes on. stop_reason: the stop string, or the id
    out of stop_token_ids, that ended it; None for EOS.
    """

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class TextStream:
    """One sequence's text. Feed it every Output of its request in order; call from one thread at a time.

    The token that ended the sequence (EOS or a stop token) counts among `token_ids` but not in the text, special
    tokens shown or not. A stop string ends the text before it; the token that completed it is the last of
    `token_ids`, whatever else came with it. The deltas' parts joined are `text`, `token_ids` and `logprobs`.

    shown: special tokens whose text is wanted although special tokens are skipped.
    """

    __slots__ = (
        "_detokenizer", "_matcher", "_min_tokens", "_parts", "_stop_token_ids",
        "finish_reason", "logprobs", "stop_reason", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        *,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=sampling.skip_special_tokens, prompt_ids=prompt_token_ids, shown=shown
        )
        self._matcher = StopMatcher(sampling.stop) if sampling.stop else None
        self._min_tokens = sampling.min_tokens
        self._stop_token_ids = sampling.stop_token_ids
        self._parts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if sampling.logprobs is None else []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._parts)

    def feed(self, output: Output) -> TextDelta:
        """Returns what this Output adds; nothing once the text has ended (more may come until the abort)."""
        if self.finish_reason is not None:
            return TextDelta()
        token_ids = output.token_ids
        shown = token_ids if output.stop_token_id is None else token_ids[:-1]
        if self._matcher is None:
            text = self._detokenizer.feed(shown) if shown else ""
        else:
            text, num_shown = self._feed_matching(self._matcher, shown)
            if self._matcher.matched is not None:
                return self._stop_at_match(output, text, self._matcher.matched, num_shown)
        if output.finish_reason is not None:
            text += self._flush()
            self.finish_reason = output.finish_reason
            if output.stop_token_id in self._stop_token_ids:
                self.stop_reason = output.stop_token_id
        return self._add(text, token_ids, output.logprobs)

    def _feed_matching(self, matcher: StopMatcher, shown: Sequence[int]) -> tuple[str, int]:
        """Returns the text let out and how many tokens it took: all, or those up to the one completing a stop."""
        parts = []
        num_before = len(self.token_ids)
        for index, token_id in enumerate(shown):
            armed = num_before + index + 1 >= self._min_tokens
            parts.append(matcher.feed(self._detokenizer.feed((token_id,)), armed=armed))
            if matcher.matched is not None:
                return "".join(parts), index + 1
        return "".join(parts), len(shown)

    def _stop_at_match(self, output: Output, text: str, stop: str, num_tokens: int) -> TextDelta:
        self.finish_reason, self.stop_reason = "stop", stop
        logprobs = output.logprobs[:num_tokens] if output.logprobs is not None else None
        return self._add(text, output.token_ids[:num_tokens], logprobs)

    def _flush(self) -> str:
        """Returns what was held back at the end; it can hold no whole stop string."""
        text = self._detokenizer.finish()
        return text if self._matcher is None else self._matcher.feed(text, armed=False) + self._matcher.finish()

    def _add(self, text: str, token_ids: list[int], logprobs: list[TokenLogprobs] | None) -> TextDelta:
        self._parts.append(text)
        self.token_ids += token_ids
        if self.logprobs is not None and logprobs is not None:
            self.logprobs += logprobs
        return TextDelta(text, token_ids, logprobs, self.finish_reason, self.stop_reason)
