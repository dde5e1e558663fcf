"""Options that all of `inferflux kernels` take: the device, the float type, the shape of the answer."""

import argparse
from typing import Final

import torch

from inferflux.errors import ConfigError

DTYPES: Final = ("float32", "bfloat16", "float16", "float64")


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--json", action="store_true", help="print JSON")


def device_of(args: argparse.Namespace) -> torch.device:
    """Returns the device asked for. Raises ConfigError when it is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: there is no CUDA device here; accepted: cpu")
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
