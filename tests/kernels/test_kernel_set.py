"""Selection: the best backend per op, overrides of every kind, and messages that say why not."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from inferflux.config import KernelsConfig
from inferflux.errors import ConfigError
from inferflux.kernels import backends, kernel_set, native
from inferflux.kernels.backends import OPS, find_backend
from inferflux.kernels.kernel_set import Choice, KernelSet
from inferflux.kernels.native.loading import Library

CPU = torch.device("cpu")

MY_KERNELS = """
from pathlib import Path

log = Path(__file__).with_suffix(".log")
log.write_text(log.read_text() + "loaded " if log.exists() else "loaded ")


def norm(x, weight, eps):
    return x * 0 + 42


def add_norm(x, residual, weight, eps):
    return x, residual


class linear:
    @staticmethod
    def pack(weight, bias):
        return weight

    @staticmethod
    def run(packed, x):
        return x @ packed.T
"""


@pytest.fixture
def my_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_kernels.py"
    path.write_text(MY_KERNELS)
    return path


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    """A better built-in backend that has two ops and refuses one of them."""
    module = ModuleType("inferflux.kernels.picky")
    module.norm = module.rope = lambda *_: None  # type: ignore[attr-defined]
    module.supports = (  # type: ignore[attr-defined]
        lambda op, device, dtype: "needs 32 bits" if op == "rope" and dtype != torch.float32 else None
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for holder in (backends, kernel_set):
        monkeypatch.setattr(holder, "BUILT_IN", ("picky", "torch", "reference"))


def select(dtype: torch.dtype = torch.float32, **overrides: str) -> KernelSet:
    return kernel_set.select(CPU, dtype, KernelsConfig(**overrides))


def choice_of(kernels: KernelSet, op: str) -> Choice:
    return next(choice for choice in kernels.choices if choice.op == op)


def test_torch_serves_everything_on_a_cpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: Library(reason="there is no C++ compiler to build it with"))
    kernels = kernel_set.select(CPU, torch.bfloat16)
    assert [choice.backend for choice in kernels.choices] == ["torch"] * len(OPS)
    assert ("native", "there is no C++ compiler to build it with") in choice_of(kernels, "norm").refused
    refused = dict(choice_of(kernels, "attention").refused)
    assert "CUDA" in refused["triton"] or "not installed" in refused["triton"]


@pytest.mark.parametrize("interpret", ["", "0", "off"])
def test_a_cpu_never_imports_triton(interpret: str) -> None:
    """It cannot serve there, and its import takes a tenth of what an engine with a small model holds."""
    code = "import sys, torch; from inferflux.kernels.kernel_set import select"
    code += "; select(torch.device('cpu'), torch.float32); print('triton' in sys.modules)"
    environ = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environ)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_every_op_has_a_slot_and_a_key() -> None:
    names = set(KernelSet.__dataclass_fields__) - {"choices"}
    assert names == set(OPS) == set(KernelsConfig.__struct_fields__)


def test_a_backend_can_be_named_for_one_op() -> None:
    kernels = select(attention="reference")
    assert kernels.attention is find_backend("reference").find("attention")
    assert choice_of(kernels, "linear").backend == "torch"


@pytest.mark.usefixtures("picky")
def test_backends_overlay_op_by_op_and_say_why_not() -> None:
    kernels = select(torch.bfloat16)
    assert choice_of(kernels, "norm") == Choice("norm", "picky")
    assert choice_of(kernels, "rope") == Choice("rope", "torch", (("picky", "needs 32 bits"),))
    assert choice_of(kernels, "linear") == Choice("linear", "torch", (("picky", "it has no linear"),))
    assert choice_of(select(torch.float32), "rope").backend == "picky"


@pytest.mark.usefixtures("picky")
def test_a_named_backend_that_refuses_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.kernels\.rope: picky .* bfloat16 on cpu: needs 32 bits"):
        select(torch.bfloat16, rope="picky")


def test_a_file_of_ones_own(my_file: Path) -> None:
    kernels = select(norm=str(my_file), linear=str(my_file))
    assert kernels.norm(torch.ones(1, 2), torch.ones(2), 0.0).tolist() == [[42.0, 42.0]]
    assert kernels.linear.run(kernels.linear.pack(torch.eye(2), None), torch.ones(1, 2)).tolist() == [[1.0, 1.0]]
    assert choice_of(kernels, "norm").backend == str(my_file)
    assert my_file.with_suffix(".log").read_text() == "loaded ", "a file is executed once, however many ops it serves"


def test_a_package_of_ones_own(my_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file per op, as the built-in backends have, or all in the package itself."""
    package = my_file.parent / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("def rope(*args, **kwargs): ...")
    my_file.rename(package / "norm.py")
    monkeypatch.syspath_prepend(str(my_file.parent))
    kernels = select(norm="my_package", add_norm="my_package.norm", rope="my_package")
    assert {op.__module__ for op in (kernels.norm, kernels.add_norm)} == {"my_package.norm"}
    assert kernels.rope.__module__ == "my_package"


def test_an_installed_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("fast", "inferflux.kernels.reference", backends.ENTRY_POINT_GROUP)
    points = importlib.metadata.EntryPoints([point])
    monkeypatch.setattr(backends, "entry_points", lambda group: points)
    assert select(norm="fast").norm is find_backend("reference").find("norm")
    with pytest.raises(ConfigError, match="accepted: auto, triton, native, torch, reference, fast, a module"):
        select(norm="slow-kernels")


def test_an_unknown_name_lists_what_is_accepted() -> None:
    with pytest.raises(ConfigError, match=r'runtime\.kernels\.norm: .*"?tocrh.*torch, .*did you mean "torch"'):
        select(norm="tocrh")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_package.kernels", "No module named 'no_such_package'"),
        ("no/such/file.py", "FileNotFoundError"),
        ("inferflux.errors", "it has no norm"),
        ("", "no kernels called ''"),
    ],
)
def test_kernels_that_cannot_be_had_are_an_error(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^runtime\.kernels\.norm: .*{reason}"):
        select(norm=name)


@pytest.mark.parametrize(
    ("op", "source", "fault"),
    [
        ("norm", "def norm(x): ...", "too many positional arguments"),
        ("norm", "def norm(x, weight, eps, *, speed): ...", "missing a required.* 'speed'"),
        ("rope", "def rope(qkv, cos, sin, kv_pages, slots): ...", "unexpected keyword argument 'num_heads'"),
        ("linear", "class linear:\n    def pack(weight): ...\n    def run(packed, x): ...", "too many positional"),
        ("norm", "def norm(*args, **kwargs): ...", None),
        ("norm", "import functools\n\nnorm = functools.partial(lambda weight, x, w, eps: ..., 1)", None),
        ("norm", "norm = max", None),
    ],
)
def test_a_function_that_takes_other_arguments_is_the_keys_error(
    op: str, source: str, fault: str | None, tmp_path: Path
) -> None:
    """Told before anything is computed: from within a model's first step, it would be our own traceback."""
    path = tmp_path / "odd.py"
    path.write_text(source)
    if fault is None:
        select(**{op: str(path)})
        return
    with pytest.raises(ConfigError, match=rf"^runtime\.kernels\.{op}: .*{fault}.*\(the op is {op}"):
        select(**{op: str(path)})


def test_a_file_that_fails_to_import_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        select(norm=str(path))
