"""deploy/manifests/bpfrl.yaml, for those who have no Helm: the chart, rendered for the namespace bpfrl."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import helm_python
import yaml

_ROOT: Final = Path(__file__).resolve().parents[1]
CHART: Final = _ROOT / "deploy" / "helm" / "bpfrl"
MANIFESTS: Final = Path("deploy/manifests/bpfrl.yaml")
_NAMESPACE: Final = "bpfrl"
# Hooks are Helm's alone.
_VALUES: Final = {"certificates": {"mode": "secret"}}
# What is not Helm's must not say so.
_OF_HELM: Final = re.compile(r"^ *(helm\.sh/chart|app\.kubernetes\.io/managed-by): .*\n", re.MULTILINE)
_HEAD: Final = f"""\
# Made from deploy/helm/bpfrl by "make generated": change that.
#
# The Secrets bpfrl-node and bpfrl-master come from elsewhere:
#   bpfrl certs init certs && bpfrl certs secrets certs | kubectl apply -f -
# and the image "bpfrl" is to be the one that you have made with deploy/Dockerfile.
apiVersion: v1
kind: Namespace
metadata:
  name: {_NAMESPACE}
  labels:
    # The nodes' pods use the network, the process numbers and two folders of their machine.
    pod-security.kubernetes.io/enforce: privileged
"""


def render(values: dict[str, Any] | None = None, name: str = "bpfrl", namespace: str = _NAMESPACE) -> dict[str, str]:
    """The chart's templates with some values in place of the defaults, by their names.

    Raises:
        helm_python.HelmError: the values cannot be meant.
    """
    with helm_python.Chart.load(CHART) as chart:
        found = chart.render(values or {}, name=name, namespace=namespace)
    return {Path(template).name: text for template, text in sorted(found.items())}


def objects(values: dict[str, Any] | None = None, **release: str) -> list[dict[str, Any]]:
    """Every object that :func:`render` makes."""
    texts = [text for name, text in render(values, **release).items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def manifests() -> str:
    """What is to be in :data:`MANIFESTS`."""
    templates = [text.strip() for name, text in render(_VALUES).items() if name.endswith(".yaml")]
    plain = [_OF_HELM.sub("", f"{text}\n") for text in templates if text]
    return "---\n".join([_HEAD, *plain])
