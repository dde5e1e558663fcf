"""The Helm chart, rendered by helm itself and checked against Kubernetes' own schemas."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import msgspec
import pytest
import yaml

from inferflux.config import Config
from inferflux.config.load import load_config
from tests.support.programs import ROOT, call, called, program

CHART = ROOT / "charts" / "inferflux"
EXAMPLE = ROOT / "deploy" / "values.yaml"
KUBERNETES = "1.30"
CUSTOM_KINDS = ("ServiceMonitor", "ScaledObject")
CASES = {
    "defaults": {},
    "gpu": {"gpu": {"count": 1}},
    "tensor_parallel": {"gpu": {"count": 4}, "persistence": {"enabled": True, "storageClass": "fast"}},
    "hpa": {"autoscaling": {"enabled": True}},
    "keda": {"autoscaling": {"enabled": True, "type": "keda"}, "metrics": {"serviceMonitor": {"enabled": True}}},
    "edges": {
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "annotations": {"a/b": "c"},
            "hosts": [{"host": "llm.example.org", "paths": ["/"]}],
            "tls": [{"secretName": "llm", "hosts": ["llm.example.org"]}],
        },
        "secrets": {"existingSecret": "mine"},
        "image": {"digest": "sha256:" + "0" * 64, "pullSecrets": ["registry"]},
        "modelsVolume": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        "env": [{"name": "INFERFLUX_LOGGING__LEVEL", "value": "debug"}],
        "envFrom": [{"secretRef": {"name": "more"}}],
        "nodeSelector": {"disk": "nvme"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "networkPolicy": {"ingressFrom": [{"podSelector": {}}], "egress": [{"ports": [{"port": 443}]}]},
        "serviceAccount": {"create": False, "name": "mine"},
        "podDisruptionBudget": {"enabled": False},
    },
}


def helm() -> str:
    return program("helm", "scripts/test-tools.sh brings it")


def render(values: dict[str, Any], folder: Path, *files: Path) -> dict[str, dict[str, Any]]:
    """Returns the rendered objects by kind; the headless service and the test's pod apart, under their own names."""
    own = folder / "values.yaml"
    own.write_text(yaml.safe_dump(values))
    sources = [argument for file in (*files, own) for argument in ("-f", str(file))]
    text = called(helm(), "template", "release", str(CHART), "--kube-version", f"{KUBERNETES}.0", *sources)
    objects = [one for one in yaml.safe_load_all(text) if one is not None]
    names = {"release-inferflux-headless": "Headless", "release-inferflux-test": "Test"}
    return {names.get(one["metadata"]["name"], one["kind"]): one for one in objects}


def pod(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    workload = objects.get("StatefulSet") or objects["Deployment"]
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("name", CASES)
def test_every_object_meets_kubernetes_schema(name: str, tmp_path: Path) -> None:
    for kind, one in render(CASES[name], tmp_path).items():
        if kind not in CUSTOM_KINDS:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_lint_finds_nothing() -> None:
    called(helm(), "lint", "--strict", str(CHART), "-f", str(EXAMPLE))


@pytest.mark.parametrize("source", ["values", "example"])
def test_rendered_configuration_is_one_the_server_takes(source: str, tmp_path: Path) -> None:
    objects = render({}, tmp_path, *([EXAMPLE] if source == "example" else []))
    file = tmp_path / "server.yaml"
    file.write_text(objects["ConfigMap"]["data"]["server.yaml"])
    config = load_config(file, {"INFERFLUX_API_KEYS": "key:generate"}, {}).config
    assert isinstance(config, Config)
    container = pod(objects)["containers"][0]
    assert container["ports"][0]["containerPort"] == config.server.http_port
    assert config.server.host == "0.0.0.0"
    assert config.policy.store is not None
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(Path(config.policy.store).parent) in mounts


def test_the_pod_outlives_the_drain(tmp_path: Path) -> None:
    values = {"config": {"server": {"drain_timeout_s": 90.5}}, "preStopSeconds": 7}
    spec = pod(render(values, tmp_path))
    assert spec["terminationGracePeriodSeconds"] >= 7 + 91
    assert spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]


def test_container_is_locked_down(tmp_path: Path) -> None:
    spec = pod(render({}, tmp_path))
    container = spec["containers"][0]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert spec["automountServiceAccountToken"] is False
    # Otherwise Kubernetes sets INFERFLUX_PORT=tcp://... for a service called inferflux.
    assert spec["enableServiceLinks"] is False


def test_probes_ask_the_right_routes(tmp_path: Path) -> None:
    container = pod(render({"probes": {"startup": 60}}, tmp_path))["containers"][0]
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] == 60


