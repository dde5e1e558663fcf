"""Random lives of whole engines on a runner that is a hash: everything a caller can do, in any order, by fixed seeds.

Requests come with tenants, priorities, adapters and grammars, are answered, aborted, preempted, refused and failed;
pages are few and go to lower tiers that are slow and err; drafts are mostly right; the policy changes, the cache is
dropped. After every step the books balance; whoever finishes has said what it would have said alone; and in the end
nothing is held, kept or under way. `test_scheduler_properties` and `test_scheduler_tiers` look further into scheduler
and books alone.
"""

import random
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import inferflux.engine.engine
from inferflux.config import FairnessConfig, ModelConfig, RuntimeConfig
from inferflux.config.tree import AdapterConfig
from inferflux.engine import pending_grammars
from inferflux.engine.engine import Engine
from inferflux.engine.interface import Output, Submit
from inferflux.engine.kv.manager import KVManager
from inferflux.engine.request import Request
from inferflux.engine.scheduler.policies import PATIENCE_S, POLICIES
from inferflux.errors import RequestError
from inferflux.sampling_params import Grammar, SamplingParams
from tests.support.fake_executor import EOS, WINDOW, FakeExecutor
from tests.support.fake_runner import expected_tokens
from tests.support.fake_tiers import FakeTiers
from tests.support.workbench import propose

ADAPTERS = ("a", "b")
STREAMS = tuple([(stream * 5 + i * i) % 11 for i in range(WINDOW)] for stream in range(2))
NUM_MOVES = 60


