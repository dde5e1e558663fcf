"""Running a model once before anybody asks it to."""

from inferflux.engine.runner.runner import Runner
from inferflux.engine.step import Row, RowStart, StepPlan
from inferflux.sampling_params import SamplingParams


def warm_up(runner: Runner, num_tokens: int, *, is_first: bool = True) -> None:
    """Runs a prefill of num_tokens tokens and a decode, so that the first request does not pay for first calls.

    is_first: this is rank 0; all ranks do this at once.

    Writes page 0, which must be nobody's yet and hold num_tokens tokens; slot 0 is free afterwards.
    """
    token_ids = [0] * num_tokens
    start = RowStart(
        slot=0,
        request_id=0,
        sampling=SamplingParams(),
        seed=0,
        history=token_ids,
        num_prompt_tokens=num_tokens,
        eos_token_ids=[],
    )
    for plan in (
        StepPlan(0, [start], [Row(0, 0, token_ids, [0], sample=True)]),
        StepPlan(0, [], [Row(0, num_tokens - 1, token_ids[:1], [], sample=True)]),
    ):
        if is_first:
            runner.execute(plan)
        else:
            runner.follow(plan)