def test_whoever_asks_speaks_the_servers_protocol(tmp_path: Path) -> None:
    """A probe by plain HTTP would find a server with a certificate dead, again and again."""
    tls = {"enabled": True, "cert_path": "/etc/inferflux-tls/tls.crt", "key_path": "/etc/inferflux-tls/tls.key"}
    values = {
        "config": {"server": {"tls": tls}},
        "extraVolumes": [{"name": "tls", "secret": {"secretName": "inferflux-tls"}}],
        "extraVolumeMounts": [{"name": "tls", "mountPath": "/etc/inferflux-tls", "readOnly": True}],
        "metrics": {"serviceMonitor": {"enabled": True, "tlsConfig": {"serverName": "llm"}}},
    }
    for given, scheme in ((values, "https"), ({"metrics": {"serviceMonitor": {"enabled": True}}}, "http")):
        objects = render(given, tmp_path)
        container = pod(objects)["containers"][0]
        probes = [container[f"{name}Probe"]["httpGet"]["scheme"] for name in ("startup", "readiness", "liveness")]
        assert probes == [scheme.upper()] * 3
        assert objects["ServiceMonitor"]["spec"]["endpoints"][0]["scheme"] == scheme
        assert f'"{scheme}://release-inferflux:80/readyz"' in objects["Test"]["spec"]["containers"][0]["command"][-1]
    rendered = render(values, tmp_path)
    assert {"name": "tls", "secret": {"secretName": "inferflux-tls"}} in pod(rendered)["volumes"]
    for kind in ("Deployment", "Test"):
        kubernetes_validate.validate(rendered[kind], KUBERNETES, strict=True)


def test_the_tests_pod_pulls_its_image_as_the_others_do(tmp_path: Path) -> None:
    objects = render({"image": {"pullSecrets": ["registry"]}}, tmp_path)
    for spec in (pod(objects), objects["Test"]["spec"]):
        assert spec["imagePullSecrets"] == [{"name": "registry"}]


def test_names_of_a_long_release_fit() -> None:
    """63 characters hold a service's name, and a StatefulSet's with the hash that Kubernetes puts behind it."""
    arguments = ("--kube-version", f"{KUBERNETES}.0", "--set", "persistence.enabled=true")
    text = called(helm(), "template", "r" * 53, str(CHART), *arguments)
    for one in filter(None, yaml.safe_load_all(text)):
        hash_length = len("-0123456789") if one["kind"] == "StatefulSet" else 0
        assert len(one["metadata"]["name"]) + hash_length <= 63, one["kind"]


def test_alert_rules_know_the_job_whatever_the_release_is_called(tmp_path: Path) -> None:
    objects = render({"metrics": {"serviceMonitor": {"enabled": True}}}, tmp_path)
    label = objects["ServiceMonitor"]["spec"]["jobLabel"]
    alerts = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()
    assert f'up{{job="{objects["Service"]["metadata"]["labels"][label]}"}}' in alerts


def test_several_gpus_are_split_by_torchrun(tmp_path: Path) -> None:
    container = pod(render({"gpu": {"count": 4}}, tmp_path))["containers"][0]
    assert container["command"][:4] == ["torchrun", "--standalone", "--nproc-per-node", "4"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert {"name": "INFERFLUX_DIST_BACKEND", "value": "nccl"} in container["env"]


def test_copies_follow_the_queue(tmp_path: Path) -> None:
    """By both ways; and what docs/distributed.md shows for KEDA is what the chart makes, by the same keys."""
    hpa = render(CASES["hpa"], tmp_path)["HorizontalPodAutoscaler"]["spec"]
    assert hpa["metrics"][0]["pods"]["metric"] == {"name": "inferflux_queue_depth"}
    keda = render(CASES["keda"], tmp_path)["ScaledObject"]["spec"]
    assert hpa["behavior"] == keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert keda["triggers"][0]["metadata"]["query"].startswith("sum(inferflux_queue_depth{")
    page = (ROOT / "docs" / "distributed.md").read_text()
    (shown,) = (yaml.safe_load(text)["spec"] for text in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL))
    assert paths_of(shown) | {"scaleTargetRef.apiVersion", "scaleTargetRef.kind"} == paths_of(keda)
    assert shown["triggers"][0]["metadata"].keys() == keda["triggers"][0]["metadata"].keys()


def test_the_route_of_the_gateway_api_leads_to_the_service(tmp_path: Path) -> None:
    text = called(helm(), "template", "inferflux", str(CHART), "--kube-version", f"{KUBERNETES}.0")
    (service,) = (one for one in yaml.safe_load_all(text) if one and one["kind"] == "Service")
    route = next(yaml.safe_load_all((ROOT / "deploy" / "gateway-api" / "inferflux.yaml").read_text()))
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert backend == {"name": service["metadata"]["name"], "port": service["spec"]["ports"][0]["port"]}


