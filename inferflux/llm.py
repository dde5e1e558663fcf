"""LLM: the engine in the calling process, for Python programs: prompts in, texts out, no server.

Knows the engine and its text rooms; knows no HTTP and starts no process.
"""

import itertools
import os
import sys
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import Progress

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.config.constructed import checked
from inferflux.config.tree import STUB
from inferflux.engine.demo import demo_model_path
from inferflux.engine.engine import Engine
from inferflux.engine.interface import Output, Submit
from inferflux.engine.service.failures import request_failure
from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text import TextBundle, TextDelta, TextStream, load_text
from inferflux.errors import ConfigError, EngineError, ModelLoadError, RequestError
from inferflux.llm_inputs import (
    Prompt,
    adapter_configs,
    adapters_for,
    as_batch,
    check_generates,
    params_for,
    token_ids_of,
)
from inferflux.llm_signals import HeldSignals
from inferflux.sampling_params import Pooling, SamplingParams


@dataclass(slots=True)
class Completion:
    """One generated sequence.

    finish_reason: `stop`, `length` or None while it runs. logprobs: one entry per token, when asked for.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(slots=True)
class Generation:
    """The results of one prompt.

    outputs: `SamplingParams.n` completions; `text`, `token_ids` and `finish_reason` are those of the first.
    prompt_logprobs: one entry per prompt token after the first, when asked for. num_cached_tokens: prompt tokens that
    came from the prefix cache and were not computed.
    """

    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason


@dataclass(slots=True)
class _Running:
    generation: Generation
    completion: Completion
    stream: TextStream


class LLM:
    """A model loaded into this process.

    model: a Hugging Face folder, or "stub" for the demo model that ships with the package.
    dtype: auto, float32, bfloat16 or float16. quantization: int8, int4, fp8 or None.
    max_model_len: the window in tokens; None: the model's own.
    chat_template: a Jinja2 template, or a file with one, instead of the model's own.
    runtime: scheduler, KV and kernel settings, the same tree as the server's `runtime` section.
    adapters: folders of LoRA adapters, as PEFT writes them, by the names to be used for them in `generate`.
    Raises ModelLoadError when the model cannot be loaded, ConfigError when a setting does not fit it.
    Threads may share it; their prompts then share steps. A fork of the process may not: its threads and its KV file are
    the parent's. `with LLM(...) as llm` closes it at the end.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        max_model_len: int | None = None,
        chat_template: str | None = None,
        runtime: RuntimeConfig | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> None:
        path = demo_model_path() if str(model) == STUB else Path(model)
        if not path.is_dir():
            raise ModelLoadError(f'{path}: is not a folder (a model\'s, or "{STUB}" for the demo model)')
        runtime = RuntimeConfig() if runtime is None else runtime
        if not isinstance(runtime, RuntimeConfig):
            raise ConfigError(f"runtime: must be a RuntimeConfig (got {type(runtime).__name__})")
        # The id is for messages only: a folder's name may have letters that an id may not.
        keys = {"dtype": dtype, "quantization": quantization, "max_model_len": max_model_len}
        config = checked(ModelConfig, {"id": "model", "path": str(path), **keys})
        self._text: TextBundle = load_text(path, chat_template)
        additions = adapter_configs(adapters)
        self.engine = Engine(config, checked(RuntimeConfig, runtime, ("runtime",)), adapters=additions)
        self._ids = itertools.count()
        self._unread: dict[int, list[Output]] = {}
        # Guards the engine and `_unread`. A dropped stream may be garbage-collected while this very thread is using the
        # engine: its requests are then noted in `_dropped`, and stopped when the engine is free.
        self._turn = threading.RLock()
        self._in_engine = False
        # Why it cannot be used any more.
        self._ended: str | None = None
        self._dropped: list[int] = []
        self._process_id = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def decoder(self) -> Any:
        """The model's layers and weights (`engine.models.decoder.Decoder`), to read or change."""
        return self.engine.executor.decoder

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer: `encode(text, add_special_tokens=...)`, `decode(ids, ...)`."""
        return self._text.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        progress: bool | None = None,
    ) -> list[Generation]:
        """Generates for every prompt and returns the results in their order.

        prompts: one prompt or many; each a string, a list of token ids, or a list of chat messages
        (`{"role", "content"}`, rendered with the model's chat template).
        params: for all prompts, or one each. adapter: name of an adapter, likewise; None: the model without one.
        progress: show a bar; None: when standard error is a terminal.
        Raises RequestError when a prompt cannot be run (then nothing is generated), EngineError when one fails while it
        runs or the LLM is closed.
        """
        batch = as_batch(prompts)
        each = params_for(len(batch), params)
        for one in each:
            check_generates(one)
        adapters = adapters_for(len(batch), adapter)
        tokens = [token_ids_of(prompt, self._text) for prompt in batch]
        running: dict[int, _Running] = {}
        with HeldSignals() as signals:
            try:
                generations = [
                    self._start(running, ids, one, name) for ids, one, name in zip(tokens, each, adapters, strict=True)
                ]
                for request_id, output in self._run(running, progress, signals):
                    if _apply(running[request_id], output).finish_reason is not None:
                        self._stop([request_id])
                        del running[request_id]
            finally:
                self._stop(list(running))
        return generations

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[list[float]]:
        """Returns a vector of length 1 for every prompt, in their order; prompts are as `generate` takes them.

        pooling: how the model's states become one vector; None: as the model was trained. adapter: see `generate`.
        Raises as `generate` does.
        """
        params = SamplingParams(max_tokens=1, pooling=self.engine.info.pooling if pooling is None else pooling)
        running: dict[int, _Running] = {}
        batch = as_batch(prompts)
        with HeldSignals() as signals:
            try:
                for prompt, name in zip(batch, adapters_for(len(batch), adapter), strict=True):
                    self._start(running, token_ids_of(prompt, self._text), params, name)
                vectors: dict[int, list[float]] = {request_id: [] for request_id in running}
                for request_id, output in self._run(running, False, signals):
                    _apply(running.pop(request_id), output)
                    assert output.vector is not None, "a pooled request ends with its vector"
                    vectors[request_id] = np.frombuffer(output.vector, "<f4").tolist()
            finally:
                self._stop(list(running))
        return list(vectors.values())

    def close(self) -> None:
        """Ends the engine; writes KV pages out where they are kept over a restart. Running prompts and later calls
        raise EngineError; closing again does nothing, and neither does closing in a fork."""
        if not self._is_ours:
            return
        with self._turn, HeldSignals():
            if self._ended is None:
                with self._alone():
                    self._ended = "has been closed"
                    self.engine.close()

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Iterator[TextDelta]:
        """Generates for one prompt and yields text as it comes; leaving the loop early stops the generation.

        Raises RequestError when the prompt cannot be run or params.n is not 1.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise RequestError("n: stream() yields one sequence (got n > 1)", param="n")
        check_generates(params)
        running: dict[int, _Running] = {}
        try:
            with HeldSignals():
                self._start(running, token_ids_of(prompt, self._text), params, adapter)
            for request_id, output in self._run(running, progress=False):
                delta = _apply(running[request_id], output)
                if delta.text or delta.token_ids or delta.finish_reason:
                    yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._stop(list(running))

    def _start(
        self, running: dict[int, _Running], prompt: list[int], params: SamplingParams, adapter: str | None
    ) -> Generation:
        generation = Generation(prompt, [])
        for choice in range(params.n):
            completion = Completion()
            generation.outputs.append(completion)
            request_id = next(self._ids)
            text = TextStream(self._text.tokenizer, params, prompt)
            with self._alone():
                self.engine.submit(Submit(request_id, prompt, params.for_choice(choice), adapter=adapter))
                running[request_id] = _Running(generation, completion, text)
        return generation

    def _run(
        self, running: dict[int, _Running], progress: bool | None, signals: HeldSignals | None = None
    ) -> Iterator[tuple[int, Output]]:
        """Steps the engine until nothing of `running` is left, yielding each request's outputs. signals: are let
        through between steps; None: they are held during a step only.

        Several of these may take turns on one engine (interleaved streams): what is others' waits in `_unread`.
        """
        num_left = len(running)
        with Progress(console=Console(stderr=True), disable=_hide_bar(progress), transient=True) as bar:
            task = bar.add_task("generating", total=num_left)
            while running:
                if signals is None:
                    with HeldSignals():
                        outputs = self._next_outputs(running)
                else:
                    outputs = self._next_outputs(running)
                    signals.let_through()
                for output in outputs:
                    if output.request_id in running:
                        yield output.request_id, output
                if len(running) < num_left:
                    bar.advance(task, num_left - len(running))
                    num_left = len(running)

    def _next_outputs(self, request_ids: Container[int]) -> list[Output]:
        """Returns the unread outputs of these requests; if there are none, runs a step and returns those it had."""
        with self._alone():
            # Iterates over what came, not over what was asked for: of thousands of requests few have outputs.
            ready = [request_id for request_id in self._unread if request_id in request_ids]
            own = [output for request_id in ready for output in self._unread.pop(request_id)]
            if not own:
                assert self.engine.has_work, "requests are running, yet the engine has nothing to do"
                for output in self.engine.step():
                    if output.request_id in request_ids:
                        own.append(output)
                    else:
                        self._unread.setdefault(output.request_id, []).append(output)
            return own

    @property
    def _is_ours(self) -> bool:
        """False in a fork, where `_turn` may be held by a thread that is not there."""
        return self._process_id == os.getpid()

    def _stop(self, request_ids: list[int]) -> None:
        if not self._is_ours:
            return
        with self._turn, HeldSignals():
            self._dropped += request_ids
            if not self._in_engine:
                self._sweep()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Gives this thread the engine to itself; requests dropped meanwhile are stopped at the end. After an exception
        other than a refusal the engine's books may be half written: this LLM ends."""
        if not self._is_ours:
            raise EngineError("this LLM is of the process that was forked: load another one here")
        with self._turn:
            if self._ended is not None:
                raise EngineError(f"this LLM {self._ended}")
            self._in_engine = True
            try:
                yield
            except RequestError:
                raise
            except BaseException as error:
                self._ended = self._ended or f"was ended by {type(error).__name__} in its engine: load another one"
                self.engine.close_file()
                raise
            finally:
                self._sweep()

    def _sweep(self) -> None:
        """Stops the requests in `_dropped`, and releases the engine."""
        self._in_engine = False
        while self._dropped:
            self._in_engine = True
            request_ids = self._dropped.copy()
            del self._dropped[: len(request_ids)]
            if self._ended is None:
                self.engine.abort(request_ids)
            for request_id in request_ids:
                self._unread.pop(request_id, None)
            self._in_engine = False


def _apply(run: _Running, output: Output) -> TextDelta:
    if output.finish_reason == "error":
        raise request_failure(output)
    stream, completion = run.stream, run.completion
    delta = stream.feed(output)
    if delta.finish_reason is not None:
        completion.text, completion.token_ids, completion.logprobs = stream.text, stream.token_ids, stream.logprobs
        completion.finish_reason = delta.finish_reason
    if output.prompt_logprobs is not None:
        run.generation.prompt_logprobs = output.prompt_logprobs
    if output.num_cached_tokens:
        run.generation.num_cached_tokens = max(run.generation.num_cached_tokens, output.num_cached_tokens)
    return delta


def _hide_bar(progress: bool | None) -> bool:
    return not (sys.stderr.isatty() if progress is None else progress)
