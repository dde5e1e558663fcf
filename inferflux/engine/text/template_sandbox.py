"""The jinja environment chat templates run in: sandboxed, with a budget that every loop and operation spends from.

How it is held: the parsed template is instrumented (`template_instrument`) so that each loop turn, macro call,
comparison, concatenation, slice and list spends; filters, tests, operators and calls spend where jinja hands them to
the environment; only what `template_guards` lists may be called. Between two payments a template does bounded work.
Knows no messages and no model.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import update_wrapper
from types import BuiltinMethodType, MethodType
from typing import Any

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, TemplateReference
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace

from inferflux.engine.text import template_guards as guards
from inferflux.engine.text.template_budget import Budget, RenderLimits
from inferflux.engine.text.template_instrument import Instrument

_RUNTIME_TYPES = (LoopContext, Macro, BlockReference, TemplateReference, Cycler, Joiner, Namespace)
_PASSED_ARGUMENT = "jinja_pass_arg"
_JINJA_ARGUMENTS = frozenset(("_loop_vars", "_block_vars"))


class TemplateRaisedError(TemplateError):
    """The template called `raise_exception`: it refuses the messages."""


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Renders with Hugging Face's chat template dialect: trim_blocks, lstrip_blocks, break and continue,
    `{% generation %}`, `raise_exception`, `strftime_now`, `tojson` without HTML escapes.

    Threads may render at the same time; each has a budget of its own, open during `budgeted`.
    """

    intercepted_binops = frozenset(("+", *guards.BINARY_GUARDS))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _GenerationTag],
            finalize=self._printable,
        )
        self._current = threading.local()
        self.filters |= {"tojson": self._to_json, "join": self._join_filter}
        self.filters = {name: self._paid_filter(name, self.filters[name]) for name in guards.FILTERS}
        tests: Mapping[str, Any] = self.tests
        self.tests = {name: self._paid(test) for name, test in tests.items()}
        del self.globals["lipsum"]
        self.globals["namespace"] = _SafeNamespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = guards.strftime_now

    @contextmanager
    def budgeted(self, limits: RenderLimits) -> Iterator[None]:
        """Whatever this thread renders or compiles inside spends from one new budget."""
        self._current.budget = Budget(limits)
        try:
            yield
        finally:
            del self._current.budget

    def compile_template(self, source: str) -> Template:
        """Returns the instrumented template. Raises jinja's TemplateSyntaxError, or what the budget raises."""
        return self.from_string(Instrument().visit(self.parse(source)))

    @property
    def budget(self) -> Budget:
        budget: Budget = self._current.budget
        return budget

    @property
    def step(self) -> bool:
        """Pays for one step and is False: what instrumented code reads, as the cheapest thing it can do."""
        self.budget.step()
        return False

    def paid(self, value: Any) -> Any:
        """Returns the value, paid for; an iterator pays for each item as it is drawn."""
        if isinstance(value, (str, int, list, tuple, dict)):
            self.budget.charge(value)
        elif isinstance(value, Iterator):
            return self._paid_items(value)
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins a macro's, a block's or the whole template's output; stops as soon as it is too large."""
        budget = self.budget
        parts = []
        size = 0
        for piece in pieces:
            budget.step()
            parts.append(piece)
            size += len(piece)
            budget.allow(size)
        budget.spend(size)
        return "".join(parts)

    def concat_values(self, *values: Any) -> str:
        """The `~` operator."""
        return self.concat(str(value) for value in values)

    def slice_of(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return value[start:stop:step]

    def container(self, value: Any) -> Any:
        """A list, tuple or dict written out in the template: `call` charges for it as for every result."""
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call a template makes. (The names keep clear of the template's keyword arguments.)

        Arguments are paid for, since a macro sees them as a list (`varargs`), which can be nested again and again.
        """
        __self.budget.step()
        __self.budget.charge((args, {name: kwargs[name] for name in kwargs if name not in _JINJA_ARGUMENTS}))
        if isinstance(__obj, (BuiltinMethodType, MethodType)) and isinstance(__obj.__self__, str):
            guard = guards.METHOD_GUARDS.get(__obj.__name__)
            if guard is not None:
                args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
                guard(__self.budget, __obj.__self__, *args)
        return __self.paid(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make large values; a sum is at most twice as large as what was paid for before."""
        self.budget.step()
        guard = guards.BINARY_GUARDS.get(operator)
        if guard is not None:
            guard(self.budget, left, right)
        return self.paid(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, names in guards.METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, _RUNTIME_TYPES)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Returns str.format with bounded fields in place of the unbounded method; None for any other value."""
        if not isinstance(value, (BuiltinMethodType, MethodType)) or value.__name__ != "format":
            return None
        text = value.__self__
        if not isinstance(text, str):
            return None
        formatter = _BoundedFormatter(self)
        return lambda *args, **kwargs: formatter.vformat(text, args, kwargs)

    def _printable(self, value: Any) -> Any:
        """What `{{ value }}` prints; text has been paid for when it was made."""
        return value if isinstance(value, str) else self.paid(str(value))

    def _paid(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def paid_function(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            return self.paid(function(*args, **kwargs))

        return update_wrapper(paid_function, function)

    def _paid_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        guard = guards.FILTER_GUARDS.get(name)
        if guard is None:
            return self._paid(function)
        num_passed = 1 if hasattr(function, _PASSED_ARGUMENT) else 0

        def guarded_function(*args: Any, **kwargs: Any) -> Any:
            guard(self.budget, *args[num_passed:], **kwargs)
            return function(*args, **kwargs)

        return self._paid(update_wrapper(guarded_function, function))

    def _paid_items(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.budget.step()
            yield item

    def _to_json(self, value: Any, *args: Any, **kwargs: Any) -> str:
        return self.concat(guards.to_json(value, *args, **kwargs))

    def _join_filter(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(make_attrgetter(self, attribute), value)
        texts = [str(item) for item in value]
        guards.check_join(self.budget, str(d), texts)
        return str(d).join(texts)


class _SafeNamespace(Namespace):
    """jinja's namespace, without private names, and printed by its name only: its content may be itself."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace takes no private name (got {name!r:.40})")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


class _BoundedFormatter(SandboxedFormatter):
    """str.format whose fields are paid for one by one and cannot ask for a huge width."""

    _env: ChatEnvironment

    def format_field(self, value: Any, format_spec: str) -> str:
        guards.check_format_spec(format_spec)
        return str(self._env.paid(super().format_field(value, format_spec)))


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; rendering shows its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: object) -> None:
    raise TemplateRaisedError(str(message))
