"""Engine: token ids in, token ids out. One step has three parts: schedule, run, update.

Single-threaded: its owner calls it from one thread. Knows no text, no socket and no HTTP.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from inferflux.config import FairnessConfig, ModelConfig, RuntimeConfig, SchedulerConfig
from inferflux.config.tree import AdapterConfig, DistributedConfig
from inferflux.engine.executor import Executor, Launched
from inferflux.engine.interface import ModelInfo, Output, Submit
from inferflux.engine.kv.lower_tiers import tier_settings
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.pending_grammars import PendingGrammars
from inferflux.engine.request import Request
from inferflux.engine.request_checks import check_pooling, check_prompt
from inferflux.engine.scheduler.request_outputs import refused_output
from inferflux.engine.scheduler.scheduler import Scheduler
from inferflux.engine.scheduler.speculator import Speculator, placeholders, prompt_lookup
from inferflux.engine.stats import EngineStats
from inferflux.engine.step import StepPlan
from inferflux.errors import RequestError, did_you_mean
from inferflux.sampling_params import SamplingParams

# How long an engine may take to write its pages at the end: its host is killed after 5 s.
FLUSH_S = 4.0
FLUSH_BATCH_PAGES = 32
# The experts' load is on the device: fetching it rarely costs the steps nothing.
EXPERT_LOAD_INTERVAL_S = 1.0


class Engine:
    """A loaded model with its adapters, its KV pages, its queue and its loop body. With several ranks only rank 0 has
    one.

    overlap: plan and launch a step before the results of the previous one are in, so that the device does not wait for
    Python; None: if the device computes in parallel with the host. The tokens are the same either way.
    Raises ModelLoadError when the model cannot be loaded as configured, ConfigError when a setting does not fit it.
    """

    def __init__(
        self,
        model: ModelConfig,
        runtime: RuntimeConfig,
        distributed: DistributedConfig | None = None,
        adapters: Sequence[AdapterConfig] = (),
        *,
        overlap: bool | None = None,
    ) -> None:
        self.executor = Executor(model, runtime, distributed, adapters)
        names = zip(adapters, self.executor.adapter_names, strict=True)
        self._adapters = {config.id: (number, name) for number, (config, name) in enumerate(names, 1)}
        self.info: ModelInfo = self.executor.info
        self.kv = KVManager(
            num_pages=self.info.device_pages,
            page_tokens=self.info.page_tokens,
            fingerprint=self.executor.fingerprint,
            # An encoder's pages hold nothing that could be cached.
            prefix_cache=runtime.prefix_cache.enabled and self.info.generates,
            tiers=tier_settings(runtime, self.info),
        )
        self._keeps_pages = runtime.nvme_offload.path is not None and runtime.nvme_offload.persist
        self.speculator = self._make_speculator(runtime)
        self.scheduler = Scheduler(self._limits(runtime), runtime.fairness, self.kv, time.monotonic, self.speculator)
        self._eos_token_ids = frozenset(self.info.eos_token_ids)
        self._pending_grammars = PendingGrammars()
        self._random = random.Random()
        self._expert_tokens: list[int] = []
        self._next_load_time = 0.0
        self._max_in_flight = 2 if (self.executor.is_asynchronous if overlap is None else overlap) else 1
        self._in_flight: deque[tuple[StepPlan, Launched]] = deque()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight) or len(self._pending_grammars) > 0

    @property
    def has_background_work(self) -> bool:
        """True while steps are needed although no request waits: pages are being moved to a lower tier."""
        return self.kv.has_background_work

    def submit(self, submit: Submit) -> None:
        """Queues one sequence. Raises RequestError when this model cannot run it."""
        prompt, sampling = submit.prompt_token_ids, submit.sampling
        adapter, adapter_name = self._adapter(submit.adapter)
        if sampling.pooling is None and not self.info.generates:
            raise RequestError("model: this model only computes embeddings", param="model")
        check_pooling(sampling.pooling, self.info)
        check_prompt(prompt, self.info, param="prompt", ends=not sampling.generates)
        self._check_token_ids(sampling)
        window = self.info.max_model_len
        total = window if sampling.max_tokens is None else min(window, len(prompt) + sampling.max_tokens)
        if not sampling.generates:
            total = len(prompt) + 1  # the step that ends the prompt samples a token, which is dropped
        request = Request(
            id=submit.request_id,
            prompt_token_ids=prompt,
            sampling=sampling,
            seed=self._random.getrandbits(63) if sampling.seed is None else sampling.seed,
            max_total_tokens=total,
            eos_token_ids=self._eos_token_ids,
            arrival_time=time.monotonic(),
            priority=submit.priority,
            tenant=submit.tenant,
            salt=submit.salt,
            adapter=adapter,
            adapter_name=adapter_name,
        )
        if sampling.grammar is None:
            self.scheduler.add(request)
        else:
            self._pending_grammars.add(request, self.executor.prepare(request.id, sampling.grammar))

    def abort(self, request_ids: list[int]) -> None:
        """Stops these requests and frees their pages; unknown ids are ignored. No output follows."""
        self._pending_grammars.remove(request_ids)
        self.scheduler.abort(request_ids)
        self.executor.forget(request_ids)

    def set_fairness(self, policy: str, fairness: FairnessConfig) -> None:
        """Schedules by another policy from now on. Raises ConfigError when there is none of that name."""
        self.scheduler.configure(policy, fairness)

    def step(self) -> list[Output]:
        """Advances every scheduled request by one step and returns the outputs of the oldest step that was in flight
        (empty when there is none, or when it has only just started)."""
        outputs = self._admit_prepared() if self._pending_grammars else []
        plan = self.scheduler.schedule()
        if plan is not None:
            plan = self.executor.with_drafts(plan)
            self._in_flight.append((plan, self.executor.launch(plan)))
        # Plan ahead only of steps with rows: else steps that only move pages would follow one another without end.
        num_kept = self._max_in_flight - 1 if plan is not None and plan.rows else 0
        while len(self._in_flight) > num_kept:
            plan, launched = self._in_flight.popleft()
            outputs += self.scheduler.update(plan, launched.result())
        ended = [output.request_id for output in outputs if output.finish_reason is not None]
        if ended:
            self.executor.forget(ended)
        return outputs

    def drop_cache(self) -> None:
        """Forgets every cached page in every tier; running requests keep theirs."""
        self.kv.reset_prefix_cache()

    def on_progress(self, tell: Callable[[], object]) -> None:
        """Has `tell` called repeatedly during a long step, such as an encoder's."""
        self.executor.on_progress(tell)

    def heartbeat(self) -> None:
        """Checks, between steps, that the other ranks of this model are alive. Raises EngineDeadError if not."""
        self.executor.heartbeat()

    def close(self, flush_s: float = FLUSH_S) -> None:
        """Ends the engine and releases the other ranks.

        Where pages are kept over a restart, spends up to flush_s seconds on writing them out.
        """
        if self._keeps_pages:
            self._flush(time.monotonic() + flush_s)
        self.executor.close()

    def close_file(self) -> None:
        """Closes the page file; also for an engine that has failed in a thread, where it would stay open. No call may
        follow."""
        self.executor.close_file()

    def stats(self) -> EngineStats:
        stats, now = self.scheduler.stats(), time.monotonic()
        if now >= self._next_load_time:
            self._expert_tokens, self._next_load_time = self.executor.expert_tokens(), now + EXPERT_LOAD_INTERVAL_S
        stats.expert_tokens = self._expert_tokens
        stats.waiting += len(self._pending_grammars)
        return stats

    def check_integrity(self) -> None:
        """Asserts that every page is accounted for; for tests and idle moments."""
        self.scheduler.check_integrity()

    def _make_speculator(self, runtime: RuntimeConfig) -> Speculator | None:
        settings = runtime.speculative_decoding
        if not settings.enabled or not self.info.generates:
            return None
        propose = placeholders if settings.uses_model else prompt_lookup
        return Speculator(self.kv, runtime.scheduler, settings.chunk_size, propose)

    def _limits(self, runtime: RuntimeConfig) -> SchedulerConfig:
        """Returns the scheduler's limits. An encoder computes a text with its last chunk: with the largest chunks texts
        end one after another, so that a step computes little more than one text."""
        limits = runtime.scheduler
        if self.info.generates:
            return limits
        return msgspec.structs.replace(limits, chunked_prefill_tokens=limits.max_batch_tokens)

    def _flush(self, deadline: float) -> None:
        """Writes cached pages to the file, most recently used first, until the deadline."""
        self.scheduler.abort_all()
        for plan, launched in self._in_flight:
            self.scheduler.update(plan, launched.result())
        self._in_flight.clear()
        while time.monotonic() < deadline and (self.kv.flush(FLUSH_BATCH_PAGES) or self.kv.is_writing):
            next_plan = self.scheduler.schedule()
            if next_plan is None:
                return
            num_moves = self.kv.num_moves_in_progress  # the plan's own, and earlier ones that have not ended
            self.scheduler.update(next_plan, self.executor.execute(msgspec.structs.replace(next_plan, wait=True)))
            if not num_moves:
                return  # the file is full

    def _admit_prepared(self) -> list[Output]:
        """Queues the requests whose grammar is ready; returns the refusals of the others."""
        refused = []
        for request, error in self._pending_grammars.take_ready(idle=not self.scheduler.has_work):
            try:
                if isinstance(error, RequestError):
                    raise error
                if error is not None:
                    raise RequestError(f"cannot be prepared ({type(error).__name__})")
                self.scheduler.add(request)
            except RequestError as refusal:
                param = refusal.param or "grammar"
                message = str(refusal) if refusal.param else f"grammar: {refusal}"
                refused.append(refused_output(request.id, RequestError(message, param=param, code=refusal.code)))
                self.executor.forget([request.id])
        return refused

    def _adapter(self, adapter_id: str | None) -> tuple[int, bytes]:
        """Returns an adapter's number and its part of page names. Raises RequestError for an unknown id."""
        if adapter_id is None:
            return 0, b""
        if adapter_id not in self._adapters:
            hint = did_you_mean(adapter_id, self._adapters)
            raise RequestError(f'adapter: this model has no adapter named "{adapter_id:.200}"{hint}', param="adapter")
        return self._adapters[adapter_id]

    def _check_token_ids(self, sampling: SamplingParams) -> None:
        for name, ids in (("logit_bias", sampling.logit_bias or ()), ("stop_token_ids", sampling.stop_token_ids)):
            if ids and max(ids) >= self.info.vocab_size:
                raise RequestError(f"{name}: token ids must be < {self.info.vocab_size}", param=name)
