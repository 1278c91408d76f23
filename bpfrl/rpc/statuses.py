"""Errors as gRPC statuses, and back: what ``node.proto`` says of each code."""

from __future__ import annotations

from typing import Final

import grpc

from bpfrl.errors import (
    AlreadyLimitedError,
    AmbiguousCgroupError,
    BpfrlError,
    BrokenLimiterError,
    CgroupNotFoundError,
    DamagedTransferError,
    InvalidObjectError,
    InvalidValueError,
    NotLimitedError,
    OversizedError,
    RefusedError,
    RoleError,
    TransferTimeoutError,
    UnknownProgramError,
    UnreachableError,
    VerifierError,
)

_CODES: Final[dict[type[BpfrlError], grpc.StatusCode]] = {
    InvalidValueError: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidObjectError: grpc.StatusCode.INVALID_ARGUMENT,
    CgroupNotFoundError: grpc.StatusCode.NOT_FOUND,
    NotLimitedError: grpc.StatusCode.NOT_FOUND,
    DamagedTransferError: grpc.StatusCode.DATA_LOSS,
    OversizedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TransferTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
    AlreadyLimitedError: grpc.StatusCode.ALREADY_EXISTS,
    UnknownProgramError: grpc.StatusCode.FAILED_PRECONDITION,
    VerifierError: grpc.StatusCode.FAILED_PRECONDITION,
    BrokenLimiterError: grpc.StatusCode.FAILED_PRECONDITION,
    AmbiguousCgroupError: grpc.StatusCode.FAILED_PRECONDITION,
    RoleError: grpc.StatusCode.PERMISSION_DENIED,
}
# The node has not answered, or not to the end: whether the call was carried out is not known.
_UNANSWERED: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
    }
)

# What gRPC makes of a call that ends while the caller writes, whatever the node may have said.
_CUT_OFF: Final = "Internal error from Core"
# In TLS 1.3 whoever is refused learns no more than that.
_HUNG_UP: Final = "Socket closed"


def code_of(error: BpfrlError) -> grpc.StatusCode:
    """The code that an error goes out with."""
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL)


def error_of(node: str, error: grpc.aio.AioRpcError) -> UnreachableError | RefusedError:
    """The error that a call to a node has ended with."""
    code, text = error.code(), " ".join((error.details() or "no reason given").split())
    if code in _UNANSWERED or text == _CUT_OFF:
        hint = " (its log says why, if it refuses this certificate)" if text.endswith(_HUNG_UP) else ""
        return UnreachableError(f"node {node}: {text}{hint}")
    return RefusedError(text, code.name)
