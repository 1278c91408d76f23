"""The three paths, over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import gzip
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import Counter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from bpfrl import __version__, monitoring
from bpfrl.errors import KernelError
from bpfrl.monitoring import Monitored, serving
from bpfrl.rpc import authority, tls
from tests.unit.fakes import a_while, run, until

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Shown(Monitored):
    """Something to show, that says how often it was asked."""

    def __init__(self) -> None:
        super().__init__("test", None)
        self.things = Counter("test_things", "Things.", registry=self.registry)
        self.reason = ""
        self.refreshed = 0
        self.most_at_once = 0
        self.may_refresh = asyncio.Event()
        self.may_refresh.set()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._now = 0

    async def refresh(self) -> None:
        self.refreshed += 1
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        await self.may_refresh.wait()
        self._now -= 1

    async def unready(self) -> str:
        await self.may_answer.wait()
        return self.reason


class Page:
    """What a client has got."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.text = (gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body).decode()


class Browser:
    """A client of one server."""

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self._session = session
        self.port = port

    async def get(self, path: str, method: str = "GET", **headers: str) -> Page:
        headers = {"Accept-Encoding": "identity"} | {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.request(method, f"http://127.0.0.1:{self.port}{path}", headers=headers) as response:
            return Page(response.status, dict(response.headers), await response.read())


@asynccontextmanager
async def browsing(shown: Monitored) -> AsyncIterator[Browser]:
    async with (
        serving("127.0.0.1:0", shown) as port,
        aiohttp.ClientSession(auto_decompress=False, trust_env=False) as session,
    ):
        yield Browser(session, port)


def samples(text: str) -> dict[str, float]:
    return {sample.name: sample.value for family in parse_text(text) for sample in family.samples}


def test_metrics_are_plain_text_unless_asked_otherwise() -> None:
    async def calls() -> None:
        shown = Shown()
        shown.things.inc(3)
        async with browsing(shown) as browser:
            plain = await browser.get("/metrics")
            assert plain.status == 200
            assert plain.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert samples(plain.text)["test_things_total"] == 3
            asked = await browser.get("/metrics", Accept=OPENMETRICS)
            assert asked.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
            families = {family.name: family for family in parse_openmetrics(asked.text)}  # type: ignore[no-untyped-call]
            assert families["test_things"].samples[0].value == 3
            assert asked.text.endswith("# EOF\n")

    run(calls())


def test_metrics_are_compressed_where_the_client_can_take_it() -> None:
    async def calls() -> None:
        async with browsing(Shown()) as browser:
            packed = await browser.get("/metrics", Accept_Encoding="gzip")
            assert packed.headers["Content-Encoding"] == "gzip"
            assert "test_things_total" in packed.text
            assert len(packed.body) < len(packed.text)
            assert "Content-Encoding" not in (await browser.get("/metrics")).headers

    run(calls())


def test_every_daemon_says_what_it_is_and_what_its_process_does() -> None:
    async def calls() -> None:
        async with browsing(Shown()) as browser:
            found = await browser.get("/metrics")
        assert f'bpfrl_build_info{{component="test",version="{__version__}"}} 1.0' in found.text
        told = samples(found.text)
        assert told["process_resident_memory_bytes"] > 2**20
        assert {"process_cpu_seconds_total", "python_info", "python_gc_collections_total"} <= told.keys()
        # It says nothing of when each counter began.
        assert not [name for name in told if name.endswith("_created")]

    run(calls())


def test_the_certificate_says_when_it_expires(tmp_path: Path) -> None:
    authority.init(tmp_path, 30)
    certificates = tls.Certificates(tmp_path / "node", tls.NODE)
    [family] = [
        family
        for family in Monitored("test", certificates).registry.collect()
        if family.name == "bpfrl_certificate_expiry_timestamp_seconds"
    ]
    left = family.samples[0].value - datetime.now(UTC).timestamp()
    assert 29 * 86_400 < left <= 30 * 86_400


def test_two_daemons_of_a_process_share_nothing() -> None:
    one, other = Shown(), Shown()
    one.things.inc()
    assert one.registry.get_sample_value("test_things_total") == 1
    assert other.registry.get_sample_value("test_things_total") == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/metrics/", 404),
        ("GET", "/healthz", 404),
        ("POST", "/metrics", 405),
        ("DELETE", "/livez", 405),
        ("HEAD", "/metrics", 200),
        ("HEAD", "/livez", 200),
        ("GET", "/metrics?name=x", 200),
    ],
)
def test_nothing_else_is_served(method: str, path: str, status: int) -> None:
    async def calls() -> None:
        async with browsing(Shown()) as browser:
            assert (await browser.get(path, method)).status == status

    run(calls())


@pytest.mark.parametrize("version", ["x", "1.x", "", "1.0.0.0.0", "-1", "99999999999999999999"])
def test_a_version_that_is_none_is_no_mistake_of_ours(version: str) -> None:
    async def calls() -> None:
        async with browsing(Shown()) as browser:
            page = await browser.get("/metrics", Accept=f"application/openmetrics-text; version={version}")
            assert page.status in {200, 406}
            assert (await browser.get("/metrics")).status == 200

    run(calls())


def test_it_lives_whatever_it_cannot_do() -> None:
    async def calls() -> None:
        shown = Shown()
        shown.reason = "nothing works"
        shown.may_refresh.clear()
        async with browsing(shown) as browser:
            scrape = asyncio.create_task(browser.get("/metrics"))
            await until(lambda: shown.refreshed)
            page = await browser.get("/livez")
            assert (page.status, page.text) == (200, "ok\n")
            shown.may_refresh.set()
            assert (await scrape).status == 200

    run(calls())


