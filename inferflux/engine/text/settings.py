"""What the JSON files beside a tokenizer say of it: special tokens, added tokens, BOS and EOS, the chat template.

Reads tokenizer_config.json, the older special_tokens_map.json and added_tokens.json where the first does not list the
added tokens itself, and of sentence-transformers' settings whether texts are brought to lower case.
Knows neither `tokenizers` nor `sentencepiece`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferflux.engine.model_files import read_json_object
from inferflux.errors import ModelLoadError

CONFIG_FILE = "tokenizer_config.json"
_SENTENCE_FILE = "sentence_bert_config.json"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")
_TOKEN_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
_MAX_ADDED_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token kept whole by splitting the text at it before the model sees the rest.

    lstrip, rstrip: it swallows the whitespace on that side. special: left out when special tokens are skipped.
    says_all: the files give each of these flags, and so count where tokenizer.json gives others.
    """

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False
    says_all: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """named_tokens: the special tokens by role (`bos_token`: `<s>`). extra_tokens: special tokens without such a role;
    own_roles: those of them that have one of the model's own. flags: what the files say of each, as AddedToken has it.

    A None flag means that the files do not say.
    """

    named_tokens: Mapping[str, str]
    extra_tokens: tuple[str, ...]
    own_roles: frozenset[str]
    flags: Mapping[str, Mapping[str, bool]]
    added_tokens: tuple[AddedToken, ...]
    chat_template: str | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    legacy: bool | None
    lower_case: bool

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The text of every special token, roles first, without doubles."""
        return tuple(dict.fromkeys((*self.named_tokens.values(), *self.extra_tokens)))


def read_settings(folder: Path) -> TokenizerSettings:
    """Reads the settings of the tokenizer in a model folder. Files that are missing leave their part empty.

    Raises ModelLoadError naming the file and the key that cannot be understood.
    """
    source, sentences = folder / CONFIG_FILE, folder / _SENTENCE_FILE
    config = _read_if_there(source)
    added_by_content: Mapping[str, Any] = {}
    if "added_tokens_decoder" not in config:
        config = {**config, **_read_if_there(folder / "special_tokens_map.json")}
        added_by_content = _read_if_there(folder / "added_tokens.json")
    named = {role: text for role in _NAMED_TOKENS if (text := _token_text(source, role, config.get(role)))}
    extra = _extra_tokens(source, config)
    special = {*named.values(), *extra}
    added = _added_tokens(source, config.get("added_tokens_decoder") or {})
    return TokenizerSettings(
        named_tokens=named,
        extra_tokens=extra,
        own_roles=frozenset(_own_roles(config)),
        flags=_special_flags(config),
        added_tokens=added or _added_by_content(folder / "added_tokens.json", added_by_content, special),
        chat_template=_default_template(source, config.get("chat_template")),
        add_bos_token=_flag(source, config, "add_bos_token"),
        add_eos_token=_flag(source, config, "add_eos_token"),
        legacy=_flag(source, config, "legacy"),
        lower_case=_flag(sentences, _read_if_there(sentences), "do_lower_case") is True,
    )


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _token_text(source: Path, key: str, value: Any) -> str | None:
    """A token stands as its text, or as an object with its text under `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ModelLoadError(f'{source}: {key}: must be a string or an object with "content" (got {value!r:.80})')
    return text or None


def _extra_tokens(source: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    tokens: list[str] = []
    for key in _EXTRA_TOKENS:
        value = config.get(key) or []
        if not isinstance(value, dict | list):
            raise ModelLoadError(f"{source}: {key}: must be a list of tokens (got {value!r:.80})")
        tokens += [text for item in _items(value) if (text := _token_text(source, key, item))]
    return tuple(tokens)


def _items(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value or ())


def _own_roles(config: Mapping[str, Any]) -> Iterator[str]:
    for value in map(config.get, _EXTRA_TOKENS):
        if isinstance(value, dict):
            texts = (item.get("content") if isinstance(item, dict) else item for item in value.values())
            yield from filter(None, texts)


def _special_flags(config: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    """Returns the flags of the special tokens, whose texts have been checked. Who has a role is special whatever its
    object says; without one, an object without the flag is not."""
    extra = [item for key in _EXTRA_TOKENS for item in _items(config.get(key))]
    roles = [{**item, "special": True} if isinstance(item, dict) else item for item in map(config.get, _NAMED_TOKENS)]
    flags: dict[str, dict[str, bool]] = {}
    for item in filter(None, (*extra, *roles)):
        if isinstance(item, str):
            flags[item] = {"special": True}
        elif item.get("content"):
            flags[item["content"]] = {name: bool(item[name]) for name in _TOKEN_FLAGS if name in item}
    return flags


def _added_tokens(source: Path, decoder: Any) -> tuple[AddedToken, ...]:
    if not isinstance(decoder, dict) or len(decoder) > _MAX_ADDED_TOKENS:
        raise ModelLoadError(f"{source}: added_tokens_decoder: must map at most {_MAX_ADDED_TOKENS} ids to tokens")
    tokens = []
    for key, value in decoder.items():
        text = _token_text(source, f"added_tokens_decoder.{key}", value)
        if not key.isdecimal() or text is None or not isinstance(value, dict):
            raise ModelLoadError(f"{source}: added_tokens_decoder.{key:.20}: must map an id to a token object")
        flags = {name: bool(value.get(name, False)) for name in _TOKEN_FLAGS}
        says_all = value.keys() >= set(_TOKEN_FLAGS)
        tokens.append(AddedToken(id=int(key), content=text, **flags, says_all=says_all))
    return tuple(sorted(tokens, key=lambda token: token.id))


def _added_by_content(source: Path, ids: Mapping[str, Any], special: set[str]) -> tuple[AddedToken, ...]:
    for text, token_id in ids.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0 or not text:
            raise ModelLoadError(f"{source}: {text!r:.40}: must map a token to its id (got {token_id!r:.40})")
    tokens = [AddedToken(id=token_id, content=text, special=text in special) for text, token_id in ids.items()]
    return tuple(sorted(tokens, key=lambda token: token.id))


def _default_template(source: Path, value: Any) -> str | None:
    """One template, or a list of named ones of which `default` is taken."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {item.get("name"): item.get("template") for item in value}
        template = named.get("default")
        if template is None or isinstance(template, str):
            return template
    raise ModelLoadError(f'{source}: chat_template: must be a string or a list of {{"name", "template"}} objects')


def _flag(source: Path, config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelLoadError(f"{source}: {key}: must be true or false (got {value!r:.40})")
    return value
