"""A Kubernetes API server for tests: real HTTP list and watch, real history, faults on a seed.

Belongs here: what a client of the API may meet, for the few resources a node proxy reads and writes
(:mod:`resources`): versions, lists in pages, watches, bookmarks, expiry, conflicts, refusals, and the ways
a server may fail within the API's rules (:mod:`faults`). What never will: controllers, admission beyond
the defaults a proxy relies on, storage on disk. Imported by tests, the lab and the command line alone.

::

    async with ApiServer(seed=1) as server:
        server.apply(service)                  # any object, as a manifest
        server.faults.set(Fault.CUT, 0.1)      # a tenth of the watch events is cut in the middle
        write_kubeconfig(path, server)         # for any client

``tests/contract`` runs against this server and, given ``NFQPROXY_TEST_KUBECONFIG``, against a real one.
"""

from nfqproxy.testing.access import Access
from nfqproxy.testing.faults import Fault, Faults
from nfqproxy.testing.kubeconfig import kubeconfig, write_kubeconfig
from nfqproxy.testing.server import ApiServer
from nfqproxy.testing.settings import Settings

__all__ = ["Access", "ApiServer", "Fault", "Faults", "Settings", "kubeconfig", "write_kubeconfig"]
