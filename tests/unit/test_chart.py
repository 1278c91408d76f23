"""The Helm chart, rendered by Helm's own engine."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import helm_python
import kubernetes_validate
import pytest
import yaml

from bpfrl import __version__
from bpfrl.cli import cli
from bpfrl.master import certificates, leader
from bpfrl.rpc import authority, tls
from tools.manifests import CHART, MANIFESTS, manifests, objects, render

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
# What no Kubernetes knows by itself.
ADDED = ("cert-manager.io/", "monitoring.coreos.com/")
# The oldest that the chart installs on, and the newest that there is a schema for.
VERSIONS = ("1.30", kubernetes_validate.latest_version())

EVERYTHING: Json = {
    "image": {"repository": "registry.example:5000/net/bpfrl", "tag": "1.2.3", "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "pull"}],
    "nameOverride": "limits",
    "log": {"format": "text", "verbose": True},
    "node": {
        "port": 20002,
        "httpPort": 20003,
        "cooperate": False,
        "requireKnownProgram": True,
        "mountBpffs": True,
        "extraArgs": ["--no-cooperate"],
        "nodeSelector": {"pool": "limited"},
        "tolerations": [{"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "mine",
        "maxUnavailable": 3,
        "seLinuxOptions": {"type": "spc_t"},
        "podAnnotations": {"example.org/note": "a: b"},
        "podLabels": {"team": "net"},
        "resources": {"limits": {"cpu": 1, "memory": "1Gi"}},
    },
    "master": {
        "replicas": 3,
        "httpPort": 20004,
        "resyncSeconds": 60,
        "leaseSeconds": 30,
        "extraArgs": ["--lease-duration=20"],
        "tolerations": [{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}],
        "affinity": {"podAffinity": {}},
        "podAnnotations": {"example.org/note": "c"},
        "podLabels": {"team": "net"},
    },
    "podMonitor": {"enabled": True, "interval": "15s", "labels": {"release": "prometheus"}},
}
SETS: dict[str, Json] = {
    "defaults": {},
    "secret": {"certificates": {"mode": "secret"}},
    "cert-manager": {"certificates": {"mode": "cert-manager"}},
    "an issuer that is there": {
        "certificates": {
            "mode": "cert-manager",
            "certManager": {"issuerRef": {"name": "company", "kind": "ClusterIssuer", "group": "cert-manager.io"}},
        }
    },
    "everything else": EVERYTHING,
    "everything, cert-manager": EVERYTHING | {"certificates": {"mode": "cert-manager"}},
    "nothing optional": {
        "certificates": {"mode": "secret"},
        "node": {"nodeSelector": None, "tolerations": None, "resources": None},
        "master": {"replicas": 1, "nodeSelector": None, "resources": None},
    },
}
sets = pytest.mark.parametrize("values", SETS.values(), ids=SETS)


def find(found: list[Json], kind: str, suffix: str = "") -> Json:
    """The one object of a kind whose name ends so."""
    [one] = [each for each in found if each["kind"] == kind and each["metadata"]["name"].endswith(suffix)]
    return one


def pod_specs(found: list[Json]) -> Iterator[tuple[str, Json]]:
    """The pods that will run, and what each belongs to."""
    for each in found:
        spec = each.get("spec", {})
        for template in (spec.get("template"), spec.get("jobTemplate", {}).get("spec", {}).get("template")):
            if template:
                yield f"{each['kind']}/{each['metadata']['name']}", template["spec"]


def node(values: Json | None = None) -> Json:
    """The nodes' pod."""
    spec: Json = find(objects(values), "DaemonSet")["spec"]["template"]["spec"]
    return spec


# All of it.


@sets
def test_helm_has_nothing_to_say_of_it(values: Json) -> None:
    report = helm_python.lint(CHART, values, strict=True, namespace="limits")
    told = [message["error"] for message in report["messages"] if message["error"] != "icon is recommended"]
    assert (told, report["errors"]) == ([], [])


@sets
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_what_kubernetes_takes(values: Json, version: str) -> None:
    checked = 0
    for each in objects(values):
        if not each["apiVersion"].startswith(ADDED):
            kubernetes_validate.validate(each, version, strict=True)
            checked += 1
    assert checked >= 9


@sets
def test_everything_is_of_its_release(values: Json) -> None:
    found = objects(values, name="here", namespace="limits")
    names = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in found]
    assert len(set(names)) == len(names)
    for each in found:
        metadata = each["metadata"]
        assert metadata["name"].startswith("here-")
        assert metadata.get("namespace") == (None if each["kind"].startswith("Cluster") else "limits")
        assert metadata["labels"]["app.kubernetes.io/instance"] == "here"
        assert metadata["labels"]["app.kubernetes.io/version"] == __version__
    for kind in ("DaemonSet", "Deployment"):
        spec = find(found, kind)["spec"]
        assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    # Two releases share nothing of the whole cluster.
    other = {each["metadata"]["name"] for each in objects(values, name="here", namespace="there")}
    assert all(name not in other for kind, _, name in names if kind.startswith("Cluster"))


