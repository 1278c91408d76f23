"""Bytes that are no message: a refusal for their sender, and a line in the log.

gRPC takes them for a fault of the service's own: the sender hears UNKNOWN, and the log gets twenty lines of Python.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from bpfrl.errors import InvalidValueError

log = logging.getLogger(__name__)

_REASON: Final = "the request cannot be read: its bytes are no message of this call"
_UNREADABLE: Final = object()


class Readable(grpc.aio.ServerInterceptor):
    """Keeps what cannot be read from every service of a server."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The call's handler, which is given nothing but messages."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler  # nobody's call
        parse = handler.request_deserializer

        def read(content: bytes) -> object:
            try:
                return parse(content)
            except DecodeError:
                return _UNREADABLE

        changed: dict[str, Any] = {"request_deserializer": read}
        if handler.stream_stream:
            changed["stream_stream"] = _stopping(handler.stream_stream)
        for kind in ("unary_unary", "unary_stream"):
            if behaviour := getattr(handler, kind):
                changed[kind] = _refusing(behaviour, handler_call_details.method)
        return handler._replace(**changed)


# gRPC looks what kind of function it is given: these are of the kinds that bpfrl's and the health service have.


def _refusing(behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
    async def call(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if request is _UNREADABLE:
            log.warning("refused %s from %s: %s", method.rpartition("/")[2].lower(), context.peer(), _REASON)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _REASON)
        return await behaviour(request, context)

    return call


def _stopping(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def call(requests: AsyncIterator[object], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        async with aclosing(behaviour(_messages(requests), context)) as replies:
            async for reply in replies:
                yield reply

    return call


async def _messages(requests: AsyncIterator[object]) -> AsyncIterator[object]:
    """What has come, up to the first that cannot be read."""
    async for request in requests:
        if request is _UNREADABLE:
            raise InvalidValueError(_REASON)
        yield request
