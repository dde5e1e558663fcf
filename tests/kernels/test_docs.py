"""The example of docs/kernels.md is right: it passes the check, and can be selected."""

import re
from pathlib import Path

import pytest
import torch

from inferflux.cli import main
from inferflux.config import KernelsConfig
from inferflux.kernels.backends import BUILT_IN, OPS
from inferflux.kernels.kernel_set import select

PAGE = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()


@pytest.fixture
def example(tmp_path: Path) -> str:
    (code,) = re.findall(r"```python\n(\"\"\"my_kernels.*?)```", PAGE, flags=re.DOTALL)
    path = tmp_path / "my_kernels.py"
    path.write_text(code)
    return str(path)


def test_the_example_passes_the_check(example: str) -> None:
    assert main(["kernels", "check", "--module", example, "--device", "cpu", "--dtype", "float32"]) == 0
    assert main(["kernels", "check", "--module", example, "--device", "cpu", "--op", "norm"]) == 0


def test_the_example_can_be_selected(example: str) -> None:
    kernels = select(torch.device("cpu"), torch.float32, KernelsConfig(norm=example, linear=example))
    assert {choice.op for choice in kernels.choices if choice.backend == example} == {"norm", "linear"}


def test_the_page_names_every_op_and_backend() -> None:
    assert [name for name in (*OPS, *BUILT_IN) if f"| `{name}` |" not in PAGE] == []
