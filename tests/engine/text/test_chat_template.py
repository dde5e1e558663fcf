"""Chat templates of the usual shapes against transformers, and the forms that messages and templates may take."""

import json
import threading
from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from inferflux.engine.text import load_text
from inferflux.engine.text.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate, load_chat_template
from inferflux.engine.text.settings import read_settings
from inferflux.errors import ConfigError, ModelLoadError, RequestError
from tests.support.tokenizers import write_byte_level

CHATML = """\
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
{%- endif %}
"""

HEADERS = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system, rest = messages[0].content | trim, messages[1:] %}
{%- else %}
    {%- set system, rest = 'Answer.', messages %}
{%- endif %}
{{- '[head]system[/head]\\n\\nIn ' ~ strftime_now('%Y') ~ ': ' ~ system ~ eos_token }}
{%- if tools is not none %}
    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{% if not loop.last %}, {% endif %}{% endfor %}
{%- endif %}
{%- for message in rest %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception('Unknown role ' ~ message.role) }}
    {%- endif %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '[call]' + call.function.name + ' ' + call.function.arguments | tojson }}
        {%- endfor %}
    {%- else %}
        {{- '[head]' + message['role'] + '[/head]\\n\\n' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[head]assistant[/head]\\n\\n' }}{% endif %}
"""

ALTERNATING = """\
{%- set ns = namespace(index=0, system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{% continue %}{% endif %}
    {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
        {{- raise_exception('Roles must alternate user and assistant') }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages | rejectattr('role', 'equalto', 'system') %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (ns.system + '\\n\\n' if loop.first and ns.system else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

TURNS = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<turn>' + role + '\\n' + message['content'] | trim + '</turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}
"""

WORKSHOP = """\
{# every corner of the dialect that templates use #}
{%- macro tag(name, body='') -%}<{{ name }}>{{ caller() if caller is defined else body }}</{{ name }}>{%- endmacro -%}
{%- macro deep(value) -%}
    {%- if value is mapping -%}{% for key, item in value | dictsort %}{{ key }}={{ deep(item) }};{% endfor %}
    {%- elif value is string -%}{{ value | upper }}
    {%- elif value is iterable -%}[{{ value | map('string') | join('|') }}]
    {%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{% set block %}a{{ messages | length }}b{% endset %}
{{ block }} {{ tag('x', 'y') }} {% call tag('z') %}inner{% endcall %}
{% for m in messages if m.role != 'system' %}
{{ loop.index }}/{{ loop.length }} {{ loop.previtem.role if loop.previtem is defined }} {{ m.content.split('\\n')[-1] }}
{% if loop.index > 2 %}{% break %}{% endif %}
{% else %}
none
{% endfor %}
{{ messages[::-1] | map(attribute='role') | list }}
{{ messages[1:] | selectattr('role', 'equalto', 'user') | list | count }}
{{ {'b': 1, 'a': [1, 2.5, none, true]} | tojson }}
{{ {'k': 'é<&>'} | tojson(ensure_ascii=true, separators=(',', ':')) }}
{{ deep({'k': {'n': [1, 2]}, 's': 'text'}) }} {{ '%s-%03d' % ('a', 7) }} {{ '{0}{1:>4}'.format('a', 'b') }}
{{ '%.1f' | format(2.25) }}
{{ 'a-b-c'.replace('-', '+', 1) }} {{ 'x' * 3 }} {{ [1] * 2 }} {{ 2 ** 10 }} {{ 7 // 2 }} {{ -7 % 3 }} {{ 'abc'[1:] }}
{{ 'one\\ntwo' | indent(2, first=true) }} {{ messages[0].get('name', 'nobody') }} {{ nothing | default('fallback') }}
{{ 'Title case' | title }} {{ '  x '.strip() }} {{ [3, 1, 2] | sort | first }} {{ [1, 2, 3] | sum }}
{{ ['a', 'b'] | batch(1) | list }}
{% for key, value in messages[0].items() %}{{ key ~ ':' ~ value }} {% endfor %}
{{ dict(a=1) }} {{ 1 if messages is not none else 2 }} {{ 'a' in 'abc' and not 'z' in 'abc' }}
{{ range(3) | list }} {{ none }} {{ 1.0 }}
"""

SYSTEM = {"role": "system", "content": " Be kind.\n"}
USER = {"role": "user", "content": 'Hi <there> & "you" 😀\n  '}
ASSISTANT = {"role": "assistant", "content": "Hello"}
CALL = {"function": {"name": "look", "arguments": {"q": "é", "n": [1, {"z": None}]}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CHATS = (
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT, USER],
    [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER],
    [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, USER],
    [USER, USER],
    [{"role": "wizard", "content": "x"}, {"role": "wizard", "content": "y"}],
)
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "alternating": ALTERNATING, "turns": TURNS, "workshop": WORKSHOP}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(write_byte_level(tmp_path_factory.mktemp("oracle")))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(
    oracle: PreTrainedTokenizerBase, name: str, chat: list[dict], add_generation_prompt: bool
) -> None:
    template = ChatTemplate(TEMPLATES[name], named_tokens=oracle.special_tokens_map)
    for tools in (None, TOOLS):
        expected, refusal = None, None
        try:
            expected = oracle.apply_chat_template(
                chat,
                tools=tools,
                chat_template=TEMPLATES[name],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except TemplateError as error:
            refusal = f"messages: {error}"
        try:
            assert template.render(chat, tools=tools, add_generation_prompt=add_generation_prompt) == expected
        except RequestError as error:
            assert (str(error), error.param) == (refusal, "messages")  # noqa: PT017


def test_further_variables_reach_the_template_and_own_ones_cannot_be_set() -> None:
    template = ChatTemplate("{{ enable_thinking }}{{ bos_token }}", named_tokens={"bos_token": "<s>"})
    assert template.render([USER], variables={"enable_thinking": False}) == "False<s>"
    with pytest.raises(RequestError, match="messages cannot be set") as caught:
        template.render([USER], variables={"messages": []})
    assert caught.value.param == "chat_template_kwargs"


PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
SHOW = "{{ messages[0].content }}"
LOOP = "{% for m in messages %}{% for part in m['content'] %}({{ part.text }}){% endfor %}{% endfor %}"
ASSIGNED = (
    "{% for m in messages %}{% set c = m.content %}{% for part in c %}({{ part['text'] }}){% endfor %}{% endfor %}"
)
MACRO = (
    "{% macro show(content) %}{% for p in content[0:] %}({{ p.text }}){% endfor %}{% endmacro %}"
    "{{ show(messages[0].content) }}"
)
EITHER = (
    "{% set c = messages[0].content %}{% if c is string %}{{ c }}"
    "{% else %}{% for part in c | list %}({{ part.text }}){% endfor %}{% endif %}"
)

ASKS_NONE = "{% set m = messages[0] %}{% if m['content'] is none %}nothing{% else %}({{ m.content }}){% endif %}"


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        (SHOW, PARTS, "one two"),
        (SHOW, [], ""),
        (SHOW, None, ""),
        (LOOP, PARTS, "(one )(two)"),
        (LOOP, "plain", "(plain)"),
        (ASSIGNED, "plain", "(plain)"),
        (ASSIGNED, PARTS, "(one )(two)"),
        (MACRO, "plain", "(plain)"),
        (EITHER, "plain", "plain"),
        (EITHER, PARTS, "(one )(two)"),
        (ASKS_NONE, None, "nothing"),
        (ASKS_NONE, "", "()"),
    ],
)
def test_content_comes_in_the_form_the_template_takes(source: str, content: object, expected: str) -> None:
    assert ChatTemplate(source).render([{"role": "user", "content": content}]) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ '```' + f['arguments'] + '```' }}", '```{"q": "é", "n": [1, {"z": null}]}```'),
        ("{{ f.name ~ f.arguments }}", 'look{"q": "é", "n": [1, {"z": null}]}'),
        ("{{ f.name + f.arguments | tojson }}", 'look{"q": "é", "n": [1, {"z": null}]}'),
        ("{{ f.arguments['q'] + '!' }}", "é!"),
        ("{% if f.arguments is mapping %}{{ f.arguments.q }}{% else %}{{ '' + f.arguments }}{% endif %}", "é"),
    ],
)
def test_a_calls_arguments_come_in_the_form_the_template_takes(source: str, expected: str) -> None:
    template = ChatTemplate("{% set f = messages[1].tool_calls[0].function %}" + source)
    assert template.render([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]) == expected
    assert CALL["function"]["arguments"] == {"q": "é", "n": [1, {"z": None}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5, r"messages\[1\].content: must be a string or a list of parts \(got int\)"),
        ({"text": "x"}, "must be a string or a list"),
        (["x"], r"messages\[1\].content\[0\]: must be a part of type \"text\" \(got 'x'\)"),
        ([*PARTS, {"type": "image_url"}], r"messages\[1\].content\[2\]: .* \(got 'image_url'\)"),
        ([{"type": "text"}], r"messages\[1\].content\[0\].text: must be a string"),
    ],
)
def test_bad_content_is_named(content: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        ChatTemplate(CHATML).render([USER, {"role": "user", "content": content}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source", ["{{ 1 / 0 }}", "{{ missing.field }}", "{{ 'a' + 1 }}", "{% include 'x' %}", "{{ x() }}"]
)
def test_a_template_that_fails_is_a_request_error(source: str) -> None:
    with pytest.raises(RequestError, match="the chat template cannot render them") as caught:
        ChatTemplate(source).render([USER])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ x | nonsense }}", "{% endif %}", "{{ '" + "x" * MAX_TEMPLATE_CHARS]
)
def test_a_template_that_does_not_compile_is_refused_at_load(source: str) -> None:
    with pytest.raises(ModelLoadError, match="here: "):
        ChatTemplate(source, origin="here")


def test_threads_render_at_the_same_time() -> None:
    template = ChatTemplate(CHATML)
    wrong: list[str] = []

    def work(number: int) -> None:
        for _ in range(30):
            text = template.render([{"role": "user", "content": str(number)}] * 20)
            if text.count(f"\n{number}<") != 20:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def source_of(folder: Path, override: str | None = None) -> str:
    template = load_chat_template(folder, override, read_settings(folder), {})
    return template.render([USER])


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "from config{{ '' }}"}))
    assert source_of(tmp_path) == "from config"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "from the list"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert source_of(tmp_path) == "from the list"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert source_of(tmp_path) == "from the file"
    (tmp_path / "other.jinja").write_text("from the override")
    assert source_of(tmp_path, str(tmp_path / "other.jinja")) == "from the override"
    assert source_of(tmp_path, "inline {{ messages[0].role }}") == "inline user"


def test_a_configured_template_that_cannot_be_used_is_the_configurations_fault(tmp_path: Path) -> None:
    """The server then ends as it does for every other wrong key, with code 2."""
    with pytest.raises(ConfigError, match=r"^models\[\].chat_template: .*absent\.jinja: cannot be read"):
        source_of(tmp_path, str(tmp_path / "absent.jinja"))
    with pytest.raises(ConfigError, match=r"^models\[\].chat_template: template: does not compile"):
        source_of(tmp_path, "{{ messages")
    (tmp_path / "chat_template.jinja").write_text("{{ messages")
    with pytest.raises(ModelLoadError, match="does not compile"):
        source_of(tmp_path)


def test_a_folder_without_a_template_says_what_to_configure(tmp_path: Path) -> None:
    text = load_text(write_byte_level(tmp_path))
    with pytest.raises(RequestError, match=r"no chat template: set models\[\].chat_template") as caught:
        text.encode_chat([USER])
    assert caught.value.param == "messages"


def test_the_rendered_chat_is_encoded_without_further_special_tokens(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, chat_template="{{ bos_token }}" + CHATML)
    oracle, text = AutoTokenizer.from_pretrained(folder), load_text(folder)
    chat = [SYSTEM, USER, {"role": "assistant", "content": "spoof<|end|>"}]
    ids = text.encode_chat(chat)
    assert ids == oracle.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids[0] == text.tokenizer.bos_token_id != ids[1]
    assert len([token_id for token_id in ids if token_id in text.tokenizer.eos_token_ids]) == 4
