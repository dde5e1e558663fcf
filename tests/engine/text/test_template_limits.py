"""A hostile chat template is stopped: in time, in memory, and without reaching out of the sandbox."""

import time
import tracemalloc

import pytest

from inferflux.engine.text.chat_template import ChatTemplate
from inferflux.engine.text.template_budget import RenderLimits
from inferflux.errors import ModelLoadError, RequestError

MESSAGES = [{"role": "user", "content": "hi"}]
GROW = "{% set ns = namespace(a=['x'], s='x') %}{% for i in range(60) %}"
LOOPS = {
    "a huge range": "{% for i in range(10**12) %}{% endfor %}",
    "nested loops that print nothing": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops whose filter passes nothing": (
        "{% for i in range(9999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "a macro calling itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}"
    ),
    "a macro without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a block without an end": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a recursive loop without an end": "{% for x in [[1]] recursive %}{{ loop([[1], [2]]) }}{% endfor %}",
    "generators drained in filters": (
        "{% for i in range(99999) %}{% set x = range(99999) | select('undefined') | list %}{% endfor %}"
    ),
    "long searches": (
        "{% set a = 'ab' * 99999 %}{% set b = 'ba' * 50000 ~ 'c' %}"
        "{% for i in range(99999) %}{% set x = b in a %}{% endfor %}"
    ),
    "sorting again and again": "{% for i in range(9999) %}{% set x = range(999) | map('string') | sort %}{% endfor %}",
    "sums of lists": "{{ [[1]] | sum(start=[]) }}",
}
GROWTH = {
    "string times number": "{{ 'a' * 10**9 }}",
    "number times string": "{{ 10**9 * 'a' }}",
    "list times number": "{{ [1] * 10**9 }}",
    "powers": "{% set ns = namespace(n=10) %}{% for i in range(60) %}{% set ns.n = ns.n ** 10 %}{% endfor %}",
    "squares": "{% set ns = namespace(n=10) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "% with a width": "{{ '%1000000000d' % 1 }}",
    "% with a width from outside": "{{ '%*d' % (1000000000, 1) }}",
    "% with an odd key": "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}",
    "% used often": "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "the format filter": "{{ '%1000000000d' | format(1) }}",
    "str.format with a width": "{{ '{:>1000000000}'.format('a') }}",
    "str.format with a width from outside": "{{ '{:>{}}'.format('a', 1000000000) }}",
    "str.format used often": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "str.format by attr": "{{ ('{:>1000000000}' | attr('format'))('a') }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "str.join": "{{ ('a' * 100000).join(range(99999) | map('string')) }}",
    "the join filter": "{{ range(99999) | join('a' * 100000) }}",
    "str.replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "the replace filter": "{{ ('a' * 100000) | replace('', 'b' * 100000) }}",
    "indent": "{{ ('\n' * 100000) | indent(9999) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "round": "{{ 1.5 | round(-10**9, 'floor') }}",
    "tojson": "{{ {'a': 1} | tojson(indent=10**9) }}",
    "doubling by ~": GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling by +": GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling by a set block": GROW + "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
    "nested lists": GROW + "{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "nested tuples": GROW + "{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ ns.a | string }}",
    "nested dicts": GROW + "{% set ns.a = {'a': ns.a, 'b': ns.a} %}{% endfor %}{{ ns.a | tojson }}",
    "nested dict()": GROW + "{% set ns.a = dict(a=ns.a, b=ns.a) %}{% endfor %}{{ ns.a }}",
    "nested varargs": (
        "{% set ns = namespace(a='x') %}{% macro f() %}{% set ns.a = varargs %}{% endmacro %}"
        "{% for i in range(60) %}{{ f(ns.a, ns.a) }}{% endfor %}{{ ns.a }}"
    ),
    "nested kwargs": (
        "{% set ns = namespace(a='x') %}{% macro f() %}{% set ns.a = kwargs %}{% endmacro %}"
        "{% for i in range(60) %}{{ f(_a=ns.a, _b=ns.a) }}{% endfor %}{{ ns.a }}"
    ),
    "nested cyclers": GROW + "{% set ns.a = cycler(ns.a, ns.a).items %}{% endfor %}{{ ns.a }}",
    "nested items": GROW + "{% set ns.a = {'a': ns.a}.items() | list + [ns.a] %}{% endfor %}{{ ns.a }}",
    "nested batches": GROW + "{% set ns.a = [ns.a] | batch(2, ns.a) | list %}{% endfor %}{{ ns.a }}",
    "doubled lists": GROW + "{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "output": "{% for i in range(9000) %}{{ 'a' * 10000 }}{% endfor %}",
    "many slices": "{% set a = 'a' * 200000 %}" + "".join(f"{{% set v{i} = a[{i}:] %}}" for i in range(99)),
}
ESCAPES = {
    "a class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "a method outside the list": "{{ 'a'.encode() }}",
    "format_map": "{{ '{a}'.format_map({'a': 1}) }}",
    "int methods": "{{ (1).to_bytes(10**9, 'big') }}",
    "changing the messages": "{{ messages.append(1) }}",
    "changing a message": "{{ messages[0].update({'a': 1}) }}",
    "a private name": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "a file": "{% include '/etc/hostname' %}",
    "an import": "{% import '/etc/hostname' as x %}",
}


