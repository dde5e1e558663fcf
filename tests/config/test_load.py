"""Configuration as a user meets it: precedence, origins, and one line that says what is wrong and what is accepted."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferflux.config.env import warnings_of
from inferflux.config.load import LoadedConfig, check_servable, load_config, located
from inferflux.config.schema import ANY_INDEX, Key, env_name, format_key, schema_leaves
from inferflux.errors import ConfigError
from tests.support.programs import ROOT

FILE = "server.yaml"


@pytest.fixture(autouse=True)
def _work_in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(
    text: str = "", environ: dict[str, str] | None = None, flags: dict[str, str | int] | None = None
) -> LoadedConfig:
    Path(FILE).write_text(text)
    return load_config(Path(FILE), environ or {}, flags or {})


def error(text: str = "", environ: dict[str, str] | None = None, flags: dict[str, str | int] | None = None) -> str:
    with pytest.raises(ConfigError) as info:
        load(text, environ, flags)
    assert "\n" not in str(info.value)
    return str(info.value)


PORT: Key = ("server", "http_port")


@pytest.mark.parametrize(
    ("text", "environ", "flags", "value", "origin"),
    [
        ("", {}, {}, 8080, "default"),
        ("server: {http_port: 1}", {}, {}, 1, FILE),
        ("server: {http_port: 1}", {"INFERFLUX_PORT": "2"}, {}, 2, "INFERFLUX_PORT"),
        ("", {"INFERFLUX_PORT": "2", "INFERFLUX_SERVER__HTTP_PORT": "3"}, {}, 3, "INFERFLUX_SERVER__HTTP_PORT"),
        ("server: {http_port: 1}", {"INFERFLUX_PORT": "2"}, {"--port": "4"}, 4, "--port"),
        ("server: {http_port: 1}", {"INFERFLUX_PORT": ""}, {}, 1, FILE),
    ],
)
def test_precedence_and_origin(text: str, environ: dict[str, str], flags: dict, value: int, origin: str) -> None:
    loaded = load(text, environ, flags)
    assert loaded.config.server.http_port == value
    assert loaded.origin(PORT) == origin


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runtime: {scheduler: {max_batch_size: 0}}", "runtime.scheduler.max_batch_size: must be >= 1 (got 0)"),
        (
            "runtime: {scheduler: {max_batch_size: 5000}}",
            "runtime.scheduler.max_batch_size: must be <= 4096 (got 5000)",
        ),
        (
            "runtime: {scheduler: {max_batch_size: abc}}",
            'runtime.scheduler.max_batch_size: must be an integer (got "abc")',
        ),
        (
            "runtime: {scheduler: {max_batch_size: 1.0}}",
            "runtime.scheduler.max_batch_size: must be an integer (got 1.0)",
        ),
        (
            "runtime: {scheduler: {max_batch_size: true}}",
            "runtime.scheduler.max_batch_size: must be an integer (got true)",
        ),
        ("server: {max_queue: 10000000000}", "server.max_queue: must be <= 2147483647 (got 10000000000)"),
        ("runtime: {schedular: {}}", 'runtime.schedular: unknown key; did you mean "scheduler"?'),
        ("logging: {level: loud}", 'logging.level: must be one of debug, error, info, warning (got "loud")'),
        ("server: {enable_metrics: 1}", "server.enable_metrics: must be true or false (got 1)"),
        ("server: {request_timeout_s: .nan}", "server.request_timeout_s: must be a finite number (got nan)"),
        ("server: {request_timeout_s: .inf}", "server.request_timeout_s: must be a finite number (got inf)"),
        ("server: {request_timeout_s: 0}", "server.request_timeout_s: must be > 0 (got 0)"),
        ("server: {host: 7}", "server.host: must be a string (got 7)"),
        ("server: {host: ''}", "server.host: must not be empty"),
        ("server: {host: a..b}", "server.host: must be an address or a host name"),
        ("server: {cors_origins: x}", 'server.cors_origins: must be a list (got "x")'),
        ("server: {cors_origins: [7]}", "server.cors_origins[0]: must be a string (got 7)"),
        ("server: [1]", "server: must be a mapping of keys to values (got a list)"),
        ("models: [{id: a}, {path: b}]", "models[1].id: is required"),
        ("models: [{}]", "models[0].id: is required"),
        ("models: [{id: a}, {id: a}]", 'models[1].id: must be unique (models[0] has "a" too)'),
        (
            "models: [{id: 'a b'}]",
            'models[0].id: must be letters, digits and . _ : / - (the first a letter or digit) (got "a b")',
        ),
        (
            'models: [{id: "a\\n"}]',
            'models[0].id: must be letters, digits and . _ : / - (the first a letter or digit) (got "a\\n")',
        ),
        (
            "models: [{id: a, default: true}, {id: b, default: true}]",
            "models[1].default: only one model may be the default (models[0] is already)",
        ),
        (
            "server: {cors_origins: [example.org]}",
            "server.cors_origins[0]: must be * or an origin such as https://example.org",
        ),
        ("distributed: {rank: 1}", "distributed.rank: rank must be < world_size (got rank 1, world_size 1)"),
        ("distributed: {backend: mpi}", 'distributed.backend: must be one of gloo, nccl, stub (got "mpi")'),
        (
            "distributed: {world_size: 2, backend: stub}",
            'distributed.backend: must be gloo or nccl with distributed.world_size 2 (got "stub")',
        ),
        (
            "{distributed: {world_size: 2}, models: [{id: a}, {id: b}]}",
            "models: must be one with distributed.world_size 2 (got 2)",
        ),
        ("auth: {api_keys: [{name: a}]}", "auth.api_keys[0]: must have exactly one of key and key_sha256"),
        (
            "auth: {api_keys: [{key: a, scopes: []}]}",
            "auth.api_keys[0].scopes: must name at least one of admin, generate, read",
        ),
        (
            "auth: {oidc_issuer: 'http://id.example.org', oidc_audience: a}",
            "auth.oidc_issuer: must be an https URL without query (http only on a loopback address)",
        ),
        (
            "auth: {oidc_issuer: 'https://id.example.org/?x=1', oidc_audience: a}",
            "auth.oidc_issuer: must be an https URL without query (http only on a loopback address)",
        ),
        (
            "auth: {oidc_issuer: 'https://id.example.org'}",
            "auth.oidc_audience: must be set with auth.oidc_issuer: else other services' tokens would do",
        ),
        ("auth: {api_keys: [{key: a}, {key: a}]}", "auth.api_keys[1]: is the same key as auth.api_keys[0]"),
    ],
)
def test_faulty_file_names_key_and_what_is_accepted(text: str, message: str) -> None:
    assert error(text) == f"{FILE}: {message}"


def test_first_fault_in_the_file_is_reported() -> None:
    assert "server.http_port" in error("server: {http_port: -1}\nruntime: {dtype: x}")


def test_scheduler_sizes_blame_the_key_that_was_set() -> None:
    sizes = "max_batch_tokens must be >= max_batch_size (got max_batch_tokens {}, max_batch_size {})"
    small_budget = error("runtime: {scheduler: {max_batch_tokens: 64}}")
    assert small_budget == f"{FILE}: runtime.scheduler.max_batch_tokens: {sizes.format(64, 128)}"
    many_rows = error(environ={"INFERFLUX_RUNTIME__SCHEDULER__MAX_BATCH_SIZE": "4096"})
    assert many_rows.startswith("INFERFLUX_RUNTIME__SCHEDULER__MAX_BATCH_SIZE: runtime.scheduler.max_batch_size: max_b")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"INFERFLUX_PORT": "x"}, 'INFERFLUX_PORT: server.http_port: must be an integer (got "x")'),
        ({"INFERFLUX_PORT": "70000"}, "INFERFLUX_PORT: server.http_port: must be <= 65535 (got 70000)"),
        (
            {"INFERFLUX_SERVER__MAX_BODY_MB": "nan"},
            "INFERFLUX_SERVER__MAX_BODY_MB: server.max_body_mb: must be a finite number (got nan)",
        ),
        (
            {"INFERFLUX_SERVER__TLS": "x"},
            "INFERFLUX_SERVER__TLS: server.tls: names a section; set one of its keys: enabled, cert_path, key_path",
        ),
        (
            {"INFERFLUX_MODELS": "[{"},
            "INFERFLUX_MODELS: models: must be a JSON list (Expecting property name enclosed in double quotes)",
        ),
        (
            {"INFERFLUX_MODELS": '[{"id":"a","id":"b"}]'},
            "INFERFLUX_MODELS: models: must be a JSON list (a key is given twice)",
        ),
        ({"INFERFLUX_MODELS__1__ID": "a"}, "INFERFLUX_MODELS__1__ID: models: has only 0 elements"),
        (
            {"INFERFLUX_SERVER__HTTP_PROT": "1"},
            'INFERFLUX_SERVER__HTTP_PROT: unknown key; did you mean "INFERFLUX_SERVER__HTTP_PORT"?',
        ),
        (
            {"INFERFLUX_server__HOST": "a"},
            'INFERFLUX_server__HOST: unknown key; did you mean "INFERFLUX_SERVER__HOST"?',
        ),
        ({"RANK": "x"}, 'RANK: distributed.rank: must be an integer (got "x")'),
    ],
)
def test_faulty_variable_is_named(environ: dict[str, str], message: str) -> None:
    assert error(environ=environ) == message


def test_faulty_flag_is_named() -> None:
    assert error(flags={"--port": "-1"}) == "--port: server.http_port: must be >= 0 (got -1)"


def test_environment_reads_each_type() -> None:
    config = load(
        environ={
            "INFERFLUX_SERVER__ENABLE_METRICS": "No",
            "INFERFLUX_SERVER__REQUEST_TIMEOUT_S": "1e2",
            "INFERFLUX_SERVER__CORS_ORIGINS": "http://a, http://b",
            "INFERFLUX_RUNTIME__PAGED_KV__DEVICE_MEMORY_FRACTION": "null",
            "INFERFLUX_RUNTIME__CUDA_GRAPHS": "off",
            "INFERFLUX_MODELS": json.dumps([{"id": "a"}, {"id": "b", "path": "/b"}]),
            "INFERFLUX_MODELS__1__MAX_MODEL_LEN": "128",
            "INFERFLUX_MODELS__2__ID": "c",
        }
    ).config
    assert config.server.enable_metrics is False
    assert config.server.request_timeout_s == 100.0
    assert config.server.cors_origins == ("http://a", "http://b")
    assert config.runtime.paged_kv.device_memory_fraction is None
    assert config.runtime.cuda_graphs == "off"
    assert [(model.id, model.path, model.max_model_len) for model in config.models] == [
        ("a", None, None),
        ("b", "/b", 128),
        ("c", None, None),
    ]


def test_api_keys_from_the_environment_replace_the_file() -> None:
    loaded = load("auth: {api_keys: [{key: of-the-file}]}", {"INFERFLUX_API_KEYS": "k1:read+admin, k2:generate,k3,"})
    keys = [(entry.key, entry.scopes) for entry in loaded.config.auth.api_keys]
    assert keys == [("k1", ("read", "admin")), ("k2", ("generate",)), ("k3", ("generate", "read"))]
    assert loaded.origin(("auth", "api_keys", 0, "key")) == "INFERFLUX_API_KEYS"


def test_a_secret_out_of_a_file_may_end_its_line() -> None:
    (key,) = load(environ={"INFERFLUX_API_KEYS": "k1:read,\r\n"}).config.auth.api_keys
    assert (key.key, key.scopes) == ("k1", ("read",))


def test_torchrun_fills_what_ours_leaves_unset() -> None:
    loaded = load(environ={"RANK": "3", "WORLD_SIZE": "1", "MASTER_PORT": "29600", "INFERFLUX_DIST_RANK": "0"})
    assert (loaded.config.distributed.rank, loaded.origin(("distributed", "rank"))) == (0, "INFERFLUX_DIST_RANK")
    assert loaded.config.distributed.master_port == 29600


@pytest.mark.parametrize(
    ("text", "value", "models"),
    [
        ("", "/m/Qwen 2.5", [("Qwen-2.5", "/m/Qwen 2.5", True)]),
        ("", "stub", [("inferflux-demo", "stub", True)]),
        ("models: [{id: a, path: x}, {id: b}]", "/m", [("a", "/m", False), ("b", None, False)]),
        ("models: [{id: a}, {id: b, default: true}]", "/m", [("a", None, False), ("b", "/m", True)]),
    ],
)
def test_model_path_is_the_default_models(text: str, value: str, models: list[tuple[str, str | None, bool]]) -> None:
    config = load(text, {"INFERFLUX_MODEL_PATH": value}).config
    assert [(model.id, model.path, model.default) for model in config.models] == models


@pytest.mark.parametrize("text", ["", "# nothing\n", "server:\n", "server: {}\nmodels: []\n"])
def test_empty_sections_are_defaults(text: str) -> None:
    assert load(text).config == load_config(None, {}, {}).config


def test_kubernetes_service_links_are_no_configuration() -> None:
    links = {
        "INFERFLUX_PORT": "tcp://10.0.0.7:80",
        "INFERFLUX_SERVICE_HOST": "10.0.0.7",
        "INFERFLUX_SERVICE_PORT_HTTP": "80",
        "INFERFLUX_PORT_80_TCP_ADDR": "10.0.0.7",
        "INFERFLUX_BLUE_PORT": "tcp://10.0.0.8:80",
    }
    loaded = load(environ=links)
    assert loaded.config.server.http_port == 8080
    assert loaded.warnings == ()


def test_only_a_port_of_kubernetes_is_passed_over() -> None:
    """A guardrail with a mistyped address must stop the start, not be left out."""
    with pytest.raises(ConfigError, match=r"INFERFLUX_OPA_ENDPOINT: guardrails\.opa_endpoint: must be an http"):
        load(environ={"INFERFLUX_OPA_ENDPOINT": "tcp://opa:8181"})


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("INFERFLUX_HOST", "server.host"),
        ("INFERFLUX_MODEL_PATH", "models[0].path"),
        ("INFERFLUX_GUARDRAILS__BLOCKLIST", "guardrails.blocklist[0]"),
    ],
)
def test_what_is_no_text_is_refused_before_something_stumbles_over_it(name: str, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(environ={name: os.fsdecode(b"caf\xe9")})
    assert str(refused.value) == f"{name}: {key}: must be valid Unicode text"


def test_unknown_short_name_is_a_warning() -> None:
    (warning,) = load(environ={"INFERFLUX_MODEL_PTH": "x"}).warnings
    assert warning == 'INFERFLUX_MODEL_PTH: unknown variable, ignored; did you mean "INFERFLUX_MODEL_PATH"?'


def test_names_that_our_own_scripts_read_are_no_slip_of_the_hand() -> None:
    scripts = [*(ROOT / "scripts").glob("*.sh"), ROOT / "deploy" / "docker" / "entrypoint.sh"]
    names = {name for path in scripts for name in re.findall(r"\$\{(INFERFLUX_\w+)|(INFERFLUX_\w+)=", path.read_text())}
    read = {one for pair in names for one in pair if one}
    assert "INFERFLUX_CONSTRAINTS" in read
    assert "INFERFLUX_STATE" in read
    assert warnings_of(dict.fromkeys(read, "x")) == []


SECRET = "s3cret-Value"


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        (f"auth: {{api_keys: [{SECRET}]}}", {}),
        (f"auth: {{api_keys: {SECRET}}}", {}),
        (f"auth: {SECRET}", {}),
        (f"auth: {{api_keys: [{{key: '{SECRET} x'}}]}}", {}),
        (f"auth: {{api_keys: [{{key: [{SECRET}]}}]}}", {}),
        (f"auth: {{api_keys: [{{key_sha256: {SECRET}}}]}}", {}),
        (f"auth: {{api_keys: [{{key: {SECRET}}}, {{key: {SECRET}}}]}}", {}),
        ("", {"INFERFLUX_API_KEYS": f"key:{SECRET}"}),
        ("", {"INFERFLUX_API_KEYS": f"{SECRET}:nonsense"}),
        ("", {"INFERFLUX_API_KEYS": f"{SECRET},{SECRET}"}),
        ("", {"INFERFLUX_AUTH__API_KEYS": SECRET}),
        ("", {"INFERFLUX_PORT": f"http://user:{SECRET}@host"}),
    ],
)
def test_errors_hold_no_secret(text: str, environ: dict[str, str]) -> None:
    assert SECRET not in error(text, environ)


def test_errors_cannot_forge_lines() -> None:
    assert error('"server\\n\\e[31m": 1').startswith(f"{FILE}: server\\n\\x1b[31m: unknown key")


@pytest.mark.parametrize(
    ("settings", "beside", "words"),
    [
        ("method: draft_model", "", "draft_model: must be set where method is draft_model"),
        ("draft_model: d", ", paged_kv: {cpu_pages: 4}", "draft_model: must be unset with runtime.paged_kv.cpu_pages"),
        ("draft_model: d", ", nvme_offload: {path: f}", "draft_model: must be unset with runtime.paged_kv.cpu_pages"),
    ],
)
def test_draft_models_have_their_conditions(settings: str, beside: str, words: str) -> None:
    text = f"runtime: {{speculative_decoding: {{enabled: true, {settings}}}{beside}}}"
    assert f"runtime.speculative_decoding.{words}" in error(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            f"{FILE}: auth.api_keys: needs at least one key (or INFERFLUX_API_KEYS), or auth.allow_anonymous: true on",
        ),
        (
            "auth: {allow_anonymous: true}\nserver: {host: 0.0.0.0}",
            f"{FILE}: auth.allow_anonymous: must be false unless",
        ),
        ("auth: {allow_anonymous: true}\nserver: {host: '::'}", f"{FILE}: auth.allow_anonymous: must be false unless"),
        (
            "auth: {allow_anonymous: true, api_keys: [{key: a}]}\nserver: {host: example.org}",
            f"{FILE}: auth.allow_anonymous: must be false unless",
        ),
    ],
)
def test_open_servers_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as info:
        check_servable(load(text))
    assert str(info.value).startswith(message)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_may_be_open(host: str) -> None:
    check_servable(load(f"auth: {{allow_anonymous: true}}\nserver: {{host: '{host}'}}"))


def test_keys_make_any_host_servable() -> None:
    check_servable(load("auth: {api_keys: [{key: a}]}\nserver: {host: 0.0.0.0}"))


def test_a_policy_store_may_hold_the_keys() -> None:
    check_servable(load("policy: {store: policy.enc}"))


def test_a_passphrase_without_a_store_is_warned_of() -> None:
    environ = {"INFERFLUX_POLICY_PASSPHRASE": SECRET}
    (warning,) = load("", environ).warnings
    assert warning.startswith("INFERFLUX_POLICY_PASSPHRASE: is set, but policy.store is not")
    assert SECRET not in warning
    assert load("policy: {store: policy.enc}", environ).warnings == ()


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        ("server: {tls: {cert_path: c.pem, key_path: k.pem}}", "server.tls.enabled: false, so the server speaks plain"),
        ("server: {tls: {enabled: true, cert_path: c.pem, key_path: k.pem}}", None),
        ("auth: {oidc_audience: a}", "auth.oidc_issuer: not set"),
        ("auth: {oidc_scope_map: {x: read}}", "auth.oidc_issuer: not set"),
        ("auth: {oidc_issuer: 'https://id.example.org', oidc_audience: a, oidc_scope_map: {x: read}}", None),
    ],
)
def test_settings_without_the_one_that_they_serve_are_a_warning(text: str, begins: str | None) -> None:
    assert [warning[: len(begins or "")] for warning in load(text).warnings] == [begins] * (begins is not None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "models: [{id: m}]\nadapters: [{id: m, path: p, base: m}]",
            'adapters[0].id: must be unique (models[0] has "m" too)',
        ),
        (
            "models: [{id: m}]\nadapters: [{id: a, path: p, base: m}, {id: a, path: q, base: m}]",
            'adapters[1].id: must be unique (adapters[0] has "a" too)',
        ),
        (
            "models: [{id: mod}]\nadapters: [{id: a, path: p, base: mode}]",
            'adapters[0].base: must be the id of a model: mod (got "mode"; did you mean "mod"?)',
        ),
        (
            "adapters: [{id: a, path: p, base: m}]",
            'adapters[0].base: must be the id of a model: inferflux-demo (got "m")',
        ),
        ("adapters: [{id: a, path: p}]", "adapters[0].base: is required"),
    ],
)
def test_adapters_have_names_of_their_own_and_a_model(text: str, message: str) -> None:
    assert error(text) == f"{FILE}: {message}"


@pytest.mark.parametrize(
    "text",
    [
        "models: [{id: m}]\nadapters: [{id: a, path: p, base: m}, {id: b, path: p, base: m}]",
        "adapters: [{id: a, path: p, base: inferflux-demo}]",
        "registry: {path: r}\nadapters: [{id: a, path: p, base: later}]",
        "policy: {store: s}\nadapters: [{id: a, path: p, base: later}]",
    ],
)
def test_a_model_to_adapt_may_come_later(text: str) -> None:
    assert load(text).config.adapters


def fault_of(text: str, environ: dict[str, str]) -> str:
    """The error's text, or an empty string."""
    try:
        load(text, environ)
    except ConfigError as error:
        return str(error)
    return ""


