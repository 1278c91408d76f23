"""What pods ask for beside what their nodes have: the join by tables, the rest on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from aiohttp import web

from bpfrl.bpf.layout import Counters
from bpfrl.bpf.limiter import Broken, Status
from bpfrl.errors import ApiError
from bpfrl.limits import Limits, PodRef
from bpfrl.master import inventory
from bpfrl.master.annotations import EGRESS
from bpfrl.master.api import Api
from bpfrl.master.inventory import Answer, Cluster, Entry, Nodes, State, join
from bpfrl.master.pods import STATIC_HASH, Pod
from bpfrl.units import Rate
from tests.unit.fakes import FAST, HASH, SLOW, Node, api_server, make_pod, refusing, run, silent, uid_of

HERE, THERE = "192.0.2.1", "192.0.2.2"
AT = 1_000.0


def limiter(number: int, limits: Limits = SLOW, *, cgroup_id: int = 7, uid: str = "") -> Status:
    """What a node has for the pod with this number."""
    ref = PodRef(uid or uid_of(number), "shop", f"cart-{number}")
    return Status(ref, limits, Counters(passed_bytes=number), Counters(), cgroup_id, 1.0)


def answered(*found: Status | Broken) -> Answer:
    return Answer(found, AT)


BROKEN = Broken(uid_of(0), "attach or detach was cut off: repeat it")
SILENT = Answer(None, AT, "no answer within 5 s")
ASKS = "asks for egress 1mbit, ingress unlimited"
ASKS_FAST = "asks for egress 1gbit, ingress 1gbit, burst 64Ki"

# One pod on one node: what the pod is, what the node says, and what becomes of the two.
JUDGED: dict[str, tuple[Pod, Answer | None, tuple[State, str] | None]] = {
    "neither asks nor has": (make_pod(), answered(), None),
    "has what it asks for": (make_pod(0, SLOW), answered(limiter(0)), (State.OK, "")),
    "has it with a burst": (make_pod(0, FAST), answered(limiter(0, FAST)), (State.OK, "")),
    "has nothing": (make_pod(0, SLOW), answered(), (State.PENDING, ASKS)),
    "has something else": (make_pod(0, FAST), answered(limiter(0)), (State.PENDING, ASKS_FAST)),
    "has another burst": (
        make_pod(0, Limits(Rate(10**6), None, 2_048)),
        answered(limiter(0)),
        (State.PENDING, f"{ASKS}, burst 2Ki"),
    ),
    "has what limits nothing any more": (
        make_pod(0, SLOW),
        answered(limiter(0, cgroup_id=0)),
        (State.PENDING, f"{ASKS}; its limiter's cgroup is no more"),
    ),
    "asks for nonsense": (make_pod(problem="a reason"), answered(), (State.INVALID, "a reason")),
    "asks for nonsense, and keeps its limit": (
        make_pod(problem="a reason"),
        answered(limiter(0)),
        (State.INVALID, "a reason"),
    ),
    "asks for nonsense on a silent node": (make_pod(problem="a reason"), SILENT, (State.INVALID, "a reason")),
    "asks no more": (make_pod(), answered(limiter(0)), (State.ORPHAN, "the pod asks for no limit")),
    "has ended": (make_pod(ended=True), answered(limiter(0)), (State.ORPHAN, "the pod has ended")),
    "has ended, and nothing is left": (make_pod(ended=True), answered(), None),
    "has half a limiter": (make_pod(0, SLOW), answered(BROKEN), (State.BROKEN, BROKEN.reason)),
    "on a silent node": (make_pod(0, SLOW), SILENT, (State.UNKNOWN, ASKS)),
    "on a node that was not asked": (make_pod(0, SLOW), None, (State.UNKNOWN, ASKS)),
    "asks for nothing, on a silent node": (make_pod(), SILENT, None),
    "its node has not said its address": (
        make_pod(0, SLOW, address=""),
        None,
        (State.PENDING, f"{ASKS}; its node has not taken it up"),
    ),
}


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize(("pod", "answer", "judged"), JUDGED.values(), ids=JUDGED)
def test_a_pod_is_judged_by_what_its_node_has(
    pod: Pod, answer: Answer | None, judged: tuple[State, str] | None, *, everything: bool
) -> None:
    entries = join([pod], {HERE: answer} if answer else {}, everything=everything)
    if judged is None:
        assert entries == []
        return
    found = answer.found[0] if answer and answer.found else None
    assert entries == [Entry(pod.ref, "node-1", *judged, pod.limits, found, AT if answer else 0.0)]


def states(entries: list[Entry]) -> dict[str, State]:
    return {str(entry.pod): entry.state for entry in entries}


def test_pods_and_limiters_meet_on_their_own_node_only() -> None:
    pods = [make_pod(0, SLOW), make_pod(1, SLOW, node="node-2", address=THERE)]
    answers = {HERE: answered(limiter(1)), THERE: answered(limiter(0))}
    assert set(states(join(pods, answers, everything=False)).values()) == {State.PENDING}
    answers = {HERE: answered(limiter(0)), THERE: answered(limiter(1))}
    assert [(entry.node, entry.state) for entry in join(pods, answers, everything=True)] == [
        ("node-1", State.OK),
        ("node-2", State.OK),
    ]


def test_a_node_is_known_by_the_address_that_any_of_its_pods_has() -> None:
    pods = [make_pod(0), make_pod(1, SLOW, address="")]
    [entry] = join(pods, {HERE: answered(limiter(1))}, everything=False)
    assert entry.state is State.OK
    assert inventory.addresses(pods) == {"node-1": HERE}


def test_entries_are_in_the_order_of_their_names() -> None:
    names = [PodRef(uid_of(9), "a", "z"), PodRef(uid_of(8), "b", "a"), PodRef(uid_of(7), "b", "b")]
    pods = [Pod(ref.uid, ref, "node-1", HERE, SLOW) for ref in reversed(names)]
    assert [entry.pod for entry in join(pods, {}, everything=False)] == names


@pytest.mark.parametrize("everything", [True, False])
def test_a_limiter_of_no_pod_is_an_orphan_only_where_all_pods_are_known(*, everything: bool) -> None:
    left = Broken("f" * 32, "not made by bpfrl: look at it, and remove it")
    entries = join([make_pod(0, SLOW)], {HERE: answered(limiter(0), limiter(5), left)}, everything=everything)
    orphans = [(entry.pod, entry.node, entry.reason) for entry in entries if entry.state is State.ORPHAN]
    named = (PodRef(uid_of(5), "shop", "cart-5"), "node-1", "no such pod")
    assert orphans == ([(PodRef("f" * 32), "node-1", "no such pod"), named] if everything else [])


def test_cgroups_that_are_no_pods_are_their_nodes_business() -> None:
    service = Status(PodRef.of_cgroup(4_711), SLOW, Counters(), Counters(), 4_711, 1.0)
    assert join([make_pod()], {HERE: answered(service)}, everything=True) == []


# A static pod's limiter carries the hash of its manifest; others may write such a hash too.
STATIC: dict[str, Any] = {"limits": SLOW, "cgroup_uid": HASH}
CLAIMED: dict[str, tuple[dict[int, dict[str, Any]], dict[int, State]]] = {
    "one": ({0: {}}, {0: State.OK}),
    "the older one has it": ({0: {"created": "2"}, 1: {"created": "1"}}, {0: State.PENDING, 1: State.OK}),
    "of the same age, by UID": ({0: {}, 1: {}}, {0: State.OK, 1: State.PENDING}),
    "one that has ended has nothing": ({0: {"created": "1", "ended": True, "limits": None}, 1: {}}, {1: State.OK}),
    "on another node": (
        {0: {"created": "1", "node": "node-2", "address": THERE}, 1: {"created": "2"}},
        {0: State.PENDING, 1: State.OK},
    ),
    "the older one asks for nothing": (
        {0: {"created": "1", "limits": None}, 1: {"created": "2"}},
        {0: State.ORPHAN, 1: State.PENDING},
    ),
}


@pytest.mark.parametrize(("claims", "expected"), CLAIMED.values(), ids=CLAIMED)
def test_of_several_pods_that_claim_a_static_pods_hash_the_oldest_counts(
    claims: dict[int, dict[str, Any]], expected: dict[int, State]
) -> None:
    pods = []
    for number, claim in claims.items():
        created = claim.pop("created", "")
        made = make_pod(number, **(STATIC | claim))
        pods.append(Pod(**{name: getattr(made, name) for name in made.__struct_fields__} | {"created": created}))
    answers = {HERE: answered(limiter(9, uid=HASH)), THERE: answered()}
    entries = join(pods, answers, everything=True)
    assert states(entries) == {f"shop/cart-{number}": state for number, state in expected.items()}
    for entry in entries:
        shared = len(claims) > 1 and entry.state is State.PENDING and entry.node == "node-1"
        assert (STATIC_HASH in entry.reason) is shared


# Asking nodes.


def test_all_nodes_are_asked_at_once_and_each_has_its_own_time() -> None:
    async def work() -> None:
        nodes = {name: Node() for name in ("a", "b", "c", "d")}
        nodes["a"].give(1)
        nodes["b"].meanwhile = silent("list")
        nodes["c"].meanwhile = refusing("list", "PERMISSION_DENIED")

        async def never(*_: str) -> None:
            await asyncio.sleep(60)

        nodes["d"].meanwhile = never
        ticks: list[None] = []
        asking = Nodes(nodes.__getitem__)
        answers = await asking.ask(["d", "c", "b", "a", "a"], 0.2, lambda: ticks.append(None))
        assert list(answers) == ["a", "b", "c", "d"]
        assert answers["a"].found == [*nodes["a"].has.values()]
        assert answers["a"].at > 0
        assert [answers[name].found for name in ("b", "c", "d")] == [None] * 3
        assert [answers[name].reason for name in nodes] == [
            "",
            "the node does not answer",
            "no list of anything",
            "no answer within 0.2 s",
        ]
        assert len(ticks) == 4
        await asking.close()
        assert all(node.closed for node in nodes.values())

    run(work())


def test_no_more_than_so_many_nodes_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_AT_ONCE", 3)

    async def work() -> None:
        flying, most = 0, 0

        async def busy(*_: str) -> None:
            nonlocal flying, most
            flying += 1
            most = max(most, flying)
            await asyncio.sleep(0.01)
            flying -= 1

        def connect(_: str) -> Node:
            node = Node()
            node.meanwhile = busy
            return node

        answers = await Nodes(connect).ask(map(str, range(10)), 5)
        assert all(answer.found == [] for answer in answers.values())
        assert most == 3

    run(work())


def test_connections_are_kept_while_their_node_is_asked() -> None:
    async def work() -> None:
        made: list[str] = []
        nodes = {name: Node() for name in "ab"}

        def connect(address: str) -> Node:
            made.append(address)
            return nodes[address]

        asking = Nodes(connect)
        await asking.ask("ab", 5)
        await asking.ask("b", 5)
        assert made == ["a", "b"]
        assert [nodes[name].closed for name in "ab"] == [True, False]
        await asking.ask("ab", 5)
        assert made == ["a", "b", "a"]

    run(work())


def test_of_very_many_nodes_no_connection_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_MOST_KEPT", 2)

    async def work() -> None:
        for names, closed in (("ab", False), ("abc", True)):
            nodes = {name: Node() for name in names}
            asking = Nodes(nodes.__getitem__)
            assert len(await asking.ask(names, 5)) == len(names)
            assert {node.closed for node in nodes.values()} == {closed}

    run(work())


# A whole cluster.


def raw_pod(number: int, *, egress: str = "", address: str = HERE, node: str = "node-1") -> dict[str, Any]:
    """A pod as the API server sends it."""
    return {
        "metadata": {
            "name": f"cart-{number}",
            "namespace": "shop",
            "uid": uid_of(number),
            "annotations": {EGRESS: egress} if egress else {},
        },
        "spec": {"nodeName": node},
        "status": {"phase": "Running", "hostIP": address},
    }


class Played:
    """An API server with some pods, and nodes; with what was asked of it."""

    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.page = 100
        self.status = 200
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.nodes: dict[str, Node] = {}
        self.counted: list[tuple[int, int]] = []

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append((request.path_qs.partition("?")[0], dict(request.query)))
        if self.status != 200:
            return web.json_response({"message": "no"}, status=self.status)
        start = int(request.query.get("continue", "0"))
        end = start + self.page
        more = {"continue": str(end)} if end < len(self.pods) else {}
        return web.json_response({"metadata": {"resourceVersion": "1"} | more, "items": self.pods[start:end]})

    @contextmanager
    def counting(self, total: int) -> Iterator[Any]:
        done: list[None] = []
        yield lambda: done.append(None)
        self.counted.append((total, len(done)))

    def cluster(self, client: Any, namespace: str = "", labels: str = "") -> Cluster:
        nodes = Nodes(lambda address: self.nodes.setdefault(address, Node()))
        return Cluster(Api(client), nodes, namespace, labels, 5.0, self.counting)


@pytest.mark.parametrize(
    ("namespace", "labels", "path", "query"),
    [
        ("", "", "/api/v1/pods", {}),
        ("shop", "", "/api/v1/namespaces/shop/pods", {}),
        ("", "app in (a,b),!c", "/api/v1/pods", {"labelSelector": "app in (a,b),!c"}),
        ("a/b?c", "x=y", "/api/v1/namespaces/a%2Fb%3Fc/pods", {"labelSelector": "x=y"}),
    ],
)
def test_selectors_are_the_api_servers_business(
    namespace: str, labels: str, path: str, query: Mapping[str, str]
) -> None:
    async def work() -> None:
        played = Played()
        async with api_server(played.answer) as client:
            look = await played.cluster(client, namespace, labels).look()
        assert look == ([], {}, "")
        assert played.asked == [(path, {"fieldSelector": "spec.nodeName!=", "limit": "500", **query})]

    run(work())


def test_a_look_at_a_cluster_has_all_pages_and_all_nodes() -> None:
    async def work() -> None:
        played = Played()
        played.page = 2
        played.pods = [
            raw_pod(0, egress="1M"),
            raw_pod(1, egress="1M", address=THERE, node="node-2"),
            raw_pod(2),
            raw_pod(3, egress="fast"),
            raw_pod(4, egress="1M", address="192.0.2.3", node="node-3"),
        ]
        played.nodes = {HERE: Node(), THERE: Node(), "192.0.2.3": Node()}
        played.nodes[HERE].give(0, SLOW)
        played.nodes["192.0.2.3"].meanwhile = silent("list", 9)
        async with api_server(played.answer) as client:
            look = await played.cluster(client).look()
        assert states(look.entries) == {
            "shop/cart-0": State.OK,
            "shop/cart-1": State.PENDING,
            "shop/cart-3": State.INVALID,
            "shop/cart-4": State.UNKNOWN,
        }
        assert look.silent == {"node-3": "the node does not answer"}
        assert look.stale == ""
        assert [query.get("continue") for _, query in played.asked] == [None, "2", "4"]
        assert played.counted == [(3, 3)]

    run(work())


def test_pods_that_come_are_seen_when_their_limiter_is() -> None:
    """They are not read at each look; but a limiter of no pod may be a new pod's."""

    async def work() -> None:
        played = Played()
        played.pods = [raw_pod(0, egress="1M")]
        played.nodes[HERE] = Node()
        async with api_server(played.answer) as client:
            cluster = played.cluster(client)
            for _ in range(3):
                assert states((await cluster.look()).entries) == {"shop/cart-0": State.PENDING}
            assert len(played.asked) == 1
            played.pods.append(raw_pod(1, egress="1M"))
            played.nodes[HERE].give(1, SLOW)
            look = await cluster.look()
            assert states(look.entries) == {"shop/cart-0": State.PENDING, "shop/cart-1": State.OK}
            assert len(played.asked) == 2
            # What stays unexplained is not asked for again and again.
            played.nodes[HERE].give(2, SLOW)
            for _ in range(3):
                assert states((await cluster.look()).entries)["shop/cart-2"] is State.ORPHAN
            assert len(played.asked) == 3

    run(work())


def test_pods_are_read_again_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_READ_SECONDS", 0.0)
    monkeypatch.setattr(inventory, "_READ_SHARE", 1e9)

    async def work() -> None:
        played = Played()
        async with api_server(played.answer) as client:
            cluster = played.cluster(client)
            await cluster.look()
            played.pods = [raw_pod(0, egress="1M")]
            assert states((await cluster.look()).entries) == {"shop/cart-0": State.PENDING}
            # An API server that fails meanwhile leaves what was known.
            played.status = 500
            look = await cluster.look()
            assert states(look.entries) == {"shop/cart-0": State.PENDING}
            assert "answers 500" in look.stale
            played.status, played.pods = 200, []
            assert await cluster.look() == ([], {}, "")

    run(work())


@pytest.mark.parametrize("status", [400, 403, 500])
def test_pods_that_could_never_be_read_are_an_error(status: int) -> None:
    async def work() -> None:
        played = Played()
        played.status = status
        async with api_server(played.answer) as client:
            with pytest.raises(ApiError) as caught:
                await played.cluster(client).look()
        assert caught.value.status == status

    run(work())
