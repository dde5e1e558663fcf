"""How torch's types are called in configurations, messages and reports."""

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Returns `bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
