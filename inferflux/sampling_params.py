"""SamplingParams: how one request's next tokens are chosen and when it stops.

Plain data shared by the HTTP server, the offline `LLM` and the engine. Range checks live here and nowhere else.
"""

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType, NoneType
from typing import Any, Final, Literal, NamedTuple, get_args

import msgspec

from inferflux.errors import RequestError

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_TOKEN_ID = 2**31 - 1
MAX_GRAMMAR_CHARS = 256 * 1024


class Range(NamedTuple):
    """Of a number: from `low`, or above it, to `high`."""

    low: float
    high: float
    integer: bool = False
    above: bool = False


# Of the fields that are one number, or none.
RANGES: Final[Mapping[str, Range]] = MappingProxyType(
    {
        "max_tokens": Range(0, MAX_TOKEN_ID, integer=True),
        "top_k": Range(0, MAX_TOKEN_ID, integer=True),
        "seed": Range(-(2**63), 2**63 - 1, integer=True),
        "min_tokens": Range(0, MAX_TOKEN_ID, integer=True),
        "logprobs": Range(0, MAX_LOGPROBS, integer=True),
        "prompt_logprobs": Range(0, MAX_LOGPROBS, integer=True),
        "n": Range(1, MAX_N, integer=True),
        "temperature": Range(0.0, 2.0),
        "top_p": Range(0.0, 1.0, above=True),
        "min_p": Range(0.0, 1.0),
        "repetition_penalty": Range(0.01, 10.0),
        "presence_penalty": Range(-2.0, 2.0),
        "frequency_penalty": Range(-2.0, 2.0),
    }
)
# Of each number in the fields that hold several.
TOKEN_ID_RANGE: Final = Range(0, MAX_TOKEN_ID, integer=True)
LOGIT_BIAS_RANGE: Final = Range(-100, 100)
_NULLABLE: Final = frozenset(("max_tokens", "seed", "logprobs", "prompt_logprobs"))

Pooling = Literal["last", "mean", "cls"]
_POOLINGS: Final = (None, *get_args(Pooling))


class Grammar(msgspec.Struct, frozen=True):
    """What a whole answer must look like. json: `text` is a JSON schema; regex: a regular expression that matches all
    of it; lark: a Lark grammar in llguidance's dialect.

    thoughts: whether free text up to `</think>` comes before it. may: only after an opening `<think>`; open: it does,
    for the prompt has opened them.
    """

    kind: Literal["json", "regex", "lark"]
    text: str
    thoughts: Literal["none", "may", "open"] = "none"


