"""What can go wrong, in one line each.

Everything bpfrl raises on purpose is a :class:`BpfrlError` whose text is one line that says what was
wrong and what would be right. The command line prints that line and exits with 1 (2 for
:class:`InvalidValueError`, which is a mistake in what was typed); a caller of the library tells the cases
apart by class.
"""


class BpfrlError(Exception):
    """Base of all errors that bpfrl raises on purpose."""


class InvalidValueError(BpfrlError, ValueError):
    """A rate, size, UID, name or combination of limits that cannot be."""


class InvalidObjectError(BpfrlError):
    """Bytes that are not a limiter of this version's layout."""


class UnknownProgramError(BpfrlError):
    """A limiter that is not this version's own, where nothing else is taken."""


class CompilerError(BpfrlError):
    """clang is missing, or did not accept the programs."""


class CgroupNotFoundError(BpfrlError):
    """No cgroup here for this pod."""


class AmbiguousCgroupError(BpfrlError):
    """Several cgroups could be this pod's."""


class AlreadyLimitedError(BpfrlError):
    """Another limiter holds this cgroup, or one above or below it."""


class PermissionDeniedError(BpfrlError):
    """Needs root, or a capability that was taken away."""


class KernelError(BpfrlError):
    """The kernel refused; the text ends with its reason or the verifier's last lines."""


class VerifierError(KernelError):
    """The kernel's verifier refused the programs; the text ends with its last lines."""


class NotLimitedError(BpfrlError):
    """The pod has no limiter to change."""


class BrokenLimiterError(BpfrlError):
    """A folder in the bpffs that is no whole limiter."""


class TransferError(BpfrlError):
    """Base of what can go wrong while a program is on its way to a node."""


class DamagedTransferError(TransferError):
    """More bytes, fewer, or other ones than were announced."""


class OversizedError(TransferError):
    """A program larger than any limiter."""


class TransferTimeoutError(TransferError):
    """A program that was announced and did not come."""


class RoleError(BpfrlError):
    """A certificate that is valid, and for something else."""


class CertificateError(BpfrlError):
    """Certificates or keys that are missing, unreadable, or do not belong together."""


class ClusterError(BpfrlError):
    """No way to the cluster's API server is configured, or the manifests' folder is not there."""


class ApiError(BpfrlError):
    """The API server did not answer, or said no.

    Attributes:
        status: the HTTP status; 0 without an answer.
        retry_after: how long it asks to be left alone, s.
    """

    def __init__(self, reason: str, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after = retry_after


class UnreachableError(BpfrlError):
    """A node that does not answer; whether it has done what was asked is not known."""


class RefusedError(BpfrlError):
    """A node that has said no.

    Attributes:
        code: the name of the gRPC status code, as ``node.proto`` explains them.
    """

    def __init__(self, reason: str, code: str = "UNKNOWN") -> None:
        super().__init__(reason)
        self.code = code