def test_persistence_makes_a_claim_for_each_copy(tmp_path: Path) -> None:
    objects = render({"persistence": {"enabled": True, "size": "7Gi"}}, tmp_path)
    (claim,) = objects["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "7Gi"
    assert objects["StatefulSet"]["spec"]["serviceName"] == objects["Headless"]["metadata"]["name"]
    assert "Deployment" not in objects


def test_secret_is_made_only_when_none_is_named(tmp_path: Path) -> None:
    made = render({"secrets": {"apiKeys": "k:generate"}}, tmp_path)
    assert set(made["Secret"]["data"]) == {"api-keys", "policy-passphrase"}
    named = render({"secrets": {"existingSecret": "mine"}}, tmp_path)
    assert "Secret" not in named
    sources = [one["valueFrom"]["secretKeyRef"]["name"] for one in pod(named)["containers"][0]["env"]]
    assert sources == ["mine", "mine"]


def test_keys_in_the_configuration_are_the_keys_there_are(tmp_path: Path) -> None:
    """INFERFLUX_API_KEYS takes the place of the whole list: with it, none of these would work, and one nobody asked for
    would administer the server."""
    config = {"auth": {"api_keys": [{"name": "chat-app", "key_sha256": "0" * 64}]}}
    objects = render({"config": config}, tmp_path)
    names = [one["name"] for one in pod(objects)["containers"][0]["env"]]
    assert names == ["INFERFLUX_POLICY_PASSPHRASE"]
    assert set(objects["Secret"]["data"]) == {"policy-passphrase"}
    file = tmp_path / "server.yaml"
    file.write_text(objects["ConfigMap"]["data"]["server.yaml"])
    assert [key.name for key in load_config(file, {}, {}).config.auth.api_keys] == ["chat-app"]


def test_keys_in_two_places_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    keys = [{"name": "chat-app", "key_sha256": "0" * 64}]
    file.write_text(yaml.safe_dump({"config": {"auth": {"api_keys": keys}}, "secrets": {"apiKeys": "k:generate"}}))
    result = call(helm(), "template", "r", str(CHART), "--kube-version", f"{KUBERNETES}.0", "-f", str(file))
    assert result.returncode != 0
    assert "config.auth.api_keys" in result.stderr


def test_a_changed_configuration_rolls_the_pods(tmp_path: Path) -> None:
    def checksum(level: str) -> str:
        objects = render({"config": {"logging": {"level": level}}}, tmp_path)
        value: str = objects["Deployment"]["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
        return value

    assert checksum("info") != checksum("debug")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"gpu": {"count": -1}}, "gpu.count"),
        ({"autoscaling": {"minReplicas": 0}}, "autoscaling.minReplicas"),  # no copy has a queue that calls one back
        ({"secrets": {"apiKeys": "a b"}}, "secrets.apiKeys"),
        ({"config": {"server": {"http_port": 0}}}, "config.server.http_port"),
    ],
)
def test_schema_refuses(values: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    result = call(helm(), "template", "r", str(CHART), "--kube-version", f"{KUBERNETES}.0", "-f", str(file))
    assert result.returncode != 0
    assert complaint in result.stderr


def paths_of(values: dict[str, Any], prefix: str = "") -> set[str]:
    """Returns the paths of the leaves; an empty mapping is a leaf."""
    found: set[str] = set()
    for name, value in values.items():
        path = f"{prefix}{name}"
        found |= paths_of(value, path + ".") if isinstance(value, dict) and value else {path}
    return found


def test_values_used_are_values_defined_and_the_reverse() -> None:
    defined = paths_of(yaml.safe_load((CHART / "values.yaml").read_text()))
    templates = "\n".join(path.read_text() for path in sorted((CHART / "templates").rglob("*")) if path.is_file())
    used = set(re.findall(r"\.Values\.([A-Za-z_.]+[A-Za-z_])", templates))
    for path in used:
        assert any(leaf == path or leaf.startswith(path + ".") for leaf in defined), f"{path} is not in values.yaml"
    for leaf in defined:
        assert any(leaf == path or leaf.startswith(path + ".") for path in used), f"{leaf} is used in no template"


def test_schema_knows_every_value() -> None:
    def properties(schema: dict[str, Any], prefix: str = "") -> set[str]:
        return {
            leaf
            for name, sub in schema.get("properties", {}).items()
            for leaf in (properties(sub, f"{prefix}{name}.") or {f"{prefix}{name}"})
        }

    schema = msgspec.json.decode((CHART / "values.schema.json").read_bytes())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    open_objects = {"config", "resources", "podSecurityContext", "securityContext"}  # Kubernetes' or the server's own
    leaves = {path for path in paths_of(values) if path.split(".")[0] not in open_objects}
    assert leaves <= properties(schema)
