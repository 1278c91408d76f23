"""What deploy/ sets up, against a real kube-apiserver that enforces it: objects, permissions, certificates."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from bench.fleet import Daemon, wait_for
from bench.kubeapi import ApiError, RealApi, real_assets
from bench.lab import BPFRL
from bpfrl.rpc import authority
from tests.e2e.conftest import SECONDS
from tools.manifests import objects

Json = dict[str, Any]

NAMESPACE: Final = "bpfrl"
ACCOUNTS: Final = ("bpfrl-node", "bpfrl-master", "bpfrl-certs")
_NOT_FOUND: Final = 404
# What no Kubernetes knows by itself.
ADDED: Final = ("cert-manager.io/", "monitoring.coreos.com/")


class Enforcing(RealApi):
    """One that asks what its users may do, with the chart's ServiceAccounts among them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = {account: secrets.token_hex(16) for account in ACCOUNTS}

    def kubeconfig_of(self, account: str) -> Path:
        """What tells clients of the server, and that they are a ServiceAccount."""
        content = yaml.safe_load(self.kubeconfig.read_text())
        content["users"][0]["user"] = {"token": self.tokens[account]}
        path = self.folder / f"{account}.kubeconfig"
        path.write_text(yaml.safe_dump(content))
        return path

    def _prepare(self, undo: contextlib.ExitStack) -> None:
        super()._prepare(undo)
        with (self.folder / "tokens.csv").open("a") as tokens:
            for account, token in self.tokens.items():
                tokens.write(f'{token},{user(account)},{account},"{",".join(groups())}"\n')

    def _command(self) -> list[str]:
        given = [word for word in super()._command() if not word.startswith("--authorization-mode=")]
        return [*given, "--authorization-mode=RBAC", "--allow-privileged=true"]


def user(account: str) -> str:
    return f"system:serviceaccount:{NAMESPACE}:{account}"


def groups() -> tuple[str, ...]:
    return ("system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}", "system:authenticated")


class Paths:
    """Where a server keeps objects of a kind, as it says itself."""

    def __init__(self, api: RealApi) -> None:
        self._api = api
        self._known: dict[str, dict[str, Json]] = {}

    def of(self, each: Json) -> str | None:
        """The collection that an object belongs into; None where the server is too old to have it."""
        version = each["apiVersion"]
        root = f"/{'apis' if '/' in version else 'api'}/{version}"
        if version not in self._known:
            try:
                found = self._api.request("GET", root)["resources"]
            except ApiError as error:
                if error.code != _NOT_FOUND:
                    raise
                found = []
            self._known[version] = {resource["kind"]: resource for resource in found if "/" not in resource["name"]}
        resource = self._known[version].get(each["kind"])
        if resource is None:
            return None
        middle = f"/namespaces/{each['metadata']['namespace']}" if resource["namespaced"] else ""
        return f"{root}{middle}/{resource['name']}"


@pytest.fixture(scope="module")
def api() -> Iterator[Enforcing]:
    if real_assets() is None:
        pytest.skip("needs etcd, kube-apiserver and kubectl; their folder is $KUBEBUILDER_ASSETS")
    with Enforcing() as server:
        paths = Paths(server)
        for each in objects():
            if each["apiVersion"].startswith("rbac."):
                server.request("POST", paths.of(each) or "", each)
        yield server


@pytest.mark.parametrize("mode", ["hook", "cert-manager", "secret"])
def test_the_server_takes_every_object(api: Enforcing, mode: str) -> None:
    """Those of later Kubernetes versions are left to the schemas."""
    paths, taken = Paths(api), set()
    values = {"certificates": {"mode": mode}, "node": {"mountBpffs": True}, "podMonitor": {"enabled": True}}
    for each in objects(values, name="dry"):
        path = None if each["apiVersion"].startswith(ADDED) else paths.of(each)
        if path:
            stored = api.request("POST", path, each, dryRun="All")
            assert stored["metadata"]["name"] == each["metadata"]["name"]
            taken.add(each["kind"])
    rbac = {"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"}
    assert taken >= {*rbac, "DaemonSet", "Deployment"} | ({"Job"} if mode == "hook" else set())


