"""What many sequences of a request have in common and can be large, its grammar and its biases, crosses the border
once, before the first of them, and is forgotten after the last.

Knows frames and objects; no socket.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import structs

from inferflux.engine.interface import Submit
from inferflux.engine.service.protocol import Share, Unshare

# A grammar and biases, each as the object it is: whoever shares them holds them, so no other has its id.
_Place = tuple[int, int]


@dataclass(slots=True)
class _Loan:
    place: _Place
    share: Share
    num_users: int = 0


class Lender:
    """The side that submits. `send` puts a frame on its way, in order."""

    def __init__(self, send: Callable[[Share | Unshare], None]) -> None:
        self._send = send
        self._ids = itertools.count()
        self._by_place: dict[_Place, _Loan] = {}
        self._by_id: dict[int, _Loan] = {}

    def lend(self, submit: Submit) -> Submit:
        """Returns the frame without what it has in common with others, which goes ahead of it unless it is there
        already. Give it to `take_back` when the sequence is over."""
        sampling = submit.sampling
        if sampling.grammar is None and sampling.logit_bias is None:
            return submit
        place = id(sampling.grammar), id(sampling.logit_bias)
        loan = self._by_place.get(place)
        if loan is None:
            loan = _Loan(place, Share(next(self._ids), sampling.grammar, sampling.logit_bias))
            self._send(loan.share)
            self._by_place[place] = self._by_id[loan.share.share_id] = loan
        loan.num_users += 1
        plain = structs.replace(sampling, grammar=None, logit_bias=None)
        return structs.replace(submit, sampling=plain, share_id=loan.share.share_id)

    def take_back(self, submit: Submit) -> None:
        if submit.share_id is None:
            return
        loan = self._by_id[submit.share_id]
        loan.num_users -= 1
        if not loan.num_users:
            del self._by_place[loan.place], self._by_id[submit.share_id]
            self._send(Unshare(submit.share_id))

    def repeat(self) -> None:
        """Tells a new engine what is lent."""
        for loan in self._by_id.values():
            self._send(loan.share)


class Borrower:
    """The engine's side."""

    def __init__(self) -> None:
        self._shares: dict[int, Share] = {}

    def note(self, frame: Share | Unshare) -> None:
        if isinstance(frame, Share):
            self._shares[frame.share_id] = frame
        else:  # an engine started meanwhile may never have heard of it
            self._shares.pop(frame.share_id, None)

    def whole(self, submit: Submit) -> Submit:
        """Returns the frame with what was left out of it. Raises RequestError as SamplingParams does."""
        if submit.share_id is None:
            return submit
        share = self._shares[submit.share_id]
        sampling = structs.replace(submit.sampling, grammar=share.grammar, logit_bias=share.logit_bias)
        return structs.replace(submit, sampling=sampling, share_id=None)
