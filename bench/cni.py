"""The CNI bandwidth plugin as a limiter: tbf queues, made by calling the plugin as a container runtime does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from bench.lab import POD_ADDRESS, Json, Lab
from bench.limiter import Attached, Counted, rate_of
from bench.record import Case, Direction

# The plugin wants a burst, and gives its tbf queue room for the burst and 25 ms of the rate. 128 KiB is what 1 Gbit/s
# sends in 1 ms and holds two of the largest GSO packets, which tbf would otherwise cut up in software: enough for the
# fastest limit here. At the slow ones it makes a long queue, which is why there are rows with a small burst too.
BURST: Final = 128 * 1024 * 8
# bpfrl's own default at low rates: what a shorter queue gives, and what it takes.
SMALL_BURST: Final = 16 * 1024 * 8
# What container runtimes pass when nobody has asked for a burst: the largest that the plugin takes.
RUNTIME_BURST: Final = 2**31 - 1

_VERSION: Final = "1.0.0"
_FOLDERS: Final = ("/opt/cni/bin", "/usr/lib/cni")


@contextmanager
def cni(bed: Lab, case: Case) -> Iterator[Attached]:
    """Through the CNI bandwidth plugin, called as a container runtime does it, in the peer's namespace.

    The peer's end of the veth stands for the host's. What goes to the pod then passes a tbf on that end; what comes
    from the pod is sent on to an ifb device, and passes a tbf on it.
    """
    added: Json = json.loads(_call_plugin(bed, case, "ADD"))
    try:
        devices: dict[Direction, str] = {"ingress": "eth0", "egress": added["interfaces"][-1]["name"]}
        for device in devices.values():
            if _tbf(bed, device)["options"]["rate"] != rate_of(case).bits // 8:
                raise RuntimeError(f"the CNI plugin has set another rate than that of {case}")
        yield Attached(lambda direction: Counted(_tbf(bed, devices[direction])["drops"]))
    finally:
        _call_plugin(bed, case, "DEL")


def _call_plugin(bed: Lab, case: Case, command: str) -> str:
    sandbox = f"/run/netns/{bed.pod_namespace}"
    environment = os.environ | {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": bed.pod_uid,
        "CNI_NETNS": sandbox,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": plugin_path(),
    }
    done = subprocess.run(
        bed.in_peer(plugin()),
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
    rate, burst = rate_of(case).bits, case.burst or BURST
    host_end = {"name": "eth0", "mac": _mac(bed.peer_namespace)}
    pod_end = {"name": "eth0", "mac": _mac(bed.pod_namespace), "sandbox": sandbox}
    return {
        "cniVersion": _VERSION,
        "name": "bench",
        "type": "bandwidth",
        "capabilities": {"bandwidth": True},
        "runtimeConfig": {
            "bandwidth": {"ingressRate": rate, "ingressBurst": burst, "egressRate": rate, "egressBurst": burst}
        },
        "prevResult": {
            "cniVersion": _VERSION,
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


def plugin_path() -> str:
    """Where CNI plugins are looked for."""
    return os.environ.get("CNI_PATH", os.pathsep.join(_FOLDERS))


def plugin() -> str:
    """The CNI bandwidth plugin.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = shutil.which("bandwidth", path=plugin_path())
    if found is None:
        raise FileNotFoundError(f"no CNI bandwidth plugin in {plugin_path()}: install containernetworking-plugins")
    return found
