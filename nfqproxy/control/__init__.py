"""The control plane's pure half: from Kubernetes objects to the service table.

Here belong the objects as values (:mod:`objects`), the join of Services with their EndpointSlices
(:mod:`table`), the two candidate sets (:mod:`topology`), the node's own facts (:mod:`node`) and
the meaning of the ``nfqproxy.io/*`` annotations (:mod:`annotations`). What never will: reading
files or the API server (``sources``), the decision for a packet (``core``), sockets, clocks,
tasks.
"""
