"""The Kubernetes API as a source of Services, EndpointSlices, Nodes and ServiceCIDRs.

:mod:`client` speaks HTTP, with the official client's configuration and session; :mod:`decoding` makes objects
of JSON; :mod:`reflector` keeps one kind up to date by list and watch; :mod:`events` writes v1 Events;
:mod:`source` puts them together. What never belongs here: what objects mean together (``control``).

Only :mod:`client` imports the package ``kubernetes``, and only when it is used: whoever reads manifests
does not pay for it.
"""
