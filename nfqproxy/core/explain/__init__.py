"""``explain``: what happens to the first packet of a connection, and why.

Here belong the question (:mod:`packet`), the answer (:mod:`explanation`), the way from one to the
other by the worker's own plans (:mod:`explainer`) and the words for it (:mod:`story`,
:mod:`candidates`). What never will: a decision of its own. Whatever a packet experiences is decided in
``core.plans``, ``core.sources`` and the balancers; here it is only looked up and told.
"""

from nfqproxy.core.explain.explainer import Explainer
from nfqproxy.core.explain.explanation import Candidate, Explanation, MatchedFrontend
from nfqproxy.core.explain.packet import Packet, parse_packet

__all__ = ["Candidate", "Explainer", "Explanation", "MatchedFrontend", "Packet", "parse_packet"]
