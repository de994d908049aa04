"""Plain values every layer speaks: protocols, frontends, backends, service ports, plans.

No behaviour beyond checks of a value against itself; nothing here knows the kernel, Kubernetes' file
formats or a socket.
"""

from nfqproxy.model.data_path import DEFAULT_MARK_MASK, DataPath, MarkMask
from nfqproxy.model.plan import (
    Action,
    Backend,
    CandidateSet,
    FrontendPlan,
    Verdict,
)
from nfqproxy.model.service import (
    ClientClass,
    Endpoint,
    Family,
    FrontendKey,
    FrontendKind,
    NodeContext,
    PodDetector,
    Protocol,
    ServicePort,
    ServicePortName,
    TrafficPolicy,
)

__all__ = [
    "DEFAULT_MARK_MASK",
    "Action",
    "Backend",
    "CandidateSet",
    "ClientClass",
    "DataPath",
    "Endpoint",
    "Family",
    "FrontendKey",
    "FrontendKind",
    "FrontendPlan",
    "MarkMask",
    "NodeContext",
    "PodDetector",
    "Protocol",
    "ServicePort",
    "ServicePortName",
    "TrafficPolicy",
    "Verdict",
]
