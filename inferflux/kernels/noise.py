"""Noise as a function: one uniform number per (seed, position), the same bits on every device and in every batch.

Philox 4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), on 32-bit
words held in int64. On a CPU, where each of its 100 small steps costs as much as its arithmetic, it is computed for a
block of positions at once, and kept for the next ones.
"""

import functools
from typing import Final

import torch

Tensor = torch.Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW_32 = 0xFFFFFFFF

# Positions computed at once on a CPU, and how many such blocks are kept, which serve half as many rows. A step of one
# row takes 4 us and of 32 rows 8, where they took 133 and 142; a block takes 148 (one core of a Zen 5 EPYC).
BLOCK_BITS: Final = 6
NUM_BLOCKS: Final = 1024


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """counter int64 [4, B], key int64 [2, B], 32-bit words. Returns four random words, int64 [4, B]."""
    device = counter.device
    multipliers = _pair(MULTIPLIERS, device)
    steps = torch.arange(ROUNDS, device=device).view(-1, 1, 1) * _pair(WEYL, device)
    even, odd = counter[0::2], counter[1::2]
    for round_key in ((key + steps) & LOW_32).unbind():
        # The product's 64 bits wrap into int64's; the arithmetic shift and the mask take out its upper word.
        products = (even * multipliers).flip(0)
        even, odd = ((products >> 32) & LOW_32) ^ odd ^ round_key, products & LOW_32
    return torch.stack((even, odd), dim=1).flatten(0, 1)


def _pair(values: tuple[int, int], device: torch.device) -> Tensor:
    """Returns int64 [2, 1], made on the device: copying it there would wait for all that is queued."""
    return torch.where(torch.arange(2, device=device) == 0, *values).unsqueeze(1)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """seeds, positions int64 [B], any value. Returns float64 [B] in [0, 1), multiples of 2**-53.

    The seed is the key and the position the counter's lower half, each as a 64-bit number.
    """
    if seeds.device.type != "cpu" or len(seeds) > NUM_BLOCKS // 2:
        return _compute(seeds, positions)
    last = (1 << BLOCK_BITS) - 1
    places = zip(seeds.tolist(), positions.tolist(), strict=True)
    numbers = [_block(seed, position >> BLOCK_BITS)[position & last] for seed, position in places]
    return torch.tensor(numbers, dtype=torch.float64)


@functools.lru_cache(NUM_BLOCKS)
def _block(seed: int, number: int) -> list[float]:
    """Returns the numbers of a block of positions."""
    positions = torch.arange(1 << BLOCK_BITS) + (number << BLOCK_BITS)
    return _compute(torch.full_like(positions, seed), positions).tolist()


def _compute(seeds: Tensor, positions: Tensor) -> Tensor:
    words = torch.stack((positions, positions >> 32, seeds, seeds >> 32)) & LOW_32
    position, key = words[:2], words[2:]
    random = philox(torch.cat((position, torch.zeros_like(position))), key)
    return (((random[1] & 0x1FFFFF) << 32) | random[0]).to(torch.float64) * 2.0**-53