def test_it_has_the_version_of_the_command() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    assert [spec["containers"][0]["image"] for _, spec in pod_specs(objects())] == [f"bpfrl:{__version__}"] * 4


def test_the_plain_manifests_are_those_of_the_chart() -> None:
    assert (ROOT / MANIFESTS).read_text() == manifests(), "make generated"
    found = list(yaml.safe_load_all((ROOT / MANIFESTS).read_text()))
    assert found[0]["kind"] == "Namespace"
    assert len(found[1:]) == len(objects({"certificates": {"mode": "secret"}}))
    assert "elm" not in manifests().replace("deploy/helm", "")
    for each in found:
        kubernetes_validate.validate(each, VERSIONS[-1], strict=True)


# What may be said.


REFUSED: dict[str, tuple[Json, str]] = {
    "an unknown value": ({"nodes": {}}, "nodes"),
    "an unknown value below": ({"node": {"replicas": 2}}, "replicas"),
    "no such mode": ({"certificates": {"mode": "vault"}}, "/certificates/mode"),
    "no port": ({"node": {"port": 0}}, "/node/port"),
    "a port as text": ({"node": {"httpPort": "10003"}}, "/node/httpPort"),
    "no replica": ({"master": {"replicas": 0}}, "/master/replicas"),
    "a lease shorter than masters can hold": ({"master": {"leaseSeconds": 2}}, "/master/leaseSeconds"),
    "no way to write a log": ({"log": {"format": "xml"}}, "/log/format"),
    "days that are no number": ({"certificates": {"hook": {"days": "365d"}}}, "/certificates/hook/days"),
    "no schedule": ({"certificates": {"hook": {"schedule": "daily"}}}, "/certificates/hook/schedule"),
    "an issuer without a name": ({"certificates": {"certManager": {"issuerRef": {"kind": "Issuer"}}}}, "issuerRef"),
    "a time without a unit": ({"certificates": {"certManager": {"duration": "90d"}}}, "/duration"),
    "no image": ({"image": {"repository": ""}}, "/image/repository"),
    "none at once": ({"node": {"maxUnavailable": 0}}, "/node/maxUnavailable"),
    "an option that is no text": ({"node": {"extraArgs": [1]}}, "/node/extraArgs"),
    "a name that is none": ({"fullnameOverride": "Limits!"}, "/fullnameOverride"),
}