# Of the other fields: their types, in code and in words.
_KINDS: Final[Mapping[str, tuple[tuple[type, ...], str]]] = MappingProxyType(
    {
        "logit_bias": ((Mapping, NoneType), "a mapping of token ids to numbers"),
        "stop": ((list, tuple), "a sequence of strings"),
        "stop_token_ids": ((list, tuple), "a sequence of token ids"),
        "ignore_eos": ((bool,), "True or False"),
        "skip_special_tokens": ((bool,), "True or False"),
        "grammar": ((Grammar, NoneType), "a Grammar"),
    }
)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling parameters with the OpenAI API's names and meanings, plus the field's usual extensions.

    max_tokens: most tokens to generate; 0: the prompt is only computed; None: until the model's window is full.
    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
    seed: fixes the noise; None: the engine draws one. Noise is a function of (seed, position) only.
    stop: strings that end the output and are not part of it. min_tokens: neither EOS nor a stop ends it before.
    logprobs: None: none; k: the chosen token's log-probability and the k likeliest tokens' besides.
    prompt_logprobs: the same for the prompt's own tokens (turns prefix-cache reads off for the request).
    pooling: the prompt is to become one vector, and nothing is generated: the model's last hidden states, of its `last`
        or its first (`cls`) token, or the `mean` of all (which turns prefix-cache reads off for the request).
    grammar: what the answer must look like. Tokens it does not allow are never drawn, and end-of-text is one of them
        until it may end; where it must end, that comes whatever min_tokens says. A stop string or max_tokens may cut
        the answer short.

    Raises RequestError, naming the field, when a value is out of range or of another type.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    skip_special_tokens: bool = True
    grammar: Grammar | None = None
    pooling: Pooling | None = None

    @property
    def generates(self) -> bool:
        """Whether tokens follow the prompt; else it is only computed."""
        return self.pooling is None and self.max_tokens != 0

    @property
    def reads_tokens(self) -> bool:
        """Whether choosing a token takes the values of those before it; else their number is enough."""
        return self.grammar is not None or self.penalises

    @property
    def penalises(self) -> bool:
        """Whether tokens become less likely, or likelier, by having been there before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def __post_init__(self) -> None:
        for name, bounds in RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in _NULLABLE:
                check_number(name, value, bounds)
        for name, (types, words) in _KINDS.items():
            if not isinstance(getattr(self, name), types):
                raise RequestError(f"{name}: must be {words} (got {getattr(self, name)!r:.40})", param=name)
        if self.pooling not in _POOLINGS:
            raise RequestError(f"pooling: must be last, mean or cls (got {self.pooling!r:.40})", param="pooling")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens: must be <= max_tokens ({self.max_tokens}, got {self.min_tokens})", param="min_tokens"
            )
        self._check_grammar()
        self._check_stops()
        self._check_logit_bias()

    def _check_grammar(self) -> None:
        if self.grammar is None:
            return
        if self.ignore_eos:
            raise RequestError("ignore_eos: cannot be used with a grammar, which ends with EOS", param="ignore_eos")
        if len(self.grammar.text) > MAX_GRAMMAR_CHARS:
            raise RequestError(f"grammar: must have at most {MAX_GRAMMAR_CHARS} characters", param="grammar")

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop: at most {MAX_STOP_STRINGS} strings (got {len(self.stop)})", param="stop")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_STRING_LENGTH:
                raise RequestError(
                    f"stop: each string must have 1 to {MAX_STOP_STRING_LENGTH} characters", param="stop"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(f"stop_token_ids: at most {MAX_STOP_TOKEN_IDS} ids", param="stop_token_ids")
        check_numbers("stop_token_ids", self.stop_token_ids, TOKEN_ID_RANGE)

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(f"logit_bias: at most {MAX_LOGIT_BIAS} tokens", param="logit_bias")
        check_numbers("logit_bias", self.logit_bias.keys(), TOKEN_ID_RANGE)
        check_numbers("logit_bias", self.logit_bias.values(), LOGIT_BIAS_RANGE)

    def for_choice(self, index: int) -> "SamplingParams":
        """Returns the parameters of choice `index` of `n`: its own seed, so that the choices differ."""
        if index == 0 or self.seed is None:
            return self
        return msgspec.structs.replace(self, seed=(self.seed + index + 2**63) % 2**64 - 2**63)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def check_number(name: str, value: Any, bounds: Range) -> None:
    """Raises RequestError, naming the field, for what is no number of this range."""
    low, high, integer, above = bounds
    is_number = isinstance(value, int) or (isinstance(value, float) and not integer and math.isfinite(value))
    if isinstance(value, bool) or not is_number:
        kind = "an integer" if integer else "a finite number"
        raise RequestError(f"{name}: must be {kind} (got {value!r:.40})", param=name)
    if not low <= value <= high or (above and value == low):
        least = f"{'>' if above else '>='} {low}"
        raise RequestError(f"{name}: must be {least} and <= {high} (got {str(value)[:40]})", param=name)


def check_numbers(name: str, values: Collection[Any], bounds: Range) -> None:
    """As `check_number` for each of them. Many that are in order take no time worth mentioning: each of a thousand
    prompts may come with a thousand."""
    kinds = set(map(type, values))
    plain = kinds == {int} or (kinds == {float} and not bounds.integer and all(map(math.isfinite, values)))
    if plain and not bounds.above and bounds.low <= min(values) and max(values) <= bounds.high:
        return
    for value in values:
        check_number(name, value, bounds)
