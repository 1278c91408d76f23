"""Bandwidth limits for any pod on any CNI, with eBPF programs on the pod's cgroup."""

__version__ = "0.1.0"
