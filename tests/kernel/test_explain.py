"""What a node says of a pod is what its kernel does: programs, limits, sockets, and what was refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.lab import BPFRL, PEER_ADDRESS, Lab
from bpfrl import __version__, cgroup
from bpfrl.bpf import generator, libbpf
from bpfrl.bpf.libbpf import AttachType, Descriptor, ProgramType
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.bpf.sockets import Counted
from bpfrl.cgroup import CgroupTree
from bpfrl.errors import RefusedError
from bpfrl.explanation import Report
from bpfrl.limits import PodRef
from bpfrl.node.agent import Agent
from bpfrl.node.explain import examine, examine_cgroup
from tests.kernel.conftest import attached, bpftool, connect, detach, limit, peer_end, pod_end, until
from tests.kernel.test_agent import end_pod
from tests.kernel.test_service import FAST, SLOW, Wire, another_pod, certificates, header, pki, program, run, whole
from tests.measuring import unmeasured

__all__ = ["certificates", "pki"]

UID = "8c4a6c1e-0f6b-4c0e-9d0b-0a5f5a3a7f10"
# mov r0, 1; exit
PASS = bytes.fromhex("b7000000010000009500000000000000")


@contextmanager
def meddler(path: Path, kind: AttachType = AttachType.CGROUP_SOCK_OPS) -> Iterator[None]:
    """Another's program on a cgroup, which does nothing."""
    sort = ProgramType.SOCK_OPS if kind is AttachType.CGROUP_SOCK_OPS else ProgramType.CGROUP_SKB
    with ExitStack() as stack:
        target = stack.enter_context(Descriptor(os.open(path, os.O_RDONLY | os.O_DIRECTORY)))
        loaded = stack.enter_context(libbpf.load("meddler", sort, PASS, kind))
        stack.enter_context(libbpf.attach(loaded, target.number, kind))
        yield


def report(bed: Lab) -> Report:
    return examine(Agent(bed.bpffs), CgroupTree(bed.cgroup_root), bed.pod_uid)


def explained(bed: Lab, *options: str, code: int = 0) -> dict[str, Any]:
    """What the command tells programs."""
    done = bed.bpfrl("explain", *(options or ("--pod-uid", bed.pod_uid)), "-o", "json", check=False)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster is configured."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "BPFRL_CERTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", "/root/.cache"))


def test_a_pod_without_a_limiter_has_nothing_but_its_cgroup(bed: Lab) -> None:
    assert report(bed) == Report(__version__, cgroup=str(bed.pod_cgroup))
    assert explained(bed, code=1)["verdict"]["text"].startswith(
        "not limited: what it asks for is not known: no cluster"
    )


def test_a_limited_pod_has_its_programs_its_limit_and_its_build(bed: Lab) -> None:
    limit(bed, "--egress", "10mbit", "--pod-name", "shop/cart")
    found = report(bed)
    assert isinstance(found.limiter, Status)
    assert found.limiter.build == generator.build()
    assert sorted((each.hook, each.id) for each in found.programs) == attached(bed)
    names = {each["id"]: (each["name"], each["tag"]) for each in bpftool("prog", "show")}
    for each in found.programs:
        assert (each.name, each.tag.hex()) == names[each.id]
        assert (each.is_ours, each.cgroup, each.mode) == (True, str(bed.pod_cgroup), "multi")
    document = explained(bed, "-n", "shop", "cart")
    assert document["verdict"] == {"as_asked": True, "mark": "ok", "text": "limited: egress 10mbit"}
    assert document["limit"]["this_build"] is True
    text = bed.bpfrl("explain", "--pod-uid", bed.pod_uid).stdout
    assert text.splitlines()[-1] == "verdict: limited: egress 10mbit"
    assert re.search(
        r"^ok +limit +egress 10mbit, ingress unlimited, burst by rate, attached \d+s ago$", text, re.MULTILINE
    )
    detach(bed)
    assert report(bed).programs == ()