def test_it_is_ready_or_says_why_not() -> None:
    async def calls() -> None:
        shown = Shown()
        async with browsing(shown) as browser:
            page = await browser.get("/readyz")
            assert (page.status, page.text) == (200, "ok\n")
            shown.reason = "no BPF file system"
            page = await browser.get("/readyz")
            assert (page.status, page.text) == (503, "no BPF file system\n")

    run(calls())


def test_what_does_not_say_in_time_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "_READY_SECONDS", 0.05)

    async def calls() -> None:
        shown = Shown()
        shown.may_answer.clear()
        async with browsing(shown) as browser:
            page = await browser.get("/readyz")
            assert (page.status, page.text) == (503, "no answer within 0.05 s\n")

    run(calls())


def test_scrapes_at_once_are_one() -> None:
    async def calls() -> None:
        shown = Shown()
        shown.may_refresh.clear()
        async with browsing(shown) as browser:
            scrapes = [asyncio.create_task(browser.get("/metrics")) for _ in range(20)]
            scrapes += [asyncio.create_task(browser.get("/metrics", Accept=OPENMETRICS)) for _ in range(20)]
            await until(lambda: shown.refreshed)
            await a_while()
            assert shown.refreshed == 1
            shown.may_refresh.set()
            assert {(await scrape).status for scrape in scrapes} == {200}
            # One for each form, one after the other.
            assert (shown.refreshed, shown.most_at_once) == (2, 1)
            assert (await browser.get("/metrics")).status == 200
            assert shown.refreshed == 3

    run(calls())


def test_a_client_that_goes_takes_the_answer_from_nobody() -> None:
    async def calls() -> None:
        shown = Shown()
        shown.may_refresh.clear()
        async with browsing(shown) as browser:
            goes, stays = (asyncio.create_task(browser.get("/metrics")) for _ in range(2))
            await until(lambda: shown.refreshed)
            await a_while()
            goes.cancel()
            await asyncio.gather(goes, return_exceptions=True)
            await a_while()
            shown.may_refresh.set()
            assert (await stays).status == 200
            assert shown.refreshed == 1

    run(calls())


def attempt(address: str) -> Coroutine[None, None, None]:
    async def serve() -> None:
        async with serving(address, Shown()):
            pass

    return serve()


def test_an_address_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(KernelError) as told:
            run(attempt(address))
    assert str(told.value) == f"cannot serve metrics on {address}: Address already in use"


@pytest.mark.parametrize(
    ("address", "reason"),
    [("192.0.2.1:0", "Cannot assign requested address"), ("nowhere.invalid:0", "")],
)
def test_an_address_that_is_none_of_ours_is_one_line(address: str, reason: str) -> None:
    with pytest.raises(KernelError) as told:
        run(attempt(address))
    assert str(told.value).startswith(f"cannot serve metrics on {address}: {reason}")
    assert str(told.value).isprintable()


def test_every_address_is_both_kinds_of_ip() -> None:
    async def calls() -> None:
        with socket.create_server(("127.0.0.1", 0)) as found:
            free = found.getsockname()[1]
        async with serving(f"[::]:{free}", Shown()):
            for host in ("127.0.0.1", "::1"):
                _, writer = await asyncio.open_connection(host, free)
                writer.close()
                await writer.wait_closed()

    run(calls())


# Who holds on to connections.


async def connected(port: int, said: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    return reader, writer


async def ended(reader: asyncio.StreamReader) -> bool:
    with suppress(ConnectionError):
        return not await reader.read(1)
    return True


@pytest.mark.parametrize("said", [b"", b"GET /livez HTTP/1.1\r\nHost: "], ids=["nothing", "half a question"])
def test_who_asks_for_nothing_is_let_go_of(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(monitoring, "_IDLE_SECONDS", 0.1)

    async def calls() -> None:
        async with browsing(Shown()) as browser:
            reader, writer = await connected(browser.port, said)
            assert await ended(reader)
            writer.close()

    run(calls())


@pytest.mark.parametrize("said", [b"", b"GET ", b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n" * 20])
def test_who_comes_takes_the_place_of_who_came_first(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(monitoring, "_MOST_CONNECTIONS", 8)

    async def calls() -> None:
        async with browsing(Shown()) as browser:
            held = [await connected(browser.port, said) for _ in range(100)]
            for _ in range(3):
                assert (await browser.get("/livez")).text == "ok\n"
            for _, writer in held[:50]:
                assert await gone(writer)
            for _, writer in held:
                writer.close()

    run(calls())


def test_while_there_is_room_nobody_has_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "_MOST_CONNECTIONS", 8)

    async def calls() -> None:
        async with browsing(Shown()) as browser:
            held = [await connected(browser.port, b"") for _ in range(7)]
            assert (await browser.get("/livez")).text == "ok\n"
            for reader, writer in held:
                writer.write(b"GET /livez HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
                assert (await reader.read()).endswith(b"ok\n")
                writer.close()

    run(calls())


async def gone(writer: asyncio.StreamWriter) -> bool:
    """Whether the other end has let go of it: what is sent there sooner or later fails."""
    with suppress(ConnectionError):
        async with asyncio.timeout(2):
            while not writer.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.001)
    return True
