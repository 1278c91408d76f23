"""What master and node say to each other: ``node.proto`` and its generated code, and the two ways into it.

:mod:`.messages` turns messages into value objects and back, :mod:`.statuses` does so for errors, :mod:`.tls` loads the
certificates that both sides hold and :mod:`.authority` makes them. :mod:`.client` is the master's side of the service;
the node's is :mod:`bpfrl.node.server`.
"""