def test_others_programs_are_seen_in_the_order_in_which_they_run(bed: Lab) -> None:
    limit(bed, "--rate", "10mbit")
    egress = AttachType.CGROUP_INET_EGRESS
    with meddler(bed.pod_cgroup, egress), meddler(bed.cgroup_root), meddler(bed.cgroup_root, egress):
        found = report(bed)
        order = [(each.hook, each.name, each.cgroup) for each in found.programs]
        own, above = str(bed.pod_cgroup), str(bed.cgroup_root)
        assert order == [
            ("cgroup_inet_ingress", "bpfrl_ingress", own),
            ("cgroup_inet_egress", "bpfrl_egress", own),
            ("cgroup_inet_egress", "meddler", own),
            ("cgroup_inet_egress", "meddler", above),
            ("cgroup_sock_ops", "bpfrl_sockops", own),
            ("cgroup_sock_ops", "meddler", above),
        ]
        shown = bpftool("cgroup", "show", str(bed.pod_cgroup), "effective")
        assert {each["id"] for each in shown} >= {each.id for each in found.programs}
        document = explained(bed)
        assert document["marks"]["programs"] == "warning"
        assert document["verdict"]["as_asked"] is True
    assert not [each for each in report(bed).programs if not each.is_ours]


@pytest.mark.parametrize(("flag", "mode"), [("override", "override"), ("", "exclusive"), ("multi", "multi")])
def test_how_a_program_goes_with_others_is_told(bed: Lab, flag: str, mode: str) -> None:
    pin = bed.bpffs / "meddler"
    with libbpf.load("meddler", ProgramType.SOCK_OPS, PASS, AttachType.CGROUP_SOCK_OPS) as loaded:
        loaded.pin(pin)
    place = ["cgroup", "attach", str(bed.pod_cgroup), "sock_ops", "pinned", str(pin)]
    bpftool(*place, *([flag] if flag else []))
    try:
        [found] = report(bed).programs
        assert (found.name, found.mode, found.is_ours) == ("meddler", mode, False)
    finally:
        bpftool("cgroup", "detach", str(bed.pod_cgroup), "sock_ops", "pinned", str(pin))
        pin.unlink()


def test_cooperation_above_the_pod_is_seen(bed: Lab) -> None:
    assert not report(bed).cooperates
    bed.bpfrl("attach", "--cooperate", "--cgroup", str(bed.cgroup_root))
    assert report(bed).cooperates
    [found] = report(bed).programs
    assert (found.name, found.cgroup) == ("bpfrl_cooperate", str(bed.cgroup_root))
    bed.bpfrl("detach", "--cooperate", "--cgroup", str(bed.cgroup_root))
    assert not report(bed).cooperates


def test_the_sockets_of_a_limiter_are_counted(bed: Lab) -> None:
    pod, peer = pod_end(bed), peer_end(bed)
    peer.listen(7000)
    early, early_peer = connect(pod, peer, PEER_ADDRESS, 2)
    limit(bed, "--egress", "100mbit")
    assert report(bed).sockets == Counted(0, 0)
    late, _ = connect(pod, peer, PEER_ADDRESS, 5)
    assert report(bed).sockets == Counted(5, 5)
    assert explained(bed)["sockets"] == {"known": 5, "paced": 5}
    # Those from before are taken in with the next that they send; the peer's own are not the pod's.
    early.send(1000)
    early_peer.receive()
    until(lambda: all(early_peer.each("ended")))
    until(lambda: report(bed).sockets == Counted(7, 7), what=lambda: report(bed).sockets)
    # Without a limit to what it sends nothing is paced, and the limiter knows them all the same.
    limit(bed, "--ingress", "100mbit")
    late.send(1000)
    until(lambda: report(bed).sockets == Counted(7, 2), what=lambda: report(bed).sockets)


def test_who_sends_what_cannot_be_paced_is_told_what_becomes_of_it(bed: Lab) -> None:
    limit(bed, "--egress", "1mbit")
    bed.iperf3("-u", "-b", "10M", "-t", "2")
    found = explained(bed)
    assert (found["verdict"]["mark"], found["marks"]["counters"]) == ("warning", "warning")
    told = re.fullmatch(r"limited: egress 1mbit, and (\d+) % of what it sends is dropped: .*", found["verdict"]["text"])
    assert told
    egress = found["limit"]["egress"]
    share = egress["dropped_packets"] / (egress["dropped_packets"] + egress["passed_packets"])
    assert egress["drop_share"] == pytest.approx(share, abs=1e-6)
    assert int(told[1]) == pytest.approx(100 * share, abs=1)
    assert share > 0.5


