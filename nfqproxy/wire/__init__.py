"""Codecs of the bytes the proxy exchanges with the kernel and reads from packets.

Here belong only pure functions and frozen values: netlink framing (``nlmsg``), the nfnetlink
header (``nfnetlink``), packet queues (``nfqueue``), conntrack entries (``conntrack``,
``ctnetlink``), routes and addresses (``rtnetlink``), IP and transport headers (``packet``).
Sockets, clocks, retries and policy never do.

Bounds are checked everywhere: bytes that do not parse raise ``nfqproxy.errors.CodecError`` and
nothing else. Addresses are packed bytes (4 or 16) in network order, ports and numbers are host
integers. Encoders return one whole netlink message, ready to be joined with others in one ``send``.
"""
