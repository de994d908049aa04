"""The paths below /nfqproxy/: what the Python API does to a server, for one in another process.

| request | does |
|---|---|
| GET /nfqproxy/state | rates and counts of the faults, requests so far, open watches, revision |
| PUT /nfqproxy/faults | sets rates: ``{"cut": 0.1, "500": 0}`` |
| POST /nfqproxy/settle | switches all faults off and takes back what they left |
| POST /nfqproxy/compact | forgets the history |
| POST /nfqproxy/restart | ``{"down_s": 0.5, "is_compacted": true}``, both may be left out |
| POST /nfqproxy/deny, allow | ``{"verb": "list", "plural": "services", "user": "proxy"}``; what is left out: any |
| POST /nfqproxy/apply | writes a manifest whole, status and all |

No real server has them; who may use the API may use them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nfqproxy.errors import InputError
from nfqproxy.testing.status import ApiError, bad_request, page_not_found

if TYPE_CHECKING:
    from nfqproxy.testing.server import ApiServer

__all__ = ["PREFIX", "carry_out"]

PREFIX = "/nfqproxy/"


def carry_out(server: "ApiServer", method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked and answer with the state; ApiError (400, 404) if it cannot be."""
    orders: dict[tuple[str, str], Callable[[], object]] = {
        ("GET", "state"): lambda: None,
        ("PUT", "faults"): lambda: server.faults.set_all(body),
        ("POST", "settle"): server.settle,
        ("POST", "compact"): server.store.compact,
        ("POST", "restart"): lambda: server.restart_soon(**body),
        ("POST", "deny"): lambda: server.access.deny(**body),
        ("POST", "allow"): lambda: server.access.allow(**body),
        ("POST", "apply"): lambda: server.apply(body),
    }
    order = orders.get((method, path.removeprefix(PREFIX)))
    if order is None:
        raise page_not_found()
    try:
        order()
    except ApiError:
        raise
    except (InputError, TypeError, ValueError) as error:
        raise bad_request(str(error)) from None
    return {
        "faults": server.faults.rates(),
        "counts": {str(fault): count for fault, count in server.faults.counts.items()},
        "requests": {f"{verb} {plural}": n for (verb, plural), n in server.requests.items()},
        "watches": {plural: n for plural, n in server.watches.items() if n},
        "revision": server.store.revision,
        "compacted": server.store.compacted,
    }
