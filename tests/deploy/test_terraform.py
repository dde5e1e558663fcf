"""The Terraform module, as far as it can be known without Terraform: its language parses, its names agree, and the
files that it makes for the machine are what cloud-init, systemd, the shell and the server accept."""

import re
import shutil
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml

from inferflux.config.load import load_config
from tests.support.programs import ROOT, called

MODULE = ROOT / "deploy" / "terraform"
TEMPLATES = MODULE / "templates"


def read_module() -> dict[str, dict[str, Any]]:
    """Returns the blocks of all files by kind and name (`resource` and `data` by type.name)."""
    blocks: dict[str, dict[str, Any]] = {"variable": {}, "output": {}, "resource": {}, "data": {}, "locals": {}}
    for path in sorted(MODULE.glob("*.tf")):
        with path.open() as stream:
            parsed = hcl2.load(stream)
        for kind in ("variable", "output"):
            for block in parsed.get(kind, []):
                blocks[kind].update({name.strip('"'): body for name, body in block.items()})
        for kind in ("resource", "data"):
            for block in parsed.get(kind, []):
                for type_, named in block.items():
                    blocks[kind].update({f"{type_}.{name}".replace('"', ""): body for name, body in named.items()})
        for block in parsed.get("locals", []):
            blocks["locals"].update(block)
    return blocks


def source() -> str:
    return "\n".join(path.read_text() for path in sorted(MODULE.glob("*.tf")))


def test_variables_used_are_variables_declared_and_the_reverse() -> None:
    assert set(re.findall(r"\bvar\.([a-z_]+)", source())) == set(read_module()["variable"])


def test_locals_resources_and_data_agree() -> None:
    blocks, text = read_module(), source()
    defined = {name for name in blocks["locals"] if not name.startswith("__")}
    assert set(re.findall(r"\blocal\.([a-z_]+)", text)) == defined
    data = set(re.findall(r"\bdata\.(aws_[a-z_]+\.[a-z_]+)", text))
    assert data == set(blocks["data"])
    resources = set(re.findall(r"(?<![.\w])((?:aws|random)_[a-z_]+\.[a-z_]+)\b", text))
    assert resources - set(blocks["resource"]) == set()


def test_every_variable_says_what_it_is_and_secrets_are_sensitive() -> None:
    blocks = read_module()
    for name, body in blocks["variable"].items():
        assert body.get("description"), name
        assert body.get("type"), name
    for name in ("api_keys", "policy_passphrase", "tls_key_pem"):
        assert blocks["variable"][name]["sensitive"] is True
    assert blocks["output"]["api_key"]["sensitive"] is True
    assert "default" not in blocks["variable"]["allowed_cidrs"], "nobody may open the API to the world by omission"


def test_what_is_called_nonsensitive_is_sensitive_before() -> None:
    """Terraform 1.6, which the module says it takes, refuses the function on anything else."""
    sensitive = {name for name, body in read_module()["variable"].items() if body.get("sensitive")}
    for argument in re.findall(r"nonsensitive\((.*?)\)", source()):
        assert set(re.findall(r"var\.([a-z_]+)", argument)) & sensitive, argument


def test_a_certificate_alone_is_no_tls() -> None:
    """Else a secret without a value is what Terraform complains of, and never that the two go together."""
    assert {"tls_cert_pem", "tls_key_pem"} <= set(re.findall(r"var\.([a-z_]+)", read_module()["locals"]["has_tls"]))


def test_user_data_holds_no_secret() -> None:
    """User data can be read by whoever may describe the machine."""
    user_data = source().split("user_data = templatefile", 1)[1].split("root_block_device", 1)[0]
    assert "local.api_keys" not in user_data
    assert "tls_key_pem" not in user_data
    assert "policy" not in user_data


def test_machine_is_hardened() -> None:
    server = read_module()["resource"]["aws_instance.server"]
    assert server["metadata_options"][0]["http_tokens"].strip('"') == "required"
    assert server["root_block_device"][0]["encrypted"] is True


def render(name: str, values: dict[str, Any]) -> str:
    """Renders a template's `%{ if }`, `%{ for }` and `${}` as far as these templates use them, with `~}` trimming."""
    lines = (TEMPLATES / name).read_text().splitlines(keepends=True)
    return "".join(_render_lines(lines, values))


def _render_lines(lines: list[str], values: dict[str, Any]) -> list[str]:
    rendered: list[str] = []
    index = 0
    while index < len(lines):
        directive = re.fullmatch(r"%\{ (if|for) (.+) ~\}\n", lines[index])
        if directive is None:
            rendered.append(re.sub(r"\$\{([a-z_]+)\}", lambda match: str(values[match[1]]), lines[index]))
            index += 1
            continue
        end, other = _block_end(lines, index)
        body, otherwise = lines[index + 1 : other or end], lines[other + 1 : end] if other else []
        if directive[1] == "for":
            variable, _, name = directive[2].split()
            for value in values[name]:
                rendered += _render_lines(body, {**values, variable: value})
        else:
            rendered += _render_lines(body if _holds(directive[2], values) else otherwise, values)
        index = end + 1
    return rendered


