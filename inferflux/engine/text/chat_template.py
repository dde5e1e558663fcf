"""ChatTemplate: chat messages to the prompt text a model was trained on, by the model folder's jinja template.

Templates come from the operator or the model's folder, never from a request; they run sandboxed and within limits
(`template_sandbox`). Knows no tokens beyond the special ones' text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.environment import Template

from inferflux.engine.model_files import read_text
from inferflux.engine.text.answer.formats import answer_style
from inferflux.engine.text.settings import CONFIG_FILE, TokenizerSettings
from inferflux.engine.text.template_budget import RenderLimits, TemplateLimitError
from inferflux.engine.text.template_forms import MessageForms, message_forms
from inferflux.engine.text.template_sandbox import ChatEnvironment, TemplateRaisedError
from inferflux.errors import ConfigError, ModelLoadError, RequestError

MAX_TEMPLATE_CHARS = 128 * 1024
_TEMPLATE_FILE = "chat_template.jinja"
_NO_TEMPLATE = (
    "messages: this model has no chat template: set models[].chat_template in the configuration, "
    "or send a prompt to /v1/completions"
)
_OWN_VARIABLES = frozenset(("messages", "tools", "documents", "add_generation_prompt"))

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template. Immutable; any number of threads may render at once.

    source: None for a model without a template, whose every rendering is refused with a word on what to configure.
    style: how the model writes tool calls and thoughts, as far as its template shows.
    named_tokens: special tokens by role (`bos_token`, `eos_token`), which templates write into the text.
    Raises ModelLoadError, naming `origin`, when the template does not compile.
    """

    def __init__(
        self,
        source: str | None,
        *,
        named_tokens: Mapping[str, str] | None = None,
        origin: str = "chat template",
        limits: RenderLimits | None = None,
    ) -> None:
        self.style = answer_style(source)
        self._environment = ChatEnvironment()
        self._named_tokens = dict(named_tokens or {})
        self._limits = limits or RenderLimits()
        self._template: Template | None = None
        self._forms = MessageForms()
        if source is None:
            return
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelLoadError(f"{origin}: has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are accepted")
        try:
            with self._environment.budgeted(self._limits):
                self._template = self._environment.compile_template(source)
                self._forms = message_forms(self._environment.parse(source))
        except Exception as error:  # a broken template can fail in jinja, in Python's compiler or in a folded filter
            raise ModelLoadError(f"{origin}: does not compile: {_brief(error)}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the prompt. Pure computation of up to seconds: call it off the event loop.

        A message's content is a string, or a list of text parts: joined, unless the template itself loops over parts.
        None is an empty string, unless the template asks for none. A call's arguments are an object, or their JSON text
        where the template joins them to strings.
        variables: further names for the template, such as `enable_thinking`.
        Encode the result with add_special_tokens=False: the template has written them. It writes the users' words as
        they are, so special tokens spelt out in a message become special tokens, as with Hugging Face and vLLM.

        Raises RequestError (param `messages`) when there is no template, and when it refuses the messages, fails on
        them or hits a limit.
        """
        if self._template is None:
            raise RequestError(_NO_TEMPLATE, param="messages")
        if clash := _OWN_VARIABLES.intersection(variables or ()):
            raise RequestError(f"chat_template_kwargs: {min(clash)} cannot be set", param="chat_template_kwargs")
        context = {
            **self._named_tokens,
            **(variables or {}),
            "messages": [self._as_read(index, message) for index, message in enumerate(messages)],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with self._environment.budgeted(self._limits):
                self._environment.budget.charge(context)
                return self._template.render(context)
        except TemplateRaisedError as error:
            raise RequestError(f"messages: {error}", param="messages") from error
        except TemplateLimitError as error:
            raise RequestError(f"messages: the chat template was stopped: {error}", param="messages") from error
        except Exception as error:  # template code may raise anything that Python can
            message = f"messages: the chat template cannot render them: {_brief(error)}"
            raise RequestError(message, param="messages") from error

    def _as_read(self, index: int, message: Message) -> Message:
        """Returns the message in the form the template takes."""
        if calls := message.get("tool_calls"):
            message = {**message, "tool_calls": self._forms.calls(calls)}
        return {**message, "content": self._content(index, message["content"])} if "content" in message else message

    def _content(self, index: int, content: object) -> object:
        if content is None:
            return None if self._forms.none else ""
        if isinstance(content, str):
            wrap = self._forms.parts and not self._forms.strings
            return [{"type": "text", "text": content}] if wrap else content
        texts = _part_texts(index, content)
        return [{"type": "text", "text": text} for text in texts] if self._forms.parts else "".join(texts)


def load_chat_template(
    folder: Path, override: str | None, settings: TokenizerSettings, named_tokens: Mapping[str, str]
) -> ChatTemplate:
    """Returns the model's template.

    override (config models[].chat_template): a template file's path, or the template itself (it holds `{{` or `{%`).
    Without: the folder's chat_template.jinja, else the `chat_template` of tokenizer_config.json.
    Raises ConfigError when the override cannot be used, ModelLoadError when what the folder has cannot.
    """
    if override is None:
        origin, source = _find_template(folder, settings)
        return ChatTemplate(source, named_tokens=named_tokens, origin=origin)
    is_inline = "{{" in override or "{%" in override
    origin = "template" if is_inline else override
    try:
        source = override if is_inline else read_text(Path(override), 4 * MAX_TEMPLATE_CHARS)
        return ChatTemplate(source, named_tokens=named_tokens, origin=origin)
    except ModelLoadError as error:
        raise ConfigError(f"models[].chat_template: {error}") from error


def _find_template(folder: Path, settings: TokenizerSettings) -> tuple[str, str | None]:
    """Returns (where it is from, source)."""
    file = folder / _TEMPLATE_FILE
    if file.exists():
        return str(file), read_text(file, 4 * MAX_TEMPLATE_CHARS)
    return f"{folder / CONFIG_FILE}: chat_template", settings.chat_template


def _part_texts(index: int, content: object) -> list[str]:
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        kind = type(content).__name__
        raise RequestError(
            f"messages[{index}].content: must be a string or a list of parts (got {kind})", param="messages"
        )
    texts = []
    for number, part in enumerate(content):
        where = f"messages[{index}].content[{number}]"
        if not isinstance(part, Mapping) or part.get("type") != "text":
            got = part.get("type") if isinstance(part, Mapping) else part
            raise RequestError(f'{where}: must be a part of type "text" (got {got!r:.40})', param="messages")
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}.text: must be a string", param="messages")
        texts.append(part["text"])
    return texts


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
