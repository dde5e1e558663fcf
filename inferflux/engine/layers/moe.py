"""MoeMlp: a layer's MLP as a mixture of experts, of which each token uses a few (Shazeer et al. 2017, 1701.06538).

Expert parallelism: each rank has whole experts. Every rank has every token's hidden state, so tokens are not sent to
their experts; only the experts' outputs have to be combined. With few tokens, or with as many experts per token as
ranks, that is an all-reduce; else an all-to-all sends each rank's outputs for a token to the one rank that adds them
up, which moves k / (ranks - 1) of what the first half of an all-reduce would.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from inferflux.dist.context import ParallelContext
from inferflux.engine.layers.linear import Linear
from inferflux.engine.layers.lora import StepAdapters
from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.ops import ActivationKind, MoeOp, QuantizedMoeOp

Tensor = torch.Tensor

# With fewer tokens the number of messages matters more than their bytes. Not yet measured on GPUs.
ALL_TO_ALL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class MoeShape:
    """num_experts: on all ranks together. normalise: the chosen experts' weights are made to add up to 1."""

    num_experts: int
    experts_per_token: int
    normalise: bool
    kind: ActivationKind


class SharedExpert:
    """The expert that every token uses, weighted by a gate. Returns this rank's part of a sum."""

    def __init__(self, kernels: KernelSet, kind: ActivationKind, gate_up: Linear, down: Linear, gate: Tensor) -> None:
        self._activation = kernels.activation
        self._kind = kind
        self._gate_up = gate_up
        self._down = down
        self._gate = gate

    def __call__(self, hidden: Tensor) -> Tensor:
        part = self._down(self._activation(self._gate_up(hidden), self._kind))
        return part.mul_(functional.linear(hidden, self._gate).sigmoid_())


class MoeMlp:
    """op: computes this rank's experts, which it has packed. router [E, hidden]. load int64 [E]: tokens of each expert,
    counted up by every call; all layers share it."""

    def __init__(
        self,
        op: MoeOp | QuantizedMoeOp,
        experts: Any,
        context: ParallelContext,
        shape: MoeShape,
        *,
        router: Tensor,
        shared: SharedExpert | None,
        load: Tensor,
    ) -> None:
        self._run = op.run
        self._context = context
        self._shape = shape
        self._router = router
        self._experts = experts
        self._shared = shared
        self._load = load

    def __call__(self, hidden: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        """hidden [T, hidden] -> [T, hidden]. adapters: ignored, since adapters do not change experts."""
        expert_ids, weights = self._route(hidden)
        flat = expert_ids.flatten()
        self._load.scatter_add_(0, flat, torch.ones_like(flat))
        if self._context.size == 1:
            return self._with_shared(hidden, self._run_experts(hidden, expert_ids, weights))
        share = self._shape.num_experts // self._context.size
        owners = expert_ids // share
        mine = owners == self._context.rank
        here = torch.where(mine, expert_ids - self._context.rank * share, share)
        part = self._run_experts(hidden, here, weights)
        if self._uses_all_to_all(hidden):
            return self._combine(part, owners)
        return self._context.all_reduce(self._with_shared(hidden, part))

    def _route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns expert ids int64 and weights float32, [T, k] each.

        Every rank uses the plain product: one chosen by measurement might round differently on another rank, and all
        must choose the same experts.
        """
        probs = functional.linear(hidden, self._router).softmax(dim=-1, dtype=torch.float32)
        weights, expert_ids = probs.topk(self._shape.experts_per_token, dim=-1)
        return expert_ids, weights / weights.sum(dim=-1, keepdim=True) if self._shape.normalise else weights

    def _run_experts(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        part: Tensor = self._run(self._experts, hidden, expert_ids, weights, self._shape.kind)
        return part

    def _with_shared(self, hidden: Tensor, part: Tensor) -> Tensor:
        return part if self._shared is None else part.add_(self._shared(hidden))

    def _uses_all_to_all(self, hidden: Tensor) -> bool:
        """Whether an all-to-all is faster. Its sizes must be known on the host, so a CUDA graph cannot capture it."""
        if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        few_owners = self._shape.experts_per_token < self._context.size - 1
        return few_owners and self._shared is None and hidden.shape[0] >= ALL_TO_ALL_TOKENS

    def _combine(self, part: Tensor, owners: Tensor) -> Tensor:
        """part [T, hidden]: the sum of this rank's experts. owners [T, k]: the rank of each chosen expert."""
        num_tokens, size = len(part), self._context.size
        share = -(-num_tokens // size)
        involved = torch.zeros((share * size, size), dtype=torch.bool, device=part.device)
        involved[:num_tokens].scatter_(1, owners, True)
        # [receiver, sender, token]: whether the sender has an expert of that one of the receiver's tokens
        involved = involved.view(size, share, size).transpose(1, 2)
        sent, received = involved[:, self._context.rank], involved[self._context.rank]
        num_sent, num_received = torch.stack((sent.sum(1), received.sum(1))).tolist()
        rows = self._context.all_to_all(part[sent.reshape(-1)[:num_tokens]], num_sent, num_received)
        tokens = received.nonzero()[:, 1]
        total = torch.zeros((share, part.shape[1]), dtype=torch.float32, device=part.device)
        total.index_add_(0, tokens, rows.float())
        return self._context.all_gather(total.to(part.dtype), dim=0)[:num_tokens]