def test_counting_leaves_nothing_behind(bed: Lab) -> None:
    limit(bed, "--rate", "10mbit")
    peer_end(bed).listen(7000)
    connect(pod_end(bed), peer_end(bed), PEER_ADDRESS, 0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        report(bed)
    # Fewer are none of its doing: channels of earlier tests close some time later.
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_broken_limiter_says_what_is_wrong(bed: Lab) -> None:
    limit(bed, "--rate", "10mbit")
    (bed.bpffs / bed.pod_uid / "egress").unlink()
    found = report(bed)
    assert isinstance(found.limiter, Broken)
    assert explained(bed, code=1)["verdict"]["text"].startswith("NOT limited: its limiter is broken: egress is missing")
    detach(bed)


def test_a_limiter_whose_pod_has_ended_limits_nobody(bed: Lab) -> None:
    limit(bed, "--rate", "10mbit")
    end_pod(bed)
    until(lambda: not getattr(report(bed).limiter, "cgroup_id", 1))
    found = explained(bed, code=1)
    assert found["verdict"]["text"] == "NOT limited: its limiter was on a cgroup that is gone"
    assert "no cgroup for pod" in found["cgroup"]["problem"]


def test_a_cgroup_that_is_no_pod_is_explained_too(bed: Lab) -> None:
    agent = Agent(bed.bpffs)
    number = cgroup.id_of(bed.world_cgroup)
    assert examine_cgroup(agent, bed.world_cgroup)[0] == PodRef.of_cgroup(number)
    assert explained(bed, "--cgroup", str(bed.world_cgroup))["verdict"]["text"].startswith("not limited: nobody")
    bed.bpfrl("attach", "--cgroup", str(bed.world_cgroup), "--egress", "10mbit")
    assert explained(bed, "--cgroup", str(bed.world_cgroup))["verdict"]["text"] == "limited: egress 10mbit"
    limit(bed, "--egress", "20mbit")
    assert explained(bed, "--cgroup", str(bed.pod_cgroup))["pod"]["uid"] == bed.pod_uid
    bed.bpfrl("detach", "--all")


def test_a_user_without_privileges_is_told_so_in_the_verdict(bed: Lab) -> None:
    limit(bed, "--rate", "10mbit")
    environment = unmeasured() | {"BPFRL_BPFFS": str(bed.bpffs), "BPFRL_CGROUP_ROOT": str(bed.cgroup_root)}
    environment["HOME"] = "/nonexistent"
    command = [BPFRL, "explain", "--pod-uid", bed.pod_uid]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, user=65534, cwd="/")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "this needs root" in done.stdout.splitlines()[-1]
    detach(bed)


# Over the network.


def test_the_same_is_told_over_the_network(bed: Lab, pki: Path) -> None:
    async def calls(wire: Wire) -> None:
        await wire.client.attach(PodRef(bed.pod_uid, "shop", "cart-0"), FAST, program(FAST), generator.build())
        found = await wire.client.explain(bed.pod_uid)
        assert found == report(bed)
        assert found.sockets == Counted(0, 0)

    run(bed, pki, calls)


def test_a_pod_that_is_not_here_is_no_error_and_a_cgroup_is_nobodys(bed: Lab, pki: Path) -> None:
    async def calls(wire: Wire) -> None:
        found = await wire.client.explain(UID)
        assert (found.limiter, found.cgroup) == (None, "")
        assert found.no_cgroup.startswith(f"no cgroup for pod {UID}")
        for uid in ("cgroup-7", "web", ""):
            with pytest.raises(RefusedError) as refused:
                await wire.client.explain(uid)
            assert refused.value.code == "INVALID_ARGUMENT"

    run(bed, pki, calls)


def test_a_node_remembers_what_it_has_refused_until_it_is_done(bed: Lab, pki: Path) -> None:
    async def calls(wire: Wire) -> None:
        uid, path = another_pod(bed)
        image = program(SLOW)
        assert (await wire.attach(*whole(uid, image, SLOW, sha256=bytes(32)))).code == "DATA_LOSS"
        refusal = (await wire.client.explain(uid)).refusal
        assert refusal
        assert (refusal.call, refusal.reason) == ("attach", "the program's SHA-256 is not the announced one")
        # Nobody else's.
        assert (await wire.client.explain(bed.pod_uid)).refusal is None
        with pytest.raises(RefusedError):
            await wire.client.update(uid, FAST)
        refusal = (await wire.client.explain(uid)).refusal
        assert refusal
        assert refusal.call == "update"
        # What comes to no pod is not remembered.
        assert (await wire.attach(header("web", image))).code == "INVALID_ARGUMENT"
        await wire.client.attach(PodRef(uid), SLOW, image, generator.build())
        assert (await wire.client.explain(uid)).refusal is None
        await wire.client.detach(uid)
        path.rmdir()

    run(bed, pki, calls)