def test_a_server_says_no_to_what_is_no_daemonset(api: Enforcing) -> None:
    """A dry run that takes anything would tell nothing."""
    [wrong] = [each for each in objects() if each["kind"] == "DaemonSet"]
    wrong["spec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]["mountPropagation"] = "Bidirectional"
    with pytest.raises(ApiError, match="mountPropagation"):
        api.request("POST", Paths(api).of(wrong) or "", wrong, dryRun="All")


# Who may do what.

VERBS: Final = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
RESOURCES: Final = {
    ("", "pods"): ("any",),
    ("", "pods/status"): ("any",),
    ("", "pods/exec"): ("any",),
    ("", "events"): ("any",),
    ("", "nodes"): ("any",),
    ("", "secrets"): ("any", *authority.SECRETS, "bpfrl-ca"),
    ("", "configmaps"): ("any",),
    ("", "serviceaccounts/token"): ("bpfrl-master",),
    ("coordination.k8s.io", "leases"): ("any", "bpfrl-master"),
    ("apps", "daemonsets"): ("any",),
    ("rbac.authorization.k8s.io", "clusterroles"): ("any",),
}


def may(api: RealApi, account: str, verb: str, resource: tuple[str, str], namespace: str, name: str) -> bool:
    group, plural = resource
    plural, _, part = plural.partition("/")
    attributes = {"verb": verb, "group": group, "resource": plural, "subresource": part, "namespace": namespace}
    spec = {"user": user(account), "groups": list(groups()), "resourceAttributes": attributes | {"name": name}}
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
    answer = api.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    allowed: bool = answer["status"]["allowed"]
    return allowed


def permissions(api: RealApi, account: str) -> set[tuple[str, str, str, str]]:
    """Everything of the above that a ServiceAccount may do: verb, resource, namespace, name."""
    return {
        (verb, resource[1], namespace, name)
        for (resource, names), verb, namespace in itertools.product(
            RESOURCES.items(), VERBS, (NAMESPACE, "elsewhere", "")
        )
        for name in names
        if may(api, account, verb, resource, namespace, name)
    }


def test_the_nodes_daemon_may_do_nothing(api: Enforcing) -> None:
    assert permissions(api, "bpfrl-node") == set()


def test_the_master_may_do_what_it_needs_and_nothing_else(api: Enforcing) -> None:
    everywhere = (NAMESPACE, "elsewhere", "")
    expected = {
        *(("pods", verb, namespace, "any") for verb in ("get", "list", "watch") for namespace in everywhere),
        *(("events", verb, namespace, "any") for verb in ("create", "patch") for namespace in everywhere),
        *(("leases", verb, NAMESPACE, "bpfrl-master") for verb in ("get", "update", "create")),
        ("leases", "create", NAMESPACE, "any"),
    }
    found = {(resource, verb, namespace, name) for verb, resource, namespace, name in permissions(api, "bpfrl-master")}
    assert found == expected


def test_what_makes_certificates_may_write_their_secrets_and_nothing_else(api: Enforcing) -> None:
    own = (*authority.SECRETS, "bpfrl-ca")
    assert permissions(api, "bpfrl-certs") == {
        *((verb, "secrets", NAMESPACE, name) for verb in ("get", "update", "create") for name in own),
        ("create", "secrets", NAMESPACE, "any"),
    }


# Whether that is enough.


def test_the_master_does_its_work_with_its_permissions(api: Enforcing, tmp_path: Path) -> None:
    authority.init(tmp_path / "certs", 30)
    trust = ("--certs", str(tmp_path / "certs" / "master"), "--kubeconfig", str(api.kubeconfig_of("bpfrl-master")))
    master = Daemon(
        [BPFRL, "serve-master", *trust, "--lease-namespace", NAMESPACE], dict(os.environ), tmp_path / "master.log"
    )
    made = api.create_pod("web", host_ip="127.0.0.9", annotations={"kubernetes.io/egress-bandwidth": "10m"})

    def told(*counts: int) -> None:
        """There are so many Events about the pod, and each was told so often."""
        wanted, uid = sorted(counts), made["metadata"]["uid"]
        wait_for(lambda: sorted(event["count"] for event in api.events(uid)) == wanted, SECONDS, master.output)

    master.start()
    try:
        wait_for(lambda: "leading as" in master.output(), SECONDS, master.output)
        assert api.lease(NAMESPACE, "bpfrl-master")["spec"]["holderIdentity"]
        told(1)
        # What is said once more is added to the first Event that said it.
        api.annotate("web", {"kubernetes.io/egress-bandwidth": "20m"})
        told(1, 1)
        api.annotate("web", {"kubernetes.io/egress-bandwidth": "10m"})
        told(1, 2)
        assert "Forbidden" not in master.output()
    finally:
        assert master.stop() == 0
    assert "Traceback" not in master.output()


def test_certificates_are_made_and_kept_with_their_permissions(api: Enforcing) -> None:
    def apply() -> list[str]:
        command = [BPFRL, "certs", "apply", "--namespace", NAMESPACE]
        command += ["--kubeconfig", str(api.kubeconfig_of("bpfrl-certs"))]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()

    names = ("bpfrl-ca", *authority.SECRETS)
    assert apply() == [f"secret/{name} made" for name in names]
    before = {name: secret(api, name) for name in names}
    assert apply() == [f"secret/{name} kept" for name in names]
    assert {name: secret(api, name) for name in names} == before
    damaged = before["bpfrl-node"] | {"data": {"tls.crt": "", "tls.key": ""}}
    api.request("PUT", f"/api/v1/namespaces/{NAMESPACE}/secrets/bpfrl-node", damaged)
    assert apply() == [f"secret/{name} {'made' if name == 'bpfrl-node' else 'kept'}" for name in names]
    assert secret(api, "bpfrl-node")["data"] != before["bpfrl-node"]["data"]


def test_certificates_are_not_made_by_others(api: Enforcing) -> None:
    command = [BPFRL, "certs", "apply", "--namespace", NAMESPACE]
    command += ["--kubeconfig", str(api.kubeconfig_of("bpfrl-master"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("bpfrl: the API server answers 403 Forbidden")


def secret(api: RealApi, name: str) -> Json:
    return api.request("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets/{name}")
