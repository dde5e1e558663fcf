"""What sequences share crosses the border once: 1024 prompts with one list of choices were 190 MB of frames."""

import pytest

from inferflux.engine.interface import Submit
from inferflux.engine.service.protocol import Share, Unshare, encode
from inferflux.engine.service.sharing import Borrower, Lender
from inferflux.sampling_params import Grammar, SamplingParams

CHOICES = Grammar("lark", "start: " + " | ".join(f'"{number:0180}"' for number in range(1024)))
SHAPED = SamplingParams(grammar=CHOICES, logit_bias={5: 1.5}, seed=7)
PLAIN = SamplingParams(seed=7)


def submits(*samplings: SamplingParams) -> list[Submit]:
    return [Submit(index, [1, 2], sampling, 3, "tenant", b"salt") for index, sampling in enumerate(samplings)]


def test_a_request_of_many_sequences_says_it_once_and_the_engine_hears_all() -> None:
    sent: list[Share | Submit | Unshare] = []
    lender, borrower = Lender(sent.append), Borrower()
    frames = submits(*(SHAPED.for_choice(index) for index in range(1024)))
    lent = [lender.lend(frame) for frame in frames]
    assert [type(frame) for frame in sent] == [Share]
    assert sum(len(encode(frame)) for frame in lent) < 1024 * 512
    borrower.note(sent[0])
    assert [borrower.whole(frame) for frame in lent] == frames
    for frame in lent[1:]:
        lender.take_back(frame)
    assert len(sent) == 1
    lender.take_back(lent[0])
    assert [type(frame) for frame in sent] == [Share, Unshare]
    borrower.note(sent[1])
    with pytest.raises(KeyError):
        borrower.whole(lent[0])


def test_what_is_shared_is_told_apart_and_what_is_not_stays() -> None:
    sent: list[Share | Unshare] = []
    lender, borrower = Lender(sent.append), Borrower()
    others = SamplingParams(grammar=Grammar("regex", "a")), SamplingParams(logit_bias={5: 1.5}), PLAIN
    frames = submits(SHAPED, *others, SHAPED)
    lent = [lender.lend(frame) for frame in frames]
    assert [frame.share_id for frame in lent] == [0, 1, 2, None, 0]
    for frame in sent:
        borrower.note(frame)
    assert [borrower.whole(frame) for frame in lent] == frames


def test_a_new_engine_hears_what_is_still_lent() -> None:
    sent: list[Share | Unshare] = []
    lender, borrower = Lender(sent.append), Borrower()
    over, waits = map(lender.lend, submits(SamplingParams(grammar=Grammar("regex", "a")), SHAPED))
    lender.take_back(over)
    sent.clear()
    lender.repeat()
    borrower.note(Unshare(0))
    for frame in sent:
        borrower.note(frame)
    assert borrower.whole(waits).sampling == SHAPED
