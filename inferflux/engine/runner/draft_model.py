"""DraftModel: a small model that proposes what a large one verifies.

It goes through every step just before the large one does: the same rows at the same places of the same pages, in a pool
of its own. So a page that the large model's books hand out, new, shared or cached, holds its keys and values as well,
and there is nothing to keep in step. It draws with the large model's seeds and positions, and so the same noise: where
the two think alike they mostly draw alike.
"""

from collections.abc import Iterable

import msgspec

from inferflux.engine.runner.runner import Runner
from inferflux.engine.step import Row, RowStart, StepPlan
from inferflux.sampling_params import SamplingParams


class DraftModel:
    """runner: of the small model, with pages as the large one's. num_known: tokens that both know; others, for which
    one of them has padding, read as 0."""

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
        # The last draft is computed for its keys and values alone: if it is right, the next step needs them.
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
        """Computes rows; returns the tokens they sampled, by slot. A row that fails, or has no numbers for logits,
        samples 0: guesses are all that is wanted."""
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
    """What a small model needs of a request's settings: how it draws. Whoever is penalised or has a grammar gets no
    drafts; adapters are for the model that verifies them."""
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
