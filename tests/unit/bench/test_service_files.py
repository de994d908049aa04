"""The manifests on disk: the same Services whatever the form, and a change that moves one endpoint."""

from pathlib import Path

import pytest

from bench.service_files import MAX_SERVICES, ServiceFiles, Source
from nfqproxy.control.objects import Objects
from nfqproxy.errors import InputError
from nfqproxy.sources import file

OLD, NEW = "10.244.1.11", "10.244.1.12"


def written(directory: Path, source: Source, services: int = 7) -> ServiceFiles:
    directory.mkdir()
    made = ServiceFiles(directory=directory, source=source, services=services, endpoints=4)
    made.write(OLD)
    return made


def endpoints(objects: Objects) -> dict[str, list[str]]:
    return {
        slice_.name: [each.address for each in slice_.endpoints]
        for slice_ in objects.endpoint_slices
    }


@pytest.mark.parametrize("source", Source)
def test_every_form_holds_the_same_and_changes_the_last_probe(
    tmp_path: Path, source: Source
) -> None:
    files = written(tmp_path / "any", source)
    objects = file.load([files.path])
    reference = file.load([written(tmp_path / "reference", Source.DIRECTORY).path])
    assert endpoints(objects) == endpoints(reference)
    assert len(objects.services) == 7
    assert [len(each) for each in endpoints(objects).values()] == [1, 4, 4, 1, 4, 4, 1]
    by_name = {each.name: each for each in objects.services}
    probes = [by_name[f"service-0000{number}"].cluster_ips[0] for number in (0, 3, 6)]
    assert files.probes == probes
    change = files.prepare_change(NEW, others=OLD)
    assert file.load([files.path]) == objects  # not yet
    change.apply()
    assert endpoints(file.load([files.path])) == {
        **endpoints(objects),
        "service-00006-1": [NEW],
    }


def test_more_services_than_the_address_plan_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="60001 Services"):
        written(tmp_path / "any", Source.FILE, MAX_SERVICES + 1)