@pytest.mark.parametrize(("values", "told"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused(values: Json, told: str) -> None:
    with pytest.raises(helm_python.HelmError, match=told):
        render(values)


def test_every_default_has_its_place_in_the_schema() -> None:
    """And the other way round: a value that has no default is one that nobody knows of."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    free = {"global", "issuerRef", "seLinuxOptions", "resources"}

    def compare(values: Json, known: Json) -> None:
        assert set(values) == set(known["properties"]) - free | (set(values) & free)
        for key, value in values.items():
            if isinstance(value, dict) and "properties" in known["properties"][key] and key not in free:
                compare(value, known["properties"][key])

    compare(yaml.safe_load((CHART / "values.yaml").read_text()), schema)


def test_every_value_reaches_the_objects() -> None:
    """Each of them changes something."""
    plain = render({})

    def change(path: tuple[str, ...], value: Any) -> None:
        changed: Json = {}
        inner = changed
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
        if path[:2] == ("certificates", "certManager"):
            changed["certificates"]["mode"] = "cert-manager"
            assert render(changed) != render({"certificates": {"mode": "cert-manager"}}), path
        elif path[0] == "podMonitor" and path != ("podMonitor", "enabled"):
            changed["podMonitor"]["enabled"] = True
            assert render(changed) != render({"podMonitor": {"enabled": True}}), path
        else:
            assert render(changed) != plain, path

    def walk(values: Json, given: Json, path: tuple[str, ...] = ()) -> None:
        for key, default in values.items():
            here = (*path, key)
            if isinstance(default, dict) and default and key not in ("resources", "nodeSelector"):
                walk(default, given.get(key, {}), here)
            else:
                change(here, given[key])

    given = copy.deepcopy(EVERYTHING)
    given["fullnameOverride"] = "other"
    given["master"] |= {"nodeSelector": {"pool": "control"}, "priorityClassName": "mine"}
    given["master"]["resources"] = {"limits": {"memory": "1Gi"}}
    given["certificates"] = {
        "mode": "secret",
        "hook": {"days": 30, "schedule": "@weekly"},
        "certManager": {"issuerRef": {"name": "x"}, "duration": "24h", "renewBefore": "12h"},
    }
    walk(yaml.safe_load((CHART / "values.yaml").read_text()), given)


# What the pods may do.


@sets
def test_only_what_mounts_the_bpffs_is_privileged_and_only_where_that_is_wanted(values: Json) -> None:
    for owner, spec in pod_specs(objects(values)):
        for container in (*spec["containers"], *spec.get("initContainers", [])):
            context = container["securityContext"]
            assert context.get("privileged", False) is (container["name"] == "mount-bpffs"), owner
            assert context["readOnlyRootFilesystem"] is True
            assert "resources" in container or values == SETS["nothing optional"]
            if not context.get("privileged"):
                assert context["capabilities"]["drop"] == ["ALL"]
                assert context["allowPrivilegeEscalation"] is False
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert ("initContainers" in node(values)) is values.get("node", {}).get("mountBpffs", False)


@sets
def test_all_but_the_nodes_daemon_run_as_nobody_in_particular(values: Json) -> None:
    for owner, spec in pod_specs(objects(values)):
        if owner.startswith("DaemonSet/"):
            continue
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert not spec.get("hostNetwork")
        assert not spec.get("hostPID")
        assert not any("hostPath" in volume for volume in spec["volumes"])
        assert all("add" not in container["securityContext"]["capabilities"] for container in spec["containers"])


def test_the_nodes_daemon_runs_everywhere_and_sees_its_node() -> None:
    spec = node()
    assert (spec["hostNetwork"], spec["hostPID"], spec["priorityClassName"]) == (True, True, "system-node-critical")
    assert spec["tolerations"] == [{"operator": "Exists"}]
    mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    assert {path: mount.get("mountPropagation") for path, mount in mounts.items()} == {
        "/etc/bpfrl/certs": None,
        "/sys/fs/cgroup": "HostToContainer",
        "/sys/fs/bpf": "HostToContainer",
    }
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    assert paths == {"cgroup": "/sys/fs/cgroup", "bpffs": "/sys/fs/bpf"}


@sets
def test_only_what_asks_the_api_has_a_token_for_it(values: Json) -> None:
    found = objects(values)
    accounts = {each["metadata"]["name"]: each for each in found if each["kind"] == "ServiceAccount"}
    assert not any(account["automountServiceAccountToken"] for account in accounts.values())
    bound = {
        subject["name"]
        for each in found
        if each["kind"] in ("RoleBinding", "ClusterRoleBinding")
        for subject in each["subjects"]
    }
    for owner, spec in pod_specs(found):
        assert spec["serviceAccountName"] in accounts
        asks = not owner.startswith("DaemonSet/")
        assert spec["automountServiceAccountToken"] is asks
        assert (spec["serviceAccountName"] in bound) is asks


def test_the_masters_permissions_are_these() -> None:
    found = objects()
    rules = [
        (rule["resources"], rule.get("resourceNames"), rule["verbs"])
        for kind in ("ClusterRole", "Role")
        for rule in find(found, kind, "-master" if kind == "Role" else "-master-bpfrl")["rules"]
    ]
    assert rules == [
        (["pods"], None, ["get", "list", "watch"]),
        (["events"], None, ["create", "patch"]),
        (["leases"], [leader.LEASE], ["get", "update"]),
        (["leases"], None, ["create"]),
    ]


# The certificates.


def test_the_hook_may_write_the_secrets_that_it_makes_and_no_others() -> None:
    for suffix in ("-certs", "-certs-hook"):
        named, create = find(objects(), "Role", suffix)["rules"]
        assert {certificates.AUTHORITY, *authority.SECRETS} <= set(named["resourceNames"])
        assert all(name.startswith("bpfrl-") for name in named["resourceNames"])
        assert (named["resources"], named["verbs"]) == (["secrets"], ["get", "update"])
        assert (create["resources"], create["verbs"]) == (["secrets"], ["create"])


def test_the_hook_comes_first_and_leaves_nothing_behind() -> None:
    hooks = [each for each in objects() if "helm.sh/hook" in each["metadata"].get("annotations", {})]
    weights = {each["kind"]: int(each["metadata"]["annotations"]["helm.sh/hook-weight"]) for each in hooks}
    assert set(weights) == {"ServiceAccount", "Role", "RoleBinding", "Job"}
    assert all(weights[kind] < weights["Job"] for kind in weights if kind != "Job")
    for each in hooks:
        assert each["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
        assert "hook-succeeded" in each["metadata"]["annotations"]["helm.sh/hook-delete-policy"]


@pytest.mark.parametrize("mode", ["hook", "cert-manager", "secret"])
def test_the_daemons_mount_the_same_secrets_in_every_mode(mode: str) -> None:
    found = objects({"certificates": {"mode": mode}})
    for kind, secret in (("DaemonSet", "bpfrl-node"), ("Deployment", "bpfrl-master")):
        [volume] = [
            each for each in find(found, kind)["spec"]["template"]["spec"]["volumes"] if each["name"] == "certs"
        ]
        assert volume["secret"]["secretName"] == secret
        assert secret in authority.SECRETS
    kinds = {each["kind"] for each in found}
    assert ("Job" in kinds, "CronJob" in kinds) == (mode == "hook",) * 2
    assert ("Certificate" in kinds) == (mode == "cert-manager")


def test_cert_manager_makes_what_the_daemons_ask_for() -> None:
    found = objects({"certificates": {"mode": "cert-manager"}})
    for role, name, usage in (("node", tls.NODE, "server auth"), ("master", tls.MASTER, "client auth")):
        spec = find(found, "Certificate", f"-{role}")["spec"]
        assert (spec["secretName"], spec["dnsNames"]) == (f"bpfrl-{role}", [name])
        assert spec["usages"] == ["digital signature", usage]
        assert hours(spec["renewBefore"]) / hours(spec["duration"]) > tls.RENEWAL_SHARE
        issuer = find(found, spec["issuerRef"]["kind"], spec["issuerRef"]["name"])
        assert issuer["spec"]["ca"]["secretName"] == find(found, "Certificate", "-ca")["spec"]["secretName"]
    given = objects(SETS["an issuer that is there"])
    assert not [each for each in given if each["kind"] == "Issuer"]
    issuers = [each["spec"]["issuerRef"]["name"] for each in given if each["kind"] == "Certificate"]
    assert issuers == ["company"] * 3


def hours(text: str) -> int:
    return int(text.removesuffix("h"))


# The command lines.


@sets
def test_the_command_takes_what_the_pods_tell_it(values: Json) -> None:
    """Each option is one that there is, with a value that it takes."""
    seen = set()
    for _, spec in pod_specs(objects(values)):
        for container in spec["containers"]:
            command: click.Command | None = cli
            rest = [word for word in container["args"] if word != "--verbose"]
            with click.Context(cli, info_name="bpfrl") as context:
                while isinstance(command, click.Group):
                    _, command, rest = command.resolve_command(context, rest)
                assert command is not None
                seen.add(command.name)
                command.make_context(command.name, list(rest), parent=context)
    assert {"serve-node", "serve-master"} <= seen


def test_the_ports_are_those_of_the_options() -> None:
    found = objects(EVERYTHING)
    for kind, own in (("DaemonSet", {"grpc": 20002, "http": 20003}), ("Deployment", {"http": 20004})):
        [container] = find(found, kind)["spec"]["template"]["spec"]["containers"]
        assert {port["name"]: port["containerPort"] for port in container["ports"]} == own
        assert f"--http=:{own['http']}" in container["args"]
        for probe, path in (("livenessProbe", "/livez"), ("readinessProbe", "/readyz"), ("startupProbe", "/livez")):
            assert container[probe]["httpGet"] == {"path": path, "port": "http"}
    [node_container] = find(found, "DaemonSet")["spec"]["template"]["spec"]["containers"]
    [master_container] = find(found, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert {"--listen=:20002", "--require-known-program"} <= {*node_container["args"]}
    assert "--node-port=20002" in master_container["args"]


def test_prometheus_finds_both_daemons_and_keeps_the_limited_pods_labels() -> None:
    found = objects({"podMonitor": {"enabled": True}})
    monitor = find(found, "PodMonitor")
    # The alert rules take the daemons to be jobs with this in their names, and the job has the monitor's.
    assert "bpfrl" in monitor["metadata"]["name"]
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"], endpoint["honorLabels"]) == ("http", "/metrics", True)
    [components] = monitor["spec"]["selector"]["matchExpressions"]
    for kind in ("DaemonSet", "Deployment"):
        template = find(found, kind)["spec"]["template"]
        labels = template["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert labels[components["key"]] in components["values"]
        assert "http" in [port["name"] for port in template["spec"]["containers"][0]["ports"]]


def test_the_notes_name_the_release() -> None:
    notes = render(name="here", namespace="limits")["NOTES.txt"]
    assert "kubectl -n limits rollout status daemonset/here-bpfrl-node" in notes
    assert "certs secrets" not in notes
    assert "certs secrets certs -n limits" in render(SETS["secret"], namespace="limits")["NOTES.txt"]


def test_the_package_and_the_chart_are_released_together() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["description"] == project["description"]
