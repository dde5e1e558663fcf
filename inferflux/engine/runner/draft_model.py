"""DraftModel: a small model that proposes draft tokens, which a large one verifies.

It runs every step just before the large one does: the same rows at the same places of the same pages, in a pool of its
own. So every page of the large model, new, shared or cached, holds the small model's keys and values as well, and
nothing needs to be kept in sync. It samples with the large model's seeds and positions, and so with the same noise:
where the distributions are similar, the samples mostly agree.
"""

from collections.abc import Iterable

import msgspec

from inferflux.engine.runner.runner import Runner
from inferflux.engine.step import Row, RowStart, StepPlan
from inferflux.sampling_params import SamplingParams


class DraftModel:
    """runner: of the small model, with the large one's page numbers. num_known: size of the common vocabulary; other
    ids (padding in one of the models) read as 0."""

    def __init__(self, runner: Runner, num_known: int) -> None:
        self._runner = runner
        self._num_known = num_known

    def fill(self, plan: StepPlan) -> StepPlan:
        """Returns the plan with the tokens of its draft rows. What they hold in a plan of rows alike is replaced."""
        if not plan.rows:
            return plan
        drafts: dict[int, list[Row]] = {}
        for row in plan.rows:
            if row.is_draft:
                drafts.setdefault(row.slot, []).append(row)
        tokens = self._run([*map(_start, plan.starts)], [self._row(row) for row in plan.rows if not row.is_draft])
        filled: dict[tuple[int, int], list[int]] = {}
        # The last draft is computed only for its keys and values: if it is right, the next step needs them.
        for number in range(max(map(len, drafts.values()), default=0)):
            rows = []
            for slot, of_slot in drafts.items():
                if number < len(of_slot):
                    row = of_slot[number]
                    filled[slot, row.start] = [tokens[slot]]
                    rows.append(msgspec.structs.replace(row, token_ids=[tokens[slot]]))
            tokens = self._run([], rows)
        return msgspec.structs.replace(plan, rows=[_filled(row, filled) for row in plan.rows])

    def close(self) -> None:
        self._runner.close()

    def _run(self, starts: list[RowStart], rows: list[Row]) -> dict[int, int]:
        """Computes rows; returns the tokens they sampled, by slot. A row that fails samples 0, as a guess."""
        output = self._runner.execute(StepPlan(0, starts, rows))
        drawn = self._known([result.token_id or 0 for result in output.rows])
        return {row.slot: token_id for row, token_id in zip(rows, drawn, strict=True) if row.sample}

    def _row(self, row: Row) -> Row:
        return msgspec.structs.replace(
            row, token_ids=self._known(row.token_ids), score=False, next_token_id=None, pool=False
        )

    def _known(self, token_ids: Iterable[int]) -> list[int]:
        return [token_id if token_id < self._num_known else 0 for token_id in token_ids]


def _start(start: RowStart) -> RowStart:
    """Keeps the sampling settings that a draft needs. Requests with penalties or grammars get no drafts; adapters are
    the large model's."""
    given = start.sampling
    sampling = SamplingParams(
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        min_p=given.min_p,
        logit_bias=given.logit_bias,
    )
    return msgspec.structs.replace(start, sampling=sampling, history=[], adapter=0)


def _filled(row: Row, tokens: dict[tuple[int, int], list[int]]) -> Row:
    return msgspec.structs.replace(row, token_ids=tokens[row.slot, row.start]) if row.is_draft else row