class Life:
    """One engine with what its callers know. ended: finish reasons by request; None: aborted."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rng = random.Random(seed)
        self.clock = 0.0
        self.said: dict[int, list[int]] = {}
        self.submits: dict[int, Submit] = {}
        self.ended: dict[int, str | None] = {}
        self.failed: set[int] = set()
        pick = self.rng.choice
        page_tokens, num_pages, file_slots = pick([1, 2, 4]), pick([8, 12, 40]), pick([0, 30])
        self.tiers = FakeTiers(self.rng, pick([0.2, 1.0]), pick([0.0, 0.3]), file_slots)
        self.executor = FakeExecutor(num_pages, page_tokens, self.tiers, len(ADAPTERS))
        scheduler = {
            "policy": pick(list(POLICIES)),
            "max_batch_size": pick([1, 3, 6]),
            "max_batch_tokens": pick([4, 16]),
            "chunked_prefill_tokens": pick([1, 5, 16]),
        }
        runtime = {
            "scheduler": scheduler,
            "fairness": self.fairness(),
            "paged_kv": {"cpu_pages": pick([0, 2, 12]), "eviction": pick(["lru", "clock"])},
            "nvme_offload": {"path": "file", "queue_depth": 4} if file_slots else {},
            "speculative_decoding": {"enabled": pick([True, False]), "method": "ngram", "chunk_size": 3},
        }
        engine = inferflux.engine.engine
        monkeypatch.setattr(engine, "Executor", lambda *_: self.executor)
        monkeypatch.setattr(engine, "KVManager", partial(KVManager, clock=self.now))
        monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=self.now))
        monkeypatch.setattr(pending_grammars, "PATIENCE_S", 0.0)
        adapters = [AdapterConfig(id=name, path=name, base="fake") for name in ADAPTERS]
        config = ModelConfig(id="fake", path="fake")
        overlap = pick([True, False])
        self.engine = Engine(config, msgspec.convert(runtime, RuntimeConfig), None, adapters, overlap=overlap)
        if self.engine.speculator is not None:
            self.engine.speculator.propose = propose
        if file_slots:
            self.tiers.turn_on()

    def now(self) -> float:
        self.clock += 1e-4
        return self.clock

    def fairness(self) -> Any:
        pick = self.rng.choice
        return {
            "enable_preemption": pick([True, False]),
            "high_priority_threshold": pick([1, 2]),
            "max_timeslice_tokens": pick([0, 3]),
        }

    def submit(self) -> None:
        rng, request_id = self.rng, len(self.submits)
        prompt = rng.choice(STREAMS)[: rng.choice([1, 9, 20, 28])] + [rng.randrange(4)] * rng.randrange(2)
        sampling = SamplingParams(
            max_tokens=rng.choice([0, 1, 9, 20, None]),
            seed=rng.randrange(3),
            presence_penalty=rng.choice([0.0, 0.0, 0.5]),
            prompt_logprobs=rng.choice([None, None, 0]),
            grammar=rng.choice([None, None, None, Grammar("regex", ".")]),
        )
        submit = Submit(
            request_id,
            prompt,
            sampling,
            priority=rng.randrange(3),
            tenant=rng.choice("xyz"),
            salt=rng.choice([b"", b"", b"", b"salt"]),
            adapter=rng.choice([None, None, None, *ADAPTERS]),
        )
        self.executor.runner.salts[request_id] = submit.salt
        self.submits[request_id], self.said[request_id] = submit, []
        try:
            self.engine.submit(submit)
        except RequestError:
            assert len(prompt) + 1 > self.engine.kv.capacity_tokens
            self.ended[request_id] = "error"

    def step(self, count: int) -> None:
        for _ in range(count):
            for output in self.engine.step():
                self.hear(output)
            self.check()

    def hear(self, output: Output) -> None:
        assert output.request_id not in self.ended, "news of a request that has ended"
        self.said[output.request_id] += output.token_ids
        if output.finish_reason is None:
            return
        self.ended[output.request_id] = output.finish_reason
        if output.finish_reason == "error":
            self.failed.discard(output.request_id)
        elif self.submits[output.request_id].sampling.max_tokens == 0:
            assert (output.token_ids, output.finish_reason) == ([], "length")
        else:
            request = self.request(self.submits[output.request_id])
            expected = expected_tokens(request, self.engine.kv.capacity_tokens)
            assert (self.said[output.request_id], output.finish_reason) == expected

    def request(self, submit: Submit) -> Request:
        """The request as it stands alone."""
        sampling, length = submit.sampling, len(submit.prompt_token_ids)
        total = WINDOW if sampling.max_tokens is None else min(WINDOW, length + sampling.max_tokens)
        return Request(
            id=0,
            prompt_token_ids=submit.prompt_token_ids,
            sampling=sampling,
            seed=sampling.seed or 0,
            max_total_tokens=total,
            eos_token_ids=frozenset([EOS]),
            adapter=0 if submit.adapter is None else ADAPTERS.index(submit.adapter) + 1,
        )

    def living(self) -> list[int]:
        return [request_id for request_id in self.submits if request_id not in self.ended]

    def abort(self) -> None:
        living = self.living()
        chosen = self.rng.sample(living, min(len(living), 2))
        self.engine.abort([*chosen, 10**6])
        self.ended |= dict.fromkeys(chosen)

    def fail(self) -> None:
        self.executor.runner.failing |= set(self.rng.sample(self.living(), 1 if self.living() else 0))

    def resolve(self) -> None:
        """Grammars are compiled, or found to be bad."""
        for prepared in self.executor.prepared.values():
            if prepared.done():
                continue
            error = self.rng.choice([None, None, RequestError("bad", param="grammar"), ValueError("worse")])
            if error is None:
                prepared.set_result(object())
            else:
                prepared.set_exception(error)

    def change(self) -> None:
        self.engine.set_fairness(self.rng.choice(list(POLICIES)), FairnessConfig(**self.fairness()))

    def wait(self) -> None:
        self.clock += self.rng.choice([0.5, PATIENCE_S])

    def disturb_file(self) -> None:
        if self.tiers.file_slots:
            self.rng.choice([self.tiers.turn_on, self.tiers.turn_off, partial(self.tiers.fill_up, 3)])()

    def check(self) -> None:
        self.engine.check_integrity()
        running = self.executor.kept - self.ended.keys()
        assert self.executor.kept == running, "something is kept of requests that have ended"

    def live(self) -> None:
        moves: list[Callable[[], None]] = [
            *[self.submit] * 8,
            *[partial(self.step, count) for count in (1, 4, 20)] * 4,
            *(self.abort, self.fail, self.resolve, self.change, self.wait, self.disturb_file, self.engine.drop_cache),
        ]
        for _ in range(NUM_MOVES):
            self.rng.choice(moves)()
            self.check()

    def end(self) -> None:
        """Everything that was begun comes to its end, and nothing is left of it."""
        self.tiers.pace = 1.0
        for _ in range(3000):
            if not (self.engine.has_work or self.engine.kv.num_moves_in_progress):
                break
            self.resolve()
            self.step(1)
        assert not self.engine.has_work
        assert not self.living()
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.loading, stats.device_pages_in_use) == (0, 0, 0, 0)
        assert not self.executor.kept
        self.engine.close()
        self.engine.check_integrity()


@pytest.mark.parametrize("seed", range(60))
def test_whatever_callers_do_the_books_balance_and_answers_are_right(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(seed, monkeypatch)
    life.live()
    life.end()
