"""What is no message, at the service as the daemon sets it up."""

from __future__ import annotations

from typing import Any, cast

import grpc
import pytest

from bpfrl.cgroup import CgroupTree
from bpfrl.node import daemon
from bpfrl.node.agent import Agent
from bpfrl.node.readable import Readable
from bpfrl.node.server import NodeService
from bpfrl.rpc.node_pb2_grpc import add_NodeServicer_to_server
from tests.unit.fakes import run
from tests.unit.test_server import Played


def test_bytes_that_are_no_message_are_refused_in_a_line_and_never_asked_of_the_agent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    played = Played()

    async def calls() -> list[tuple[str, str]]:
        server = grpc.aio.server(options=daemon._OPTIONS, interceptors=(Readable(),))
        service = NodeService(cast(Agent, played), cast(CgroupTree, played), roles=False, cooperate=True)
        add_NodeServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        said = []
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for method in ("Update", "Detach", "List", "Explain", "Attach", "Nothing"):
                call: Any = channel.unary_unary(f"/bpfrl.v1.Node/{method}")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(b"\xff\xff", timeout=5)
                said.append((caught.value.code().name, caught.value.details() or ""))
        await server.stop(0)
        service.close()
        return said

    said = run(calls())
    reason = "the request cannot be read: its bytes are no message of this call"
    assert said == [("INVALID_ARGUMENT", reason)] * 5 + [("UNIMPLEMENTED", "Method not found!")]
    assert played.calls == []
    lines = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert [line.split()[1] for line in lines] == ["update", "detach", "list", "explain", "attach"]
    assert not [record for record in caplog.records if record.exc_info]
