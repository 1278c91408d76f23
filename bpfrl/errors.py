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


class BrokenLimiterError(BpfrlError):
    """A folder in the bpffs that is no whole limiter."""
