"""What the import contracts in pyproject.toml cannot see: parts of packages, the environment, state, size, start-up."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "inferflux"
MAX_LINES = 400


class Source(NamedTuple):
    """One module: its path below the repository, and its syntax tree."""

    path: str
    tree: ast.Module


class Rule(NamedTuple):
    """`module` (and what is in it) may be imported by files under `allowed` only."""

    module: str
    allowed: tuple[str, ...]


RULES = (
    Rule("triton", ("inferflux/kernels/triton/",)),
    Rule("torch.distributed", ("inferflux/dist/",)),
    Rule("aiohttp", ("inferflux/server/http/", "inferflux/server/serve.py", "inferflux/ctl/")),
    Rule("pickle", ()),
    Rule("marshal", ()),
    Rule("shelve", ()),
    Rule("transformers", ()),
)
ENVIRONMENT_READERS = ("inferflux/config/", "inferflux/dist/launch.py")


def read_sources() -> list[Source]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [Source(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())) for path in paths]


SOURCES = read_sources()


def imported_modules(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields every module imported anywhere in the file; `from a import b` yields a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`a.b.c` for such an expression, else an empty string."""
    if isinstance(node, ast.Attribute):
        prefix = dotted(node.value)
        return f"{prefix}.{node.attr}" if prefix else ""
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.module)
def test_module_is_imported_only_in_its_room(rule: Rule) -> None:
    wrong = {
        f"{source.path}:{line}"
        for source in SOURCES
        if not source.path.startswith(rule.allowed)
        for module, line in imported_modules(source.tree)
        if module == rule.module or module.startswith(rule.module + ".")
    }
    assert not wrong, f"{rule.module} may be imported only in {rule.allowed or 'no file'}: {sorted(wrong)}"


def test_torch_distributed_is_not_reached_through_torch() -> None:
    wrong = [
        f"{source.path}:{node.lineno}"
        for source in SOURCES
        if not source.path.startswith("inferflux/dist/")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed"
    ]
    assert not wrong


def test_environment_is_read_only_by_config_and_launch() -> None:
    wrong = [
        f"{source.path}:{node.lineno}"
        for source in SOURCES
        if not source.path.startswith(ENVIRONMENT_READERS)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv", "os.putenv")
    ]
    assert not wrong, f"read the environment in inferflux/config and pass values on: {wrong}"


def test_no_code_or_pickle_is_read_from_a_model() -> None:
    forbidden = ("torch.load", "eval", "exec", "numpy.load", "np.load")
    wrong = [
        f"{source.path}:{node.lineno}: {dotted(node.func)}"
        for source in SOURCES
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and dotted(node.func) in forbidden
    ]
    assert not wrong


MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = ("list", "dict", "set", "bytearray", "deque", "defaultdict", "OrderedDict", "Counter", "count", "local")


def module_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run at import, those in `if` and `try` too; functions and classes do not."""
    for statement in body:
        yield statement
        for branch in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from module_statements(getattr(statement, branch, []))


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return dotted(value.func).split(".")[-1] in MUTABLE_CALLS
    return isinstance(value, MUTABLE)


def is_constant(target: ast.expr, annotation: ast.expr | None) -> bool:
    """UPPER_CASE, a dunder such as __all__, or annotated Final: a promise that it is never changed."""
    name = dotted(target)
    final = annotation is not None and "Final" in ast.unparse(annotation)
    return final or name.isupper() or (name.startswith("__") and name.endswith("__"))


def test_no_mutable_state_at_module_level() -> None:
    wrong = []
    for source in SOURCES:
        for statement in module_statements(source.tree.body):
            if isinstance(statement, ast.Assign):
                targets, annotation, value = statement.targets, None, statement.value
            elif isinstance(statement, ast.AnnAssign):
                targets, annotation, value = [statement.target], statement.annotation, statement.value
            else:
                continue
            if is_mutable(value) and not all(is_constant(target, annotation) for target in targets):
                wrong.append(f"{source.path}:{statement.lineno}")
    assert not wrong, f"hold state in an object, or name a constant in UPPER_CASE: {wrong}"


def test_constants_are_not_changed() -> None:
    """No `global`, and nobody stores into or calls a changing method of an UPPER_CASE name."""
    changing = {"append", "extend", "insert", "pop", "popitem", "clear", "update", "setdefault", "add", "remove"}
    wrong = []
    for source in SOURCES:
        for node in ast.walk(source.tree):
            stores = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
            calls = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in changing
            owner = node.value if stores else node.func.value if calls else None  # type: ignore[attr-defined]
            if isinstance(node, ast.Global) or (owner is not None and dotted(owner).split(".")[-1].isupper()):
                wrong.append(f"{source.path}:{node.lineno}")
    assert not wrong


def test_no_work_at_import() -> None:
    """A bare call at module level is work; definitions and constants are not."""
    wrong = [
        f"{source.path}:{statement.lineno}"
        for source in SOURCES
        for statement in source.tree.body
        if (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call))
        or isinstance(statement, ast.For | ast.While | ast.With)
    ]
    assert not wrong


def test_every_module_says_what_it_is() -> None:
    empty_package = [source.path for source in SOURCES if source.path.endswith("__init__.py") and not source.tree.body]
    silent = [source.path for source in SOURCES if ast.get_docstring(source.tree) is None]
    assert sorted(set(silent) - set(empty_package)) == []


def test_files_stay_small() -> None:
    long = {path: count for path in SOURCES if (count := len((ROOT / path.path).read_text().splitlines())) > MAX_LINES}
    assert not long, f"split these: {[(source.path, count) for source, count in long.items()]}"


@pytest.mark.parametrize("module", ["inferflux", "inferflux.cli", "inferflux.config.load", "inferflux.server.serve"])
def test_torch_stays_out_of_the_process(module: str) -> None:
    """The server's own process starts in a fraction of a second and stays small."""
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
