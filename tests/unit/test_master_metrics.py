"""What a master tells: of real controllers, workers and clients, at nodes in memory and on closed ports."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext

import pytest
from aiohttp import web
from prometheus_client.samples import Sample

from bpfrl.bpf import generator
from bpfrl.errors import RefusedError, UnreachableError
from bpfrl.limits import Change
from bpfrl.master import controller as controller_module
from bpfrl.master import events
from bpfrl.master import nodes as nodes_module
from bpfrl.master.api import Api
from bpfrl.master.apiserver import PodWatch
from bpfrl.master.controller import Controller
from bpfrl.master.events import Reason, Recorder
from bpfrl.master.metrics import MasterMetrics
from bpfrl.master.observer import Backlog, Census
from bpfrl.rpc.client import Connections, NodeClient
from tests.unit.fakes import (
    BUILD,
    FAST,
    SLOW,
    Node,
    Sink,
    Told,
    a_while,
    api_server,
    client_of,
    image_of,
    make_pod,
    refusing,
    run,
    running,
    silent,
    tell_all,
    uid_of,
    until,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler, and pauses that nobody notices."""
    monkeypatch.setattr(generator, "build", lambda: BUILD)
    monkeypatch.setattr(generator, "generate", image_of)
    for name in ("_FIRST_POD_PAUSE", "_LONGEST_POD_PAUSE", "_FIRST_NODE_PAUSE", "_LONGEST_NODE_PAUSE"):
        monkeypatch.setattr(nodes_module, name, 0.004)


def samples(metrics: MasterMetrics, name: str) -> list[Sample]:
    """The samples of a name."""
    return [sample for family in metrics.registry.collect() for sample in family.samples if sample.name == name]


