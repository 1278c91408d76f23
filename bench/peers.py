"""The limiters that are compared, each put in place as its users would do it.

A limiter is a context manager: within it the lab's pod is under the case's limit, in both directions, and what it
yields tells what the limiter itself has counted in the case's direction.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final

from bench.lab import POD_ADDRESS, Json, Lab
from bench.record import Case, Limiter
from bpfrl.limits import PodRef
from bpfrl.units import Rate

# The plugin wants a burst, and gives its tbf queue room for the burst and 25 ms of the rate. 128 KiB is what 1 Gbit/s
# sends in 1 ms and holds two of the largest GSO packets, which tbf would otherwise cut up in software: enough for the
# fastest limit here. At the slow ones it makes a long queue, which is why there are rows with a small burst too.
CNI_BURST: Final = 128 * 1024 * 8
# bpfrl's own default at low rates: what a shorter queue gives, and what it takes.
CNI_SMALL_BURST: Final = 16 * 1024 * 8
# What container runtimes pass when nobody has asked for a burst: the largest that the plugin takes.
CNI_RUNTIME_BURST: Final = 2**31 - 1

_CNI_VERSION: Final = "1.0.0"
_CNI_FOLDERS: Final = ("/opt/cni/bin", "/usr/lib/cni")


@dataclass(frozen=True, slots=True)
class Counted:
    """What a limiter has counted in one direction; passed, byte at layer 3, is None where it does not count that."""

    drops: int | None = None
    passed: int | None = None


Meter = Callable[[], Counted]


@contextmanager
def _no_limit(_bed: Lab, _case: Case) -> Iterator[Meter]:
    yield Counted


@contextmanager
def _bpfrl(bed: Lab, case: Case) -> Iterator[Meter]:
    """Through the installed command, as ``bpfrl attach --rate``."""
    bed.bpfrl("attach", "--pod-uid", bed.pod_uid, "--rate", str(_rate(case)))
    try:
        yield lambda: _bpfrl_counted(bed, case)
    finally:
        bed.bpfrl("detach", "--pod-uid", bed.pod_uid)


def bpfrl_counters(bed: Lab) -> Json:
    """What ``bpfrl list`` says of the lab's pod."""
    items = json.loads(bed.bpfrl("list", "-o", "json").stdout)["items"]
    return next(item for item in items if item["uid"] == PodRef(bed.pod_uid).uid)


def _bpfrl_counted(bed: Lab, case: Case) -> Counted:
    counters = bpfrl_counters(bed)[case.direction]
    return Counted(counters["dropped_packets"], counters["passed_bytes"])


@contextmanager
def _cni(bed: Lab, case: Case) -> Iterator[Meter]:
    """Through the CNI bandwidth plugin, called as a container runtime does it, in the peer's namespace.

    The peer's end of the veth stands for the host's. What goes to the pod then passes a tbf on that end; what comes
    from the pod is sent on to an ifb device, and passes a tbf on it.
    """
    added: Json = json.loads(_call_plugin(bed, case, "ADD"))
    try:
        device = "eth0" if case.direction == "ingress" else added["interfaces"][-1]["name"]
        if _tbf(bed, device)["options"]["rate"] != _rate(case).bits // 8:
            raise RuntimeError(f"the CNI plugin has set another rate than that of {case}")
        yield lambda: Counted(_tbf(bed, device)["drops"])
    finally:
        _call_plugin(bed, case, "DEL")


def _call_plugin(bed: Lab, case: Case, command: str) -> str:
    sandbox = f"/run/netns/{bed.pod_namespace}"
    environment = os.environ | {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": bed.pod_uid,
        "CNI_NETNS": sandbox,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": cni_path(),
    }
    done = subprocess.run(
        bed.in_peer(cni_plugin()),
        input=json.dumps(_plugin_configuration(bed, case, sandbox)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"CNI bandwidth plugin, {command}: {done.stdout or done.stderr}")
    return done.stdout


def _plugin_configuration(bed: Lab, case: Case, sandbox: str) -> Json:
    """What a runtime hands over: the pod's annotations as runtimeConfig, and what the plugins before have made."""
    rate, burst = _rate(case).bits, case.burst
    host_end = {"name": "eth0", "mac": _mac(bed.peer_namespace)}
    pod_end = {"name": "eth0", "mac": _mac(bed.pod_namespace), "sandbox": sandbox}
    return {
        "cniVersion": _CNI_VERSION,
        "name": "bench",
        "type": "bandwidth",
        "capabilities": {"bandwidth": True},
        "runtimeConfig": {
            "bandwidth": {"ingressRate": rate, "ingressBurst": burst, "egressRate": rate, "egressBurst": burst}
        },
        "prevResult": {
            "cniVersion": _CNI_VERSION,
            "interfaces": [host_end, pod_end],
            "ips": [{"address": f"{POD_ADDRESS}/24", "interface": 1}],
        },
    }


def _mac(namespace: str) -> str:
    command = ["ip", "-n", namespace, "-j", "link", "show", "eth0"]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return str(shown[0]["address"])


def _tbf(bed: Lab, device: str) -> Json:
    """The tbf queue of a device, as tc describes it.

    Raises:
        RuntimeError: the device has none.
    """
    command = ["tc", "-n", bed.peer_namespace, "-s", "-j", "qdisc", "show", "dev", device]
    for qdisc in json.loads(subprocess.run(command, capture_output=True, check=True).stdout):
        if qdisc["kind"] == "tbf":
            found: Json = qdisc
            return found
    raise RuntimeError(f"the CNI plugin has set no tbf on {device}")


def cni_path() -> str:
    """Where CNI plugins are looked for."""
    return os.environ.get("CNI_PATH", os.pathsep.join(_CNI_FOLDERS))


def cni_plugin() -> str:
    """The CNI bandwidth plugin.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = shutil.which("bandwidth", path=cni_path())
    if found is None:
        raise FileNotFoundError(f"no CNI bandwidth plugin in {cni_path()}: install containernetworking-plugins")
    return found


def _rate(case: Case) -> Rate:
    if case.rate is None:
        raise ValueError(f"no rate for a limiter: {case}")
    return Rate(case.rate)


_LIMITERS: Final[dict[Limiter, Callable[[Lab, Case], AbstractContextManager[Meter]]]] = {
    "none": _no_limit,
    "bpfrl": _bpfrl,
    "cni": _cni,
}


def limiting(bed: Lab, case: Case) -> AbstractContextManager[Meter]:
    """Put the case's limiter in place for as long as the context lasts."""
    return _LIMITERS[case.limiter](bed, case)