def nest(key: Key, value: object) -> object:
    """`value` in the mappings and lists that lead to `key`."""
    for part in reversed(key):
        value = [value] if isinstance(part, int) else {part: value}
    return value


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("auto")
JUNK = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(SCALARS, inner, max_size=2))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leaf=st.sampled_from([key for key, _ in schema_leaves()]),
    depth=st.integers(0, 4),
    junk=JUNK,
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9),
)
def test_any_input_gives_a_config_or_one_line(leaf: Key, depth: int, junk: object, text: str) -> None:
    key = tuple(0 if part == ANY_INDEX else part for part in leaf)
    assert "\n" not in fault_of(json.dumps(nest(key[:depth], junk)), {})
    assert "\n" not in fault_of("", {env_name(key): text})


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("policy.store: p: damaged", "INFERFLUX_POLICY_STORE: policy.store: p: damaged"),
        ("models: m: no such folder", "c.yaml: models: m: no such folder"),
        ("models[].path: no such folder", "c.yaml: models[].path: no such folder"),
        ("models[].dtype: one of two files", "models[].dtype: one of two files"),
        ("server.host: is a default", "server.host: is a default"),
        ("no key here", "no key here"),
    ],
)
def test_late_errors_name_where_their_key_was_set(tmp_path: Path, message: str, line: str) -> None:
    models = "[{id: m, path: a, dtype: float32}, {id: n, path: b, dtype: float32, default: true}]"
    (tmp_path / "c.yaml").write_text(f"models: {models}")
    environ = {"INFERFLUX_POLICY_STORE": "p", "INFERFLUX_MODELS__1__DTYPE": "bfloat16"}
    loaded = load_config(tmp_path / "c.yaml", environ, {})
    assert str(located(loaded, ConfigError(message))).removeprefix(f"{tmp_path}/") == line


def test_config_is_frozen_and_keys_read_back() -> None:
    loaded = load("models: [{id: a}]")
    with pytest.raises(AttributeError):
        loaded.config.server.host = "x"  # type: ignore[misc]
    assert [format_key(key) for key in loaded.origins] == ["models[0].id"]