def value(metrics: MasterMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


async def scraped(metrics: MasterMetrics, name: str, **labels: str) -> float | None:
    await metrics.refresh()
    return value(metrics, name, **labels)


class Bed:
    """A controller with nodes in memory, and what it tells."""

    def __init__(self, most_nodes: int = 100) -> None:
        self.metrics = MasterMetrics(None, most_nodes)
        self.nodes: dict[str, Node] = {}
        self.controller = Controller(self._connect, Told(), 3600.0, self.metrics)
        self.metrics.attend(self.controller.census)

    def _connect(self, address: str) -> NodeClient:
        return self.nodes.setdefault(address, Node())

    async def tells(self, **expected: float) -> None:
        """Wait until these metrics have these values."""

        def found() -> dict[str, float | None]:
            self.metrics._state.take(self.controller.census())
            return {name: value(self.metrics, f"bpfrl_{name}") for name in expected}

        try:
            await until(lambda: found() == expected)
        except AssertionError:
            assert found() == expected


# What is the case.


def test_a_master_that_starts_tells_only_of_itself() -> None:
    metrics = MasterMetrics(None, 10)
    run(metrics.refresh())
    assert value(metrics, "bpfrl_build_info", component="master", version="0.1.0") == 1
    assert samples(metrics, "bpfrl_leader") == []
    assert run(metrics.unready()) == "starting"


def test_pods_are_told_and_a_master_is_ready_when_it_knows_them() -> None:
    async def calls() -> None:
        bed = Bed()
        assert await bed.metrics.unready() == "the pods have not been told yet"
        await bed.tells(synced=0, leader=0, pods=0)
        pods = [make_pod(1, SLOW), make_pod(2, SLOW), make_pod(3), make_pod(4, problem="annotation x: no")]
        tell_all(bed.controller, pods)
        # Whether it leads or not.
        assert await bed.metrics.unready() == ""
        await bed.tells(synced=1, leader=0, pods=4, pods_limited=2, pods_invalid=1, nodes=1, queue_length=0)
        assert samples(bed.metrics, "bpfrl_node_reachable") == []
        bed.controller.remove(uid_of(1))
        await bed.tells(pods=3, pods_limited=1)
        # The last good limits of what cannot be meant now are limits, too.
        bed.controller.put(make_pod(2, problem="annotation x: no"))
        await bed.tells(pods=3, pods_limited=1, pods_invalid=2)

    run(calls())


def test_only_who_acts_leads() -> None:
    async def calls() -> None:
        bed = Bed()
        tell_all(bed.controller, [])
        await bed.tells(leader=0)
        async with running(bed.controller.run()):
            await bed.tells(leader=1)
        await bed.tells(leader=0)

    run(calls())


def test_the_queue_has_what_is_to_be_done() -> None:
    async def calls() -> None:
        bed = Bed()
        gate = asyncio.Event()

        async def wait(verb: str, _: str) -> None:
            if verb == "attach":
                await gate.wait()

        node = bed.nodes["192.0.2.1"] = Node()
        node.meanwhile = wait
        tell_all(bed.controller, [make_pod(number, SLOW) for number in range(20)])
        async with running(bed.controller.run()):
            await bed.tells(queue_length=20, pods_awaited=0, pods_retrying=0)
            gate.set()
            await bed.tells(queue_length=0)
            node.absent.add(uid_of(50))
            bed.controller.put(make_pod(50, SLOW))
            await bed.tells(queue_length=0, pods_awaited=1, pods_retrying=0)

    run(calls())


def test_what_failed_waits_to_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_POD_PAUSE", "_LONGEST_POD_PAUSE"):
        monkeypatch.setattr(nodes_module, name, 600.0)

    async def calls() -> None:
        bed = Bed()
        node = bed.nodes["192.0.2.1"] = Node()
        node.meanwhile = refusing("attach", "FAILED_PRECONDITION")
        tell_all(bed.controller, [make_pod(1, SLOW)])
        async with running(bed.controller.run()):
            await bed.tells(queue_length=0, pods_retrying=1)
            bed.controller.remove(uid_of(1))
            await bed.tells(queue_length=0, pods_retrying=0)

    run(calls())


def test_pods_of_a_node_that_does_not_answer_are_in_the_queue() -> None:
    async def calls() -> None:
        bed = Bed()
        node = bed.nodes["192.0.2.1"] = Node()
        node.meanwhile = silent("list", 10**6)
        tell_all(bed.controller, [make_pod(number, SLOW) for number in range(3)])
        async with running(bed.controller.run()):
            await until(lambda: len(node.calls) > 2)
            await bed.tells(queue_length=3)
            node.meanwhile = None
            await bed.tells(queue_length=0)

    run(calls())


# How long a change takes.


def reconciled(bed: Bed) -> tuple[float | None, float | None]:
    name = "bpfrl_reconcile_duration_seconds"
    return value(bed.metrics, f"{name}_count"), value(bed.metrics, f"{name}_sum")


def test_a_change_takes_from_when_it_is_known_to_when_it_is_in_force() -> None:
    async def calls() -> None:
        bed = Bed()
        node = bed.nodes["192.0.2.1"] = Node()

        async def slowly(verb: str, _: str) -> None:
            if verb != "list":
                await asyncio.sleep(0.1)

        node.meanwhile = slowly
        tell_all(bed.controller, [make_pod(1, SLOW)])
        async with running(bed.controller.run()):
            changes: tuple[Callable[[], None], ...] = (
                lambda: None,  # what was known when it began
                lambda: bed.controller.put(make_pod(1, FAST)),
                lambda: bed.controller.put(make_pod(1)),
                lambda: bed.controller.put(make_pod(1, SLOW)),
                lambda: bed.controller.remove(uid_of(1)),
            )
            for count, change in enumerate(changes, 1):
                change()
                while reconciled(bed)[0] != count:
                    await asyncio.sleep(0.001)
                seconds = reconciled(bed)[1]
                assert seconds is not None
                assert count * 0.1 <= seconds < count * 0.1 + 1
            # What changes nothing is no change.
            bed.controller.put(make_pod(2))
            bed.controller.remove(uid_of(2))
            await a_while()
            assert reconciled(bed)[0] == 5

    run(calls())


def test_a_failure_is_part_of_how_long_it_takes() -> None:
    async def calls() -> None:
        bed = Bed()
        node = bed.nodes["192.0.2.1"] = Node()
        node.meanwhile = refusing("attach", "INTERNAL", 3)
        tell_all(bed.controller, [make_pod(1, SLOW)])
        async with running(bed.controller.run()):
            await until(lambda: reconciled(bed)[0] == 1)
            assert node.verbs() == ["attach"] * 4

    run(calls())


def test_waiting_for_a_cgroup_is_the_kubelets_time() -> None:
    async def calls() -> None:
        bed = Bed()
        node = bed.nodes["192.0.2.1"] = Node()
        node.absent.add(uid_of(1))
        tell_all(bed.controller, [make_pod(1, SLOW)])
        async with running(bed.controller.run()):
            await until(lambda: node.waiting)
            node.absent.clear()
            await until(lambda: node.has)
            await a_while()
            assert reconciled(bed)[0] == 0
            bed.controller.put(make_pod(1, FAST))
            await until(lambda: reconciled(bed)[0] == 1)

    run(calls())


def test_what_was_known_before_a_master_leads_is_due_from_then_on() -> None:
    async def calls() -> None:
        bed = Bed()
        node = bed.nodes["192.0.2.1"] = Node()
        node.give(2, SLOW)
        tell_all(bed.controller, [make_pod(1, SLOW), make_pod(2, SLOW)])
        await asyncio.sleep(0.3)
        async with running(bed.controller.run()):
            # The other one was in force already.
            await until(lambda: node.has.keys() == {uid_of(1), uid_of(2)})
            await a_while()
            count, seconds = reconciled(bed)
            assert count == 1
            assert seconds is not None
            assert seconds < 0.3

    run(calls())


# Calls to nodes.


def answering(*, change: Change = Change.ATTACHED, error: Exception | None = None) -> Callable[..., Awaitable[object]]:
    """A client's method that ends in one way."""

    async def answer(*_: object) -> object:
        if error:
            raise error
        return change

    return answer


VERBS: dict[str, Callable[[NodeClient], Awaitable[object]]] = {
    "attach": lambda client: client.attach(make_pod(1).ref, SLOW, b"", BUILD),
    "attach_wait": lambda client: client.attach(make_pod(1).ref, SLOW, b"", BUILD, 3.0),
    "update": lambda client: client.update(uid_of(1), SLOW),
    "detach": lambda client: client.detach(uid_of(1)),
    "list": lambda client: client.list(),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("error", "result", "reachable"),
    [
        (None, "OK", 1),
        (RefusedError("no", "FAILED_PRECONDITION"), "FAILED_PRECONDITION", 1),
        (UnreachableError("silence"), "UNREACHABLE", 0),
    ],
)
def test_each_call_is_timed_by_verb_and_result(
    monkeypatch: pytest.MonkeyPatch, verb: str, error: Exception | None, result: str, reachable: float
) -> None:
    for name in ("attach", "update", "detach", "list"):
        monkeypatch.setattr(NodeClient, name, answering(error=error))

    async def calls() -> None:
        metrics = MasterMetrics(None, 10)
        metrics.attend(lambda: census("192.0.2.1"))
        before = time.time()
        for _ in range(2):
            with pytest.raises(type(error)) if error else nullcontext():
                await VERBS[verb](metrics.client("192.0.2.1", 1, None, Connections(1)))
        assert await scraped(metrics, "bpfrl_call_duration_seconds_count", verb=verb, result=result) == 2
        assert value(metrics, "bpfrl_node_reachable", node="node-192.0.2.1") == reachable
        assert value(metrics, "bpfrl_nodes_unreachable") == 1 - reachable
        contact = value(metrics, "bpfrl_node_last_contact_timestamp_seconds", node="node-192.0.2.1")
        assert (contact is not None and contact >= before) if reachable else contact is None
        errors = value(metrics, "bpfrl_node_errors_total", node="node-192.0.2.1", reason=result)
        assert errors == (2 if error else None)

    run(calls())


def census(*addresses: str, acting: bool = True) -> Census:
    names = {address: f"node-{address}" for address in addresses}
    return Census(synced=True, acting=acting, pods=0, limited=0, invalid=0, backlog=Backlog(), nodes=names)


def test_a_real_call_to_nobody_is_unreachable() -> None:
    async def calls() -> None:
        with socket.create_server(("127.0.0.1", 0)) as found:
            free = found.getsockname()[1]
        metrics = MasterMetrics(None, 10)
        client = metrics.client("127.0.0.1", free, None, Connections(1))
        with pytest.raises(UnreachableError):
            await client.list()
        await client.close()
        assert value(metrics, "bpfrl_call_duration_seconds_count", verb="list", result="UNREACHABLE") == 1

    run(calls())


def test_a_call_that_this_master_gives_up_says_nothing_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forever(*_: object) -> object:
        return await asyncio.Event().wait()

    monkeypatch.setattr(NodeClient, "attach", forever)

    async def calls() -> None:
        metrics = MasterMetrics(None, 10)
        metrics.attend(lambda: census("192.0.2.1"))
        call = asyncio.ensure_future(VERBS["attach_wait"](metrics.client("192.0.2.1", 1, None, Connections(1))))
        await a_while()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert await scraped(metrics, "bpfrl_call_duration_seconds_count", verb="attach_wait", result="CANCELLED") == 1
        assert samples(metrics, "bpfrl_node_reachable") == []

    run(calls())


def test_a_few_of_many_nodes_are_told_and_first_those_that_do_not_answer() -> None:
    async def calls() -> None:
        metrics = MasterMetrics(None, 3)
        addresses = [f"192.0.2.{number}" for number in range(10, 20)]
        metrics.attend(lambda: census(*addresses))
        for number, address in enumerate(addresses):
            metrics.called(address, "list", "UNREACHABLE" if number in {4, 7} else "OK", 0.1)
        await metrics.refresh()
        told = {sample.labels["node"]: sample.value for sample in samples(metrics, "bpfrl_node_reachable")}
        assert told == {"node-192.0.2.14": 0, "node-192.0.2.17": 0, "node-192.0.2.10": 1}
        assert value(metrics, "bpfrl_nodes_left_out") == 7
        assert value(metrics, "bpfrl_nodes") == 10
        assert value(metrics, "bpfrl_nodes_unreachable") == 2
        assert len(samples(metrics, "bpfrl_node_errors_total")) == 2

    run(calls())


def test_nodes_that_are_gone_are_forgotten_and_followers_tell_of_none() -> None:
    async def calls() -> None:
        metrics = MasterMetrics(None, 10)
        now = [census("192.0.2.1", "192.0.2.2")]
        metrics.attend(lambda: now[0])
        for number in (1, 2):
            metrics.called(f"192.0.2.{number}", "list", "UNREACHABLE", 0.1)
        await metrics.refresh()
        assert value(metrics, "bpfrl_nodes_unreachable") == 2
        now[0] = census("192.0.2.2")
        await metrics.refresh()
        assert [sample.labels["node"] for sample in samples(metrics, "bpfrl_node_reachable")] == ["node-192.0.2.2"]
        now[0] = census("192.0.2.2", acting=False)
        await metrics.refresh()
        assert [name for name in NODE_METRICS if samples(metrics, name)] == []

    run(calls())


def test_nodes_that_are_gone_are_forgotten_by_a_master_that_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "_PRUNE_SECONDS", 0.02)

    async def calls() -> None:
        bed = Bed()
        tell_all(bed.controller, [make_pod(1, SLOW), make_pod(2, SLOW, node="node-2", address="192.0.2.2")])
        for number in (1, 2):
            bed.metrics.called(f"192.0.2.{number}", "list", "OK", 0.1)
        async with running(bed.controller.run()):
            await until(lambda: len(bed.nodes["192.0.2.2"].has) == 1)
            bed.controller.remove(uid_of(2))
            await until(lambda: bed.metrics._state.records.keys() == {"192.0.2.1"})

    run(calls())


