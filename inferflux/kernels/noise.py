"""Noise as a function: one uniform number per (seed, position), the same bits on every device and in every batch.

Philox 4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), on 32-bit
words held in int64. Keeps no state.
"""

import torch

Tensor = torch.Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW_32 = 0xFFFFFFFF


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
    words = torch.stack((positions, positions >> 32, seeds, seeds >> 32)) & LOW_32
    position, key = words[:2], words[2:]
    random = philox(torch.cat((position, torch.zeros_like(position))), key)
    return (((random[1] & 0x1FFFFF) << 32) | random[0]).to(torch.float64) * 2.0**-53
