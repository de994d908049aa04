"""nfqproxy: a Kubernetes node proxy whose choice is Python and whose data path is the kernel.

The first packet of a connection to a Service goes through NFQUEUE to a Python worker. The worker
picks a backend, installs the connection's conntrack entry with its NAT by ctnetlink, and accepts
the packet. Every later packet stays in the kernel.
"""

__version__ = "0.1.0"