NODE_METRICS = (
    *("bpfrl_node_reachable", "bpfrl_nodes_unreachable", "bpfrl_node_errors_total", "bpfrl_nodes_left_out"),
    "bpfrl_node_last_contact_timestamp_seconds",
)


# The API server.


def test_lists_watches_and_what_goes_wrong_with_them_are_counted() -> None:
    answers = iter(
        [
            web.Response(status=503),
            web.json_response({"metadata": {"resourceVersion": "7"}, "items": []}),
            web.Response(text='{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"8"}}}\n'),
            web.Response(text='{"type":"ERROR","object":{"code":410,"message":"too old"}}\n'),
            web.json_response({"metadata": {"resourceVersion": "9"}, "items": []}),
        ]
    )

    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return next(answers)

    async def calls() -> None:
        metrics = MasterMetrics(None, 10)
        before = time.time()
        async with api_server(answer) as client:
            watch = PodWatch(Api(client), Sink(), metrics)
            for _ in range(4):
                await watch._turn()
                if value(metrics, "bpfrl_api_lists_total") == 0:
                    assert value(metrics, "bpfrl_api_last_contact_timestamp_seconds") == 0
        assert value(metrics, "bpfrl_api_lists_total") == 2
        assert (value(metrics, "bpfrl_api_watches_total") or 0) >= 2
        assert value(metrics, "bpfrl_api_errors_total", reason="503") == 1
        assert value(metrics, "bpfrl_api_errors_total", reason="410") == 1
        assert (value(metrics, "bpfrl_api_last_contact_timestamp_seconds") or 0) >= before

    run(calls())


def test_an_api_server_that_is_not_there_is_an_error_without_a_status() -> None:
    async def calls() -> None:
        metrics = MasterMetrics(None, 10)
        with socket.create_server(("127.0.0.1", 0)) as found:
            free = found.getsockname()[1]
        async with client_of(f"http://127.0.0.1:{free}") as client:
            await PodWatch(Api(client), Sink(), metrics)._turn()
        assert value(metrics, "bpfrl_api_errors_total", reason="unreachable") == 1

    run(calls())


def test_events_are_counted_by_what_became_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_QUEUE", 2)
    statuses = iter([201, 403])

    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({}, status=next(statuses))

    async def calls() -> None:
        metrics = MasterMetrics(None, 10)
        async with api_server(answer) as client:
            recorder = Recorder(Api(client), "master-0", metrics)
            for number in range(3):
                recorder.tell(make_pod(number), Reason.LIMITED, "told")
            async with running(recorder.run()):
                await recorder.flush()
        for result in ("sent", "failed", "dropped"):
            assert value(metrics, "bpfrl_events_total", result=result) == 1

    run(calls())
