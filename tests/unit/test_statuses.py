from __future__ import annotations

import re
from pathlib import Path

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

import bpfrl.rpc
from bpfrl.errors import (
    AlreadyLimitedError,
    AmbiguousCgroupError,
    ApiError,
    BpfrlError,
    BrokenLimiterError,
    CertificateError,
    CgroupNotFoundError,
    ClusterError,
    CompilerError,
    DamagedTransferError,
    InvalidObjectError,
    InvalidValueError,
    KernelError,
    NotLimitedError,
    OversizedError,
    PermissionDeniedError,
    RefusedError,
    RoleError,
    TransferError,
    TransferTimeoutError,
    UnknownProgramError,
    UnreachableError,
    VerifierError,
)
from bpfrl.rpc import statuses

CODES: dict[type[BpfrlError], str] = {
    BpfrlError: "INTERNAL",
    InvalidValueError: "INVALID_ARGUMENT",
    InvalidObjectError: "INVALID_ARGUMENT",
    CompilerError: "INTERNAL",
    CgroupNotFoundError: "NOT_FOUND",
    AmbiguousCgroupError: "FAILED_PRECONDITION",
    AlreadyLimitedError: "ALREADY_EXISTS",
    PermissionDeniedError: "INTERNAL",
    KernelError: "INTERNAL",
    UnknownProgramError: "FAILED_PRECONDITION",
    VerifierError: "FAILED_PRECONDITION",
    NotLimitedError: "NOT_FOUND",
    BrokenLimiterError: "FAILED_PRECONDITION",
    TransferError: "INTERNAL",
    DamagedTransferError: "DATA_LOSS",
    OversizedError: "RESOURCE_EXHAUSTED",
    TransferTimeoutError: "DEADLINE_EXCEEDED",
    RoleError: "PERMISSION_DENIED",
    # These never come up while a node serves a call.
    CertificateError: "INTERNAL",
    ClusterError: "INTERNAL",
    ApiError: "INTERNAL",
    UnreachableError: "INTERNAL",
    RefusedError: "INTERNAL",
}
# There is no telling whether the call was carried out.
UNANSWERED = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN"}


def every_kind() -> list[type[BpfrlError]]:
    kinds: list[type[BpfrlError]] = [BpfrlError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return [kind for kind in kinds if kind.__module__ == "bpfrl.errors"]


def promised() -> set[str]:
    """The codes that the comment at the head of node.proto explains."""
    source = Path(bpfrl.rpc.__file__).with_name("node.proto").read_text()
    head = source.partition("\nsyntax")[0]
    return set(re.findall(r"^//   ([A-Z_]+)  +\S", head, re.MULTILINE))


def ended(code: grpc.StatusCode, details: str | None) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(), details)


def test_every_error_goes_out_with_a_code() -> None:
    assert {kind: statuses.code_of(kind("a reason")).name for kind in every_kind()} == CODES


def test_the_codes_are_those_that_the_protocol_explains() -> None:
    assert "INVALID_ARGUMENT" in promised()
    assert promised() == set(CODES.values())


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_a_call_ends_in_a_refusal_or_in_not_knowing(code: grpc.StatusCode) -> None:
    error = statuses.error_of("10.0.0.1:10002", ended(code, "a reason"))
    if code.name in UNANSWERED:
        assert isinstance(error, UnreachableError)
        assert str(error) == "node 10.0.0.1:10002: a reason"
    else:
        assert isinstance(error, RefusedError)
        assert (str(error), error.code) == ("a reason", code.name)


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ("two\nlines", "two lines"),
        (" \t much \r\n\n room\x0b ", "much room"),
        ("", "no reason given"),
        (None, "no reason given"),
    ],
)
def test_what_a_node_says_is_one_line(details: str | None, text: str) -> None:
    refused = statuses.error_of("n", ended(grpc.StatusCode.INTERNAL, details))
    assert str(refused) == text
    unreachable = statuses.error_of("n", ended(grpc.StatusCode.UNAVAILABLE, details))
    assert str(unreachable) == f"node n: {text}"
