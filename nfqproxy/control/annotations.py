"""The ``nfqproxy.io/*`` annotations: their names and the values they may hold.

Each ``parse_*`` raises ValueError with a clause that says what is wrong and what would be right;
the caller adds the object and the annotation's name.
"""

import json
from collections.abc import Mapping

from nfqproxy.control.address import canonical_ip

PREFIX = "nfqproxy.io/"
STEER = PREFIX + "steer"
BALANCER = PREFIX + "balancer"
BALANCER_OPTIONS = PREFIX + "balancer-options"
WEIGHTS = PREFIX + "weights"
SLOW_START = PREFIX + "slow-start"
AFFINITY_KEY = PREFIX + "affinity-key"
SHADOW_BALANCER = PREFIX + "shadow-balancer"
WEIGHT = PREFIX + "weight"

ON_SERVICE = frozenset(
    {STEER, BALANCER, BALANCER_OPTIONS, WEIGHTS, SLOW_START, AFFINITY_KEY, SHADOW_BALANCER}
)
ON_ENDPOINT_SLICE = frozenset({WEIGHT})

ZONE_PREFIX = "zone:"

MAX_WEIGHT = 2**31 - 1
"""Weights are added up and compared as machine integers by balancers; nobody needs more."""


def is_steered(labels: Mapping[str, str], annotations: Mapping[str, str]) -> bool:
    """Whether the label or the annotation ``nfqproxy.io/steer`` is "true" (overlay mode)."""
    return labels.get(STEER) == "true" or annotations.get(STEER) == "true"


def parse_steer(text: str) -> bool:
    """``"true"`` or ``"false"``."""
    if text not in ("true", "false"):
        raise ValueError(f'must be "true" or "false", not "{text}"')
    return text == "true"


def parse_weight(text: str) -> int:
    """One weight for all endpoints of an EndpointSlice; 0 drains them."""
    if not text.isascii() or not text.isdecimal() or int(text) > MAX_WEIGHT:
        raise ValueError(f'must be an integer from 0 to {MAX_WEIGHT}, not "{text}"')
    return int(text)


def parse_weights(text: str) -> dict[str, int]:
    """Weights by endpoint IP (made canonical), targetRef name, node name or ``zone:NAME``."""
    members = _json_object(text, '{"10.244.1.10": 3, "zone:z1": 1}')
    weights: dict[str, int] = {}
    for key, value in members.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_WEIGHT:
            shown = json.dumps(value)
            raise ValueError(
                f'the weight of "{key}" must be an integer from 0 to {MAX_WEIGHT}, not {shown}'
            )
        name = _canonical_key(key)
        if name in weights:
            raise ValueError(f'"{key}" is given twice')
        weights[name] = value
    return weights


def parse_balancer_options(text: str) -> dict[str, object]:
    """The options of the balancer; which exist is the balancer's own business."""
    return _json_object(text, '{"table_size": 65537}')


def _canonical_key(key: str) -> str:
    if key in ("", ZONE_PREFIX):
        raise ValueError(f'"{key}" names nothing: give an IP, a pod, a node or zone:NAME')
    if key.startswith(ZONE_PREFIX):
        return key
    try:
        return canonical_ip(key)
    except ValueError:
        return key


def _json_object(text: str, example: str) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(pairs)
        if len(members) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f'"{twice}" is given twice')
        return members

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"must be JSON such as {example}: {error.msg} at character {error.pos + 1}"
        ) from None
    except RecursionError:
        raise ValueError(f"must be JSON such as {example}: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object such as {example}")
    return value