def _block_end(lines: list[str], start: int) -> tuple[int, int | None]:
    depth, other = 0, None
    for index in range(start, len(lines)):
        if lines[index].startswith(("%{ if", "%{ for")):
            depth += 1
        elif lines[index].startswith("%{ else") and depth == 1:
            other = index
        elif lines[index].startswith("%{ end"):
            depth -= 1
            if depth == 0:
                return index, other
    raise AssertionError("a block of the template does not end")


def _holds(condition: str, values: dict[str, Any]) -> bool:
    name, *comparison = condition.split()
    if not comparison:
        return bool(values[name])
    wanted = comparison[1].strip('"')
    return bool((values[name] == wanted) == (comparison[0] == "=="))


def indent(text: str) -> str:
    return text.replace("\n", "\n      ")


def cloud_init(*, has_model: bool, has_tls: bool) -> dict[str, Any]:
    secrets = ["INFERFLUX_API_KEYS", "INFERFLUX_POLICY_PASSPHRASE", *(["TLS_KEY_PEM"] if has_tls else [])]
    config = {"port": 8443, "has_model": has_model, "model_id": "qwen3", "has_tls": has_tls}
    text = render(
        "cloud-init.yaml.tftpl",
        {
            "unit": indent((TEMPLATES / "inferflux.service").read_text()),
            "fetch_secrets": indent(
                render("fetch-secrets.sh.tftpl", {"name": "llm", "region": "eu-west-1", "secrets": secrets})
            ),
            "config": indent(render("server.yaml.tftpl", config)),
            "tls_cert": indent("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n") if has_tls else "",
            "package": "inferflux==0.1.0",
            "model": "s3://models/qwen3/" if has_model else "",
            "region": "eu-west-1",
        },
    )
    assert text.startswith("#cloud-config\n")
    parsed: dict[str, Any] = yaml.safe_load(text)
    return parsed


def written_files(has_model: bool, has_tls: bool) -> dict[str, str]:
    document = cloud_init(has_model=has_model, has_tls=has_tls)
    return {file["path"]: file["content"] for file in document["write_files"]}


@pytest.mark.parametrize("has_model", [False, True])
@pytest.mark.parametrize("has_tls", [False, True])
def test_the_machines_configuration_is_one_the_server_takes(has_model: bool, has_tls: bool, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(written_files(has_model, has_tls)["/etc/inferflux/server.yaml"])
    config = load_config(file, {"INFERFLUX_API_KEYS": "k:generate"}, {}).config
    assert config.server.http_port == 8443
    assert [model.id for model in config.models] == (["qwen3"] if has_model else [])
    assert config.server.tls.enabled is has_tls


def test_fetching_secrets_is_sound_shell_and_quotes_what_it_gets(tmp_path: Path) -> None:
    script = tmp_path / "fetch.sh"
    text = written_files(True, True)["/usr/local/bin/inferflux-fetch-secrets"].replace("/run/inferflux", str(tmp_path))
    script.write_text(text)
    called("sh", "-n", script)
    aws = tmp_path / "aws"
    aws.write_text('#!/bin/sh\nprintf %s "it\'s \\$HOME; \\`date\\` $7"\n')
    aws.chmod(0o755)
    called("env", f"PATH={tmp_path}:/usr/bin:/bin", "sh", script)
    environment = tmp_path / "environment"
    assert environment.stat().st_mode & 0o077 == 0
    shown = called("sh", "-c", f'. {environment}; printf %s "$INFERFLUX_API_KEYS"')
    assert shown == "it's $HOME; `date` /llm/INFERFLUX_API_KEYS"
    assert (tmp_path / "tls.key").read_text().endswith("/llm/TLS_KEY_PEM")


def test_unit_is_one_systemd_takes(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "inferflux.service"
    text = written_files(True, True)["/etc/systemd/system/inferflux.service"]
    # The programs and the user exist on the machine to be, not here.
    text = text.replace("/usr/local/bin/inferflux-fetch-secrets", "/bin/true").replace("User=inferflux\n", "")
    unit.write_text(text.replace("Group=inferflux\n", ""))
    said = called("systemd-analyze", "verify", "--man=no", unit)
    assert "inferflux.service" not in said


def test_first_boot_installs_before_it_starts() -> None:
    commands = [" ".join(command) for command in cloud_init(has_model=True, has_tls=False)["runcmd"]]
    install = next(index for index, command in enumerate(commands) if "inferflux==0.1.0" in command)
    sync = next(index for index, command in enumerate(commands) if "s3://models/qwen3/" in command)
    start = next(index for index, command in enumerate(commands) if "enable --now" in command)
    compiled = next(index for index, command in enumerate(commands) if command.endswith("inferflux kernels build"))
    assert install < compiled < start
    assert sync < start


def test_machine_can_compile_what_it_computes_with() -> None:
    """As the image's build: without a compiler a CPU is served by torch alone, and Triton serves nothing."""
    packages = cloud_init(has_model=False, has_tls=False)["packages"]
    assert {"g++", "python3-dev"} <= set(packages)


def test_machine_installs_no_strangers_package() -> None:
    """No index has InferFlux: a name there would be nobody's, or somebody else's."""
    assert "default" not in read_module()["variable"]["package"]
    assert "git" in cloud_init(has_model=False, has_tls=False)["packages"]
    for guide in (MODULE / "README.md", ROOT / "docs" / "Deployment.md"):
        for command in re.findall(r"terraform [^\n]*apply (?:[^\n]*\\\n)*[^\n]*", guide.read_text()):
            assert "-var package=" in command
