"""Chat templates that know tools and thoughts, in the formats models come with: small, and of the real ones' form."""

from pathlib import Path
from tempfile import TemporaryDirectory

from inferflux.engine.text import TextBundle, load_text
from tests.support.tokenizers import write_byte_level

_LOOP = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}CALL{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\nEND{% endif %}"
)
_TOOLS = "{% if tools %}TOOLS {{ tools | tojson }}{% endif %}"


def template(tools: str = "hermes", *, end: str = "") -> str:
    """Returns a template of a format; end: what the prompt ends with, such as `<think>`."""
    call = {
        "hermes": '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
        "{{ call.function.arguments | tojson }}}\n</tool_call>",
        "llama3": '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}',
        "mistral": "[TOOL_CALLS] [{{ call.function | tojson }}]",
        "mistral_named": "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}",
    }[tools]
    thoughts = "{# </think> #}" if end else ""
    return thoughts + _TOOLS + _LOOP.replace("CALL", call).replace("END", end)


def bundle(tools: str = "hermes", *, end: str = "") -> TextBundle:
    """Returns a byte-level tokenizer with such a template."""
    with TemporaryDirectory() as folder:
        return load_text(write_byte_level(Path(folder), chat_template=template(tools, end=end)))
