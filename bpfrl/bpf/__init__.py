"""Everything that knows BPF.

A limiter's way through this package: :mod:`.generator` compiles ``limiter.bpf.c`` once and writes a pod's
limits (:mod:`.law`, :mod:`.layout`) and identity into the object's data; :mod:`.limiter` loads the object,
attaches it to a cgroup and pins it, and from then on works on the pins; :mod:`.sockets` gives sockets back
what the limiter took. Only :mod:`.libbpf` talks to the kernel.
"""