def render(source: str) -> str:
    limits = RenderLimits(max_chars=256 * 1024, max_work=8 * 1024 * 1024, max_cpu_s=0.25)
    return ChatTemplate(source, limits=limits).render(MESSAGES)


@pytest.mark.parametrize("name", [*LOOPS, *GROWTH])
def test_a_template_without_measure_is_stopped(name: str) -> None:
    started = time.thread_time()
    with pytest.raises(RequestError) as caught:
        render({**LOOPS, **GROWTH}[name])
    assert caught.value.param == "messages"
    assert time.thread_time() - started < 2


def test_memory_stays_bounded() -> None:
    """At most `max_work` characters of four bytes are ever made, lists and the compiled templates come on top."""
    tracemalloc.start()
    try:
        for source in GROWTH.values():
            with pytest.raises(RequestError):
                render(source)
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ESCAPES)
def test_the_sandbox_has_no_way_out(name: str) -> None:
    with pytest.raises(RequestError, match="the chat template cannot render them"):
        render(ESCAPES[name])
    assert MESSAGES == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("opening", ["(", "[", "-"])
def test_a_template_too_deep_to_compile_is_a_load_error(opening: str) -> None:
    with pytest.raises(ModelLoadError, match="does not compile"):
        ChatTemplate("{{ " + opening * 50_000 + "1 }}")


def test_the_default_limits_hold_too() -> None:
    started = time.thread_time()
    with pytest.raises(RequestError, match="was stopped: rendering takes"):
        ChatTemplate(LOOPS["nested loops that print nothing"]).render(MESSAGES)
    assert time.thread_time() - started < 4


def test_messages_over_the_size_limit_are_refused() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    with pytest.raises(RequestError, match="larger than 4194304 characters"):
        template.render([{"role": "user", "content": "x" * (4 * 1024 * 1024)}])


def test_a_long_honest_chat_is_within_the_limits() -> None:
    """A thousand messages, two million characters: more than any model's window."""
    template = ChatTemplate("{% for m in messages %}{{ '<' ~ m.role ~ '>' + m.content | trim + '\n' }}{% endfor %}")
    text = template.render([{"role": "user", "content": " " + "word " * 400}] * 1000)
    assert len(text) == 1000 * (len("<user>\n") + 1999)


def test_one_rendering_does_not_pay_for_the_next() -> None:
    template = ChatTemplate("{% for i in range(9999) %}{% endfor %}done", limits=RenderLimits(max_work=700_000))
    assert [template.render(MESSAGES) for _ in range(5)] == ["done"] * 5
