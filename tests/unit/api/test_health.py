"""What a health-check node port answers, byte for byte."""

import pytest

from nfqproxy.api.health import HealthAnswer


def answer(local_endpoints: int, is_proxy_healthy: bool) -> HealthAnswer:
    return HealthAnswer(
        namespace="default",
        service="web",
        local_endpoints=local_endpoints,
        is_proxy_healthy=is_proxy_healthy,
    )


def test_the_body_is_kube_proxys() -> None:
    assert answer(2, True).body == (
        b'{\n\t"service": {\n\t\t"namespace": "default",\n\t\t"name": "web"\n\t},\n'
        b'\t"localEndpoints": 2,\n\t"serviceProxyHealthy": true\n}'
    )


@pytest.mark.parametrize(
    ("local_endpoints", "is_proxy_healthy", "status"),
    [(0, True, 503), (1, True, 200), (3, True, 200), (3, False, 503), (0, False, 503)],
)
def test_status_and_weight(local_endpoints: int, is_proxy_healthy: bool, status: int) -> None:
    found = answer(local_endpoints, is_proxy_healthy)
    assert found.status == status
    assert found.headers["X-Load-Balancing-Endpoint-Weight"] == str(local_endpoints)
    assert found.headers["Content-Type"] == "application/json"
    assert found.headers["X-Content-Type-Options"] == "nosniff"
