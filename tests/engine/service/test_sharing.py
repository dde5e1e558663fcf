"""What sequences share crosses the border once: 1024 prompts with one list of choices were 190 MB of frames."""

import pytest

from inferflux.engine.interface import Submit
from inferflux.engine.service.protocol import Share, Unshare, encode
from inferflux.engine.service.sharing import ShareReceiver, ShareSender
from inferflux.sampling_params import Grammar, SamplingParams

CHOICES = Grammar("lark", "start: " + " | ".join(f'"{number:0180}"' for number in range(1024)))
SHAPED = SamplingParams(grammar=CHOICES, logit_bias={5: 1.5}, seed=7)
PLAIN = SamplingParams(seed=7)


def submits(*samplings: SamplingParams) -> list[Submit]:
    return [Submit(index, [1, 2], sampling, 3, "tenant", b"salt") for index, sampling in enumerate(samplings)]


def test_a_request_of_many_sequences_says_it_once_and_the_engine_hears_all() -> None:
    sent: list[Share | Submit | Unshare] = []
    sender, receiver = ShareSender(sent.append), ShareReceiver()
    frames = submits(*(SHAPED.for_choice(index) for index in range(1024)))
    stripped = [sender.strip(frame) for frame in frames]
    assert [type(frame) for frame in sent] == [Share]
    assert sum(len(encode(frame)) for frame in stripped) < 1024 * 512
    receiver.receive(sent[0])
    assert [receiver.complete(frame) for frame in stripped] == frames
    for frame in stripped[1:]:
        sender.release(frame)
    assert len(sent) == 1
    sender.release(stripped[0])
    assert [type(frame) for frame in sent] == [Share, Unshare]
    receiver.receive(sent[1])
    with pytest.raises(KeyError):
        receiver.complete(stripped[0])


def test_what_is_shared_is_told_apart_and_what_is_not_stays() -> None:
    sent: list[Share | Unshare] = []
    sender, receiver = ShareSender(sent.append), ShareReceiver()
    others = SamplingParams(grammar=Grammar("regex", "a")), SamplingParams(logit_bias={5: 1.5}), PLAIN
    frames = submits(SHAPED, *others, SHAPED)
    stripped = [sender.strip(frame) for frame in frames]
    assert [frame.share_id for frame in stripped] == [0, 1, 2, None, 0]
    for frame in sent:
        receiver.receive(frame)
    assert [receiver.complete(frame) for frame in stripped] == frames


def test_a_new_engine_hears_what_is_still_lent() -> None:
    sent: list[Share | Unshare] = []
    sender, receiver = ShareSender(sent.append), ShareReceiver()
    over, waits = map(sender.strip, submits(SamplingParams(grammar=Grammar("regex", "a")), SHAPED))
    sender.release(over)
    sent.clear()
    sender.resend()
    receiver.receive(Unshare(0))
    for frame in sent:
        receiver.receive(frame)
    assert receiver.complete(waits).sampling == SHAPED
