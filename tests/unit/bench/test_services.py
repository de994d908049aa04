import pytest

from bench.services import MAX_SERVICES, PORT, VIP, Endpoint, ServicePort, table
from nfqproxy.errors import InputError

MEASURED = ServicePort(
    name="web", address=VIP, port=PORT, endpoints=(Endpoint(address="10.244.1.10", port=8080),)
)


@pytest.mark.parametrize("services", [1, 2, 101, MAX_SERVICES])
def test_the_measured_service_is_the_average_one_of_the_table(services: int) -> None:
    made = table(MEASURED, services)
    assert len(made) == services
    assert made.index(MEASURED) == (services - 1) // 2
    addresses = [service.address for service in made]
    endpoints = [str(endpoint) for service in made for endpoint in service.endpoints]
    assert len(set(addresses)) == services
    assert len(set(endpoints)) == len(endpoints) == 1 + 3 * (services - 1)
    assert all(address.startswith("10.96.") for address in addresses)
    assert all(endpoint.startswith("10.244.") for endpoint in endpoints)


@pytest.mark.parametrize("services", [0, MAX_SERVICES + 1])
def test_a_table_beyond_the_address_plan_is_refused(services: int) -> None:
    with pytest.raises(InputError, match=f"{services} Services"):
        table(MEASURED, services)
