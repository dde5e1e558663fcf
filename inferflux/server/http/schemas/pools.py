"""GET /v1/admin/pools: one picture of readiness, queues, batches and KV pages."""

import msgspec


class ServerQueue(msgspec.Struct, frozen=True):
    """The house and its door: requests answered now and those that wait for a place, with what bounds them."""

    running: int
    max_concurrent: int
    waiting: int
    max_queue: int
    waiting_tokens: int
    max_queue_tokens: int


class Queue(msgspec.Struct, frozen=True):
    """server: requests for this model before the door. engine: sequences that wait for a place in the batch."""

    server: int
    engine: int


class Batch(msgspec.Struct, frozen=True):
    """running: sequences in the batch. tokens: of the last step."""

    running: int
    max_running: int
    tokens: int
    max_tokens: int


class Tier(msgspec.Struct, frozen=True):
    """pages_in_use: held by sequences; of a lower tier, filled. pages_cached: kept for prompts that begin alike, and
    given up when needed. state: on, full or off."""

    pages_total: int
    pages_in_use: int
    pages_cached: int
    state: str = "on"


class Pool(msgspec.Struct, frozen=True):
    """One model's engine. preemptions, restarts, retries: counted since the server started."""

    model: str
    state: str
    default: bool
    queue: Queue
    batch: Batch
    kv: dict[str, Tier]
    preemptions: int
    restarts: int
    retries: int


class Pools(msgspec.Struct, frozen=True):
    """reason: why it is not ready, as /readyz says it. policy: the order in which requests are served."""

    ready: bool
    reason: str | None
    policy: str
    server: ServerQueue
    pools: list[Pool]
