"""Sends the large parts that a request's sequences have in common, grammar and logit biases, to the engine once.

A Share goes ahead of the first sequence that uses it, and an Unshare follows the last. Knows frames and objects; no
socket.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import structs

from inferflux.engine.interface import Submit
from inferflux.engine.service.protocol import Share, Unshare

# The ids of a grammar and of biases; the Share keeps both alive, so no other object can get these ids.
_Key = tuple[int, int]


@dataclass(slots=True)
class _Shared:
    key: _Key
    share: Share
    num_users: int = 0


class ShareSender:
    """The client's side. send: queues a frame; frames arrive in order."""

    def __init__(self, send: Callable[[Share | Unshare], None]) -> None:
        self._send = send
        self._ids = itertools.count()
        self._by_key: dict[_Key, _Shared] = {}
        self._by_id: dict[int, _Shared] = {}

    def strip(self, submit: Submit) -> Submit:
        """Returns the frame without grammar and biases; sends them ahead of it, unless the engine has them already.
        Pass it to `release` when the sequence is over."""
        sampling = submit.sampling
        if sampling.grammar is None and sampling.logit_bias is None:
            return submit
        key = id(sampling.grammar), id(sampling.logit_bias)
        shared = self._by_key.get(key)
        if shared is None:
            shared = _Shared(key, Share(next(self._ids), sampling.grammar, sampling.logit_bias))
            self._send(shared.share)
            self._by_key[key] = self._by_id[shared.share.share_id] = shared
        shared.num_users += 1
        plain = structs.replace(sampling, grammar=None, logit_bias=None)
        return structs.replace(submit, sampling=plain, share_id=shared.share.share_id)

    def release(self, submit: Submit) -> None:
        if submit.share_id is None:
            return
        shared = self._by_id[submit.share_id]
        shared.num_users -= 1
        if not shared.num_users:
            del self._by_key[shared.key], self._by_id[submit.share_id]
            self._send(Unshare(submit.share_id))

    def resend(self) -> None:
        """Sends a new engine everything that is in use."""
        for shared in self._by_id.values():
            self._send(shared.share)


class ShareReceiver:
    """The engine's side."""

    def __init__(self) -> None:
        self._shares: dict[int, Share] = {}

    def receive(self, frame: Share | Unshare) -> None:
        if isinstance(frame, Share):
            self._shares[frame.share_id] = frame
        else:  # an engine started meanwhile may not have received it
            self._shares.pop(frame.share_id, None)

    def complete(self, submit: Submit) -> Submit:
        """Returns the frame with the grammar and biases left out of it. Raises RequestError as SamplingParams does."""
        if submit.share_id is None:
            return submit
        share = self._shares[submit.share_id]
        sampling = structs.replace(submit.sampling, grammar=share.grammar, logit_bias=share.logit_bias)
        return structs.replace(submit, sampling=sampling, share_id=None)
