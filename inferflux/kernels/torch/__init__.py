"""The fast path on CPUs and the fallback everywhere else: stock PyTorch operators, as few and as large as possible."""

from typing import Final

# Reads and writes pages of 8 bits (see `quantized_kv`).
QUANTIZED_KV: Final = True
