"""The ops in plain torch, written to be read: the definition of correct, in any float type up to float64.

Everything is computed in float32 or wider and rounded once, at the end.
"""

from typing import Final

# Reads and writes pages of 8 bits (see `quantized_kv`).
QUANTIZED_KV: Final = True
