# ruff: noqa: E501 - the table of faults and the manifests read better unbroken
import copy
import logging

import pytest
import yaml

from nfqproxy.control.objects import (
    EndpointSlice,
    Node,
    Service,
    ServiceCidr,
    ServicePortSpec,
    SliceEndpoint,
    SlicePort,
)
from nfqproxy.errors import ManifestError
from nfqproxy.model import Family, Protocol, TrafficPolicy
from nfqproxy.sources.decode import decode
from nfqproxy.sources.fields import Context

FILE = Context("m.yaml")

SERVICE = """
apiVersion: v1
kind: Service
metadata:
  annotations:
    kubectl.kubernetes.io/last-applied-configuration: "{}"
    nfqproxy.io/balancer: maglev
    nfqproxy.io/weights: '{"n1": 3, "zone:z1": 0}'
  creationTimestamp: "2026-01-02T03:04:05Z"
  finalizers: [service.kubernetes.io/load-balancer-cleanup]
  generateName: w
  labels: {app: web, nfqproxy.io/steer: "true"}
  managedFields:
  - {apiVersion: v1, fieldsType: FieldsV1, fieldsV1: {"f:spec": {}}, manager: kubectl, operation: Update}
  name: web
  namespace: shop
  ownerReferences: []
  resourceVersion: "123"
  uid: 6f1d1c39
spec:
  allocateLoadBalancerNodePorts: true
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:10:96::0010"]
  externalIPs: [203.0.113.9]
  externalTrafficPolicy: Local
  healthCheckNodePort: 30999
  internalTrafficPolicy: Cluster
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: PreferDualStack
  loadBalancerClass: example.com/lb
  loadBalancerIP: ""
  loadBalancerSourceRanges: [" 192.0.2.0/24 ", 10.1.2.3/8, nonsense]
  ports:
  - {appProtocol: http, name: http, nodePort: 30080, port: 80, protocol: TCP, targetPort: http}
  - {name: dns, port: 53, protocol: UDP, targetPort: 5353}
  - {name: sig, port: 2905, protocol: SCTP}
  publishNotReadyAddresses: false
  selector: {app: web}
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 600}}
  trafficDistribution: PreferClose
  type: LoadBalancer
status:
  conditions: []
  loadBalancer:
    ingress:
    - {ip: 198.51.100.7, ipMode: VIP, ports: [{port: 80, protocol: TCP}]}
    - {ip: 198.51.100.8}
    - {ip: 198.51.100.9, ipMode: Proxy}
    - {hostname: lb.example.com}
"""

SLICE = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-abc12
  namespace: shop
  annotations: {nfqproxy.io/weight: "4", endpoints.kubernetes.io/last-change-trigger-time: "2026-01-02T03:04:05Z"}
  labels: {kubernetes.io/service-name: web, endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io}
addressType: IPv4
endpoints:
- addresses: [10.244.1.010, 10.244.1.11]
  conditions: {ready: true, serving: true, terminating: false}
  deprecatedTopology: {a: b}
  hints: {forZones: [{name: z1}], forNodes: [{name: n1}]}
  hostname: web-0
  nodeName: n1
  targetRef: {kind: Pod, name: web-0, namespace: shop, uid: 8f, resourceVersion: "5"}
  zone: z1
- addresses: [10.244.2.10]
  conditions: {ready: false, serving: true, terminating: true}
- addresses: [10.244.2.11]
  conditions: {ready: null}
- addresses: [10.244.2.12]
ports:
- {name: http, port: 8080, protocol: TCP, appProtocol: http}
- {name: "", port: 1}
- {name: none, port: null}
- {name: zero, port: 0}
- {port: 9}
"""

NODE = """
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/zone: z1}, deletionTimestamp: "2026-01-02T03:04:05Z"}
spec:
  podCIDR: 10.244.1.0/24
  podCIDRs: [10.244.1.0/24, "fd00:10:244:1::/64"]
  providerID: kind://docker/n1
  taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule, value: "1"}]
status:
  addresses:
  - {type: InternalIP, address: 192.0.2.1}
  - {type: Hostname, address: n1}
  - {type: ExternalIP, address: 203.0.113.1}
  - {type: InternalIP, address: "2001:db8:2::1"}
  capacity: {cpu: "2"}
  nodeInfo: {kernelVersion: 6.18.0}
"""

CIDR = """
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: kubernetes}
spec: {cidrs: [10.96.0.0/16, "fd00:10:96::/112"]}
status: {conditions: [{type: Ready, status: "True"}]}
"""


def read(text, context=FILE):
    return decode(yaml.safe_load(text), context)


def test_a_service_with_every_field_as_kubectl_prints_it(caplog):
    found = read(SERVICE)
    assert isinstance(found, Service)
    expected = {
        "namespace": "shop",
        "name": "web",
        "origin": "m.yaml",
        "type": "LoadBalancer",
        "cluster_ips": ("10.96.0.10", "fd00:10:96::10"),
        "ports": (
            ServicePortSpec(name="http", port=80, node_port=30080),
            ServicePortSpec(name="dns", port=53, protocol=Protocol.UDP),
            ServicePortSpec(name="sig", port=2905, protocol=Protocol.SCTP),
        ),
        "external_ips": ("203.0.113.9",),
        "load_balancer_ips": ("198.51.100.7", "198.51.100.8"),
        "load_balancer_source_ranges": ("192.0.2.0/24", "10.0.0.0/8"),
        "internal_policy": TrafficPolicy.CLUSTER,
        "external_policy": TrafficPolicy.LOCAL,
        "affinity_timeout_s": 600,
        "health_check_node_port": 30999,
        "labels": {"app": "web", "nfqproxy.io/steer": "true"},
        "weights": {"n1": 3, "zone:z1": 0},
    }
    assert {name: getattr(found, name) for name in expected} == expected
    assert set(found.annotations) == {"nfqproxy.io/balancer", "nfqproxy.io/weights"}
    assert [record.getMessage() for record in caplog.records] == [
        'm.yaml: Service shop/web: spec.loadBalancerSourceRanges[2]: "nonsense" is not a CIDR '
        "such as 10.0.0.0/8; the entry is ignored"
    ]


def test_the_defaults_of_a_service():
    found = read("{apiVersion: v1, kind: Service, metadata: {name: web}, "
                 "spec: {clusterIP: 10.96.0.10, ports: [{port: 80}], sessionAffinity: null}}")  # fmt: skip
    assert found == Service(
        namespace="default",
        name="web",
        origin="m.yaml",
        cluster_ips=("10.96.0.10",),
        ports=(ServicePortSpec(port=80),),
    )


def test_affinity_without_a_time_out_lasts_three_hours():
    found = read("{apiVersion: v1, kind: Service, metadata: {name: web}, "
                 "spec: {clusterIP: 10.96.0.10, sessionAffinity: ClientIP}}")  # fmt: skip
    assert found.affinity_timeout_s == 10_800


@pytest.mark.parametrize(
    ("spec", "expected", "warned"),
    [
        ("{clusterIP: None}", (), False),
        ("{clusterIPs: [None]}", (), False),
        ("{type: ExternalName, externalName: example.com}", (), False),
        ("{clusterIPs: [10.96.0.1]}", ("10.96.0.1",), False),
        ("{}", (), True),
        ('{clusterIP: ""}', (), True),
    ],
)
def test_cluster_ips(spec, expected, warned, caplog):
    found = read(f"{{apiVersion: v1, kind: Service, metadata: {{name: web}}, spec: {spec}}}")
    assert found.cluster_ips == expected
    assert ["has no spec.clusterIP" in r.getMessage() for r in caplog.records] == [True] * warned


def test_a_slice_with_every_field_as_kubectl_prints_it(caplog):
    found = read(SLICE)
    assert isinstance(found, EndpointSlice)
    assert (found.namespace, found.name, found.service) == ("shop", "web-abc12", "web")
    assert found.family is Family.IPV4
    assert found.weight == 4
    assert found.ports == (SlicePort(name="http", port=8080), SlicePort(name="", port=1))
    assert found.endpoints == (
        SliceEndpoint(
            address="10.244.1.10",
            node="n1",
            zone="z1",
            target_name="web-0",
            zone_hints=("z1",),
            node_hints=("n1",),
        ),
        SliceEndpoint(address="10.244.2.10", ready=False, serving=True, terminating=True),
        SliceEndpoint(address="10.244.2.11"),
        SliceEndpoint(address="10.244.2.12"),
    )
    assert [record.getMessage().split(": ", 2)[2][:20] for record in caplog.records] == [
        "ports[2] has no port",
        "ports[3] has no port",
        "ports[4] has no name",
    ]


def test_an_empty_slice_as_kubectl_prints_it():
    found = read("{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv6, "
                 "metadata: {name: a, labels: {kubernetes.io/service-name: web}}, endpoints: null, ports: null}")  # fmt: skip
    assert (found.endpoints, found.ports, found.weight) == ((), (), None)


def test_a_slice_of_names_is_ignored():
    text = ("{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: FQDN, "
            "metadata: {name: a}, endpoints: [{addresses: [example.com]}]}")  # fmt: skip
    assert read(text) is None


def test_a_node_and_a_service_cidr():
    found = read(NODE)
    assert found == Node(
        name="n1",
        origin="m.yaml",
        labels={"topology.kubernetes.io/zone": "z1"},
        pod_cidrs=("10.244.1.0/24", "fd00:10:244:1::/64"),
        internal_ips=("192.0.2.1", "2001:db8:2::1"),
        external_ips=("203.0.113.1",),
        taints=("ToBeDeletedByClusterAutoscaler",),
        deleting=True,
    )
    cidr = ServiceCidr(
        name="kubernetes", origin="m.yaml", cidrs=("10.96.0.0/16", "fd00:10:96::/112")
    )
    assert read(CIDR) == cidr
    assert read(CIDR.replace("io/v1", "io/v1beta1")) == cidr


@pytest.mark.parametrize(
    "text",
    [
        "{apiVersion: apps/v1, kind: Deployment, metadata: {name: web}, anything: [1]}",
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: web}}",
        "{apiVersion: serving.knative.dev/v1, kind: Service, metadata: {name: web}, spec: {x: 1}}",
    ],
)
def test_other_kinds_are_ignored_with_a_line(text, caplog):
    caplog.set_level(logging.INFO)
    assert read(text) is None
    assert "default/web is not used by the proxy" in caplog.text


def change(text, path, value):
    """The document with the field at this path (a list of keys) set."""
    document = copy.deepcopy(yaml.safe_load(text))
    place = document
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


SVC, SL, NO, CI = (
    "Service shop/web",
    "EndpointSlice shop/web-abc12",
    "Node n1",
    "ServiceCIDR kubernetes",
)
PORT = ["spec", "ports", 0]
WEIGHTS = ["metadata", "annotations", "nfqproxy.io/weights"]
INGRESS = ["status", "loadBalancer", "ingress", 0]


@pytest.mark.parametrize(
    ("text", "path", "value", "name", "field", "problem"),
    [
        # ports
        (SERVICE, [*PORT, "port"], 70000, SVC, "spec.ports[0].port", "70000 is out of range; give 1 to 65535"),
        (SERVICE, [*PORT, "port"], 0, SVC, "spec.ports[0].port", "0 is out of range"),
        (SERVICE, [*PORT, "port"], ..., SVC, "spec.ports[0].port", "is missing"),
        (SERVICE, [*PORT, "port"], "80", SVC, "spec.ports[0].port", "must be an integer, not a string"),
        (SERVICE, [*PORT, "port"], True, SVC, "spec.ports[0].port", "must be an integer, not true or false"),
        (SERVICE, [*PORT, "nodePort"], -1, SVC, "spec.ports[0].nodePort", "-1 is out of range; give 0 to 65535"),
        (SERVICE, [*PORT, "targetPort"], 65536, SVC, "spec.ports[0].targetPort", "65536 is out of range"),
        (SERVICE, [*PORT, "protocol"], "tcp", SVC, "spec.ports[0].protocol", 'did you mean "TCP"?'),
        (SERVICE, [*PORT, "protocol"], "ICMP", SVC, "spec.ports[0].protocol", "known are SCTP, TCP, UDP"),
        (SERVICE, [*PORT, "name"], "dns", SVC, "spec.ports[1].name", "names an earlier port"),
        (SERVICE, [*PORT, "name"], ..., SVC, "spec.ports[0].name", "names each"),
        (SERVICE, ["spec", "ports", 1], {"name": "x", "port": 80}, SVC, "spec.ports[1].port", "80/TCP is an earlier port"),
        (SERVICE, ["spec", "healthCheckNodePort"], 65536, SVC, "spec.healthCheckNodePort", "out of range"),
        (SLICE, ["ports", 0, "port"], 65536, SL, "ports[0].port", "out of range"),
        # unknown fields
        (SERVICE, ["spec", "clusterip"], "x", SVC, "spec.clusterip", 'unknown field, did you mean "clusterIP"?'),
        (SERVICE, [*PORT, "nodeport"], 1, SVC, "spec.ports[0].nodeport", 'did you mean "nodePort"?'),
        (SERVICE, ["metadata", "lables"], {}, SVC, "metadata.lables", 'did you mean "labels"?'),
        (SERVICE, ["zzz"], 1, SVC, "zzz", "known are apiVersion, kind, metadata, spec, status"),
        (SERVICE, [*INGRESS, "ipmode"], "VIP", SVC, "status.loadBalancer.ingress[0].ipmode", 'did you mean "ipMode"?'),
        (SLICE, ["endpoints", 1, "conditions", "redy"], True, SL, "endpoints[1].conditions.redy", 'did you mean "ready"?'),
        (SLICE, ["endpoints", 0, "hints", "forZones", 0, "zone"], "z", SL, "endpoints[0].hints.forZones[0].zone", "unknown field"),
        (SLICE, ["spec"], {}, SL, "spec", "unknown field"),
        (NODE, ["spec", "podCidr"], "x", NO, "spec.podCidr", 'did you mean "podCIDR"?'),
        (SERVICE, ["spec", 1], "x", SVC, "spec", "the key 1 must be a string"),
        # types
        (SERVICE, ["spec", "ports"], {}, SVC, "spec.ports", "must be a list, not a mapping"),
        (SERVICE, ["spec"], [], SVC, "spec", "must be a mapping, not a list"),
        (SERVICE, ["metadata", "labels", "x"], 1, SVC, "metadata.labels[...]", "must be a string, not an integer; put it in quotes"),
        (SERVICE, ["spec", "clusterIP"], 10.96, SVC, "spec.clusterIP", "must be a string, not a fraction"),
        (SLICE, ["endpoints", 0, "conditions", "ready"], "yes", SL, "endpoints[0].conditions.ready", "must be true or false, not a string"),
        (SLICE, ["endpoints", 0, "addresses", 0], None, SL, "endpoints[0].addresses[0]", "must be a string, not empty"),
        # addresses
        (SERVICE, ["spec", "clusterIP"], "10.96.0.300", SVC, "spec.clusterIP", "is not an IP address"),
        (SERVICE, ["spec", "clusterIP"], "10.96.0.11", SVC, "spec.clusterIPs[0]", "must equal spec.clusterIP"),
        (SERVICE, ["spec", "clusterIPs", 1], "10.96.0.11", SVC, "spec.clusterIPs", "two addresses of one family"),
        (SERVICE, ["spec", "externalIPs", 0], "web", SVC, "spec.externalIPs[0]", '"web" is not an IP address'),
        (SERVICE, [*INGRESS, "ip"], "1.2.3", SVC, "status.loadBalancer.ingress[0].ip", "is not an IP address"),
        (SERVICE, ["spec", "externalIPs", 0], "127.0.0.1", SVC, "spec.externalIPs", "127.0.0.1 is a loopback address"),
        (SERVICE, ["spec", "externalIPs", 0], "::1", SVC, "spec.externalIPs", "::1 is a loopback address"),
        (SERVICE, ["spec", "externalIPs", 0], "::", SVC, "spec.externalIPs", ":: is the unspecified address"),
        (SERVICE, ["spec", "externalIPs", 0], "fe80::1", SVC, "spec.externalIPs", "fe80::1 is a link-local address"),
        (SLICE, ["endpoints", 0, "addresses", 0], "0.0.0.0", SL, "endpoints[0].addresses[0]", "is the unspecified address"),
        (SLICE, ["endpoints", 0, "addresses", 0], "127.0.0.53", SL, "endpoints[0].addresses[0]", "is a loopback address"),
        (SLICE, ["endpoints", 0, "addresses", 0], "169.254.169.254", SL, "endpoints[0].addresses[0]", "is a link-local address"),
        (SLICE, ["endpoints", 0, "addresses", 0], "224.0.0.251", SL, "endpoints[0].addresses[0]", "is a link-local multicast address"),
        (SLICE, ["endpoints", 1, "addresses", 0], "fd00::1", SL, "endpoints[1].addresses[0]", "fd00::1 is not of the slice's addressType IPv4"),
        (SLICE, ["endpoints", 0, "addresses", 1], "fd00::1", SL, "endpoints[0].addresses[1]", "move it to a slice of addressType IPv6"),
        (SLICE, ["addressType"], "IPv6", SL, "endpoints[0].addresses[0]", "move it to a slice of addressType IPv4"),
        (SLICE, ["endpoints", 0, "addresses"], [], SL, "endpoints[0].addresses", "is empty"),
        (SLICE, ["addressType"], "ipv4", SL, "addressType", 'did you mean "IPv4"?'),
        (SLICE, ["addressType"], ..., SL, "addressType", "is missing"),
        (NODE, ["status", "addresses", 0, "address"], "x", NO, "status.addresses[0].address", "is not an IP address"),
        (NODE, ["spec", "podCIDRs", 1], "fd00::", NO, "spec.podCIDRs[1]", "is not a CIDR"),
        (CIDR, ["spec", "cidrs"], [], CI, "spec.cidrs", "is missing"),
        # words
        (SERVICE, ["spec", "type"], "Nodeport", SVC, "spec.type", 'did you mean "NodePort"?'),
        (SERVICE, ["spec", "externalTrafficPolicy"], "local", SVC, "spec.externalTrafficPolicy", 'did you mean "Local"?'),
        (SERVICE, ["spec", "internalTrafficPolicy"], "Node", SVC, "spec.internalTrafficPolicy", "known are Cluster, Local"),
        (SERVICE, ["spec", "sessionAffinity"], "clientIp", SVC, "spec.sessionAffinity", 'did you mean "ClientIP"?'),
        (SERVICE, ["spec", "sessionAffinityConfig", "clientIP", "timeoutSeconds"], 86401, SVC, "spec.sessionAffinityConfig.clientIP.timeoutSeconds", "give 1 to 86400"),
        (SERVICE, [*INGRESS, "ipMode"], "vip", SVC, "status.loadBalancer.ingress[0].ipMode", 'did you mean "VIP"?'),
        # annotations
        (SERVICE, WEIGHTS, '{"n1": -1}', SVC, "metadata.annotations[nfqproxy.io/weights]", 'the weight of "n1" must be an integer from 0'),
        (SERVICE, ["metadata", "annotations", "nfqproxy.io/wieghts"], "{}", SVC, "metadata.annotations[nfqproxy.io/wieghts]", 'did you mean "nfqproxy.io/weights"?'),
        (SERVICE, ["metadata", "annotations", "nfqproxy.io/balancer-options"], "[]", SVC, "metadata.annotations[nfqproxy.io/balancer-options]", "must be a JSON object"),
        (SERVICE, ["metadata", "annotations", "nfqproxy.io/steer"], "yes", SVC, "metadata.annotations[nfqproxy.io/steer]", 'must be "true" or "false"'),
        (SLICE, ["metadata", "annotations", "nfqproxy.io/weight"], "-1", SL, "metadata.annotations[nfqproxy.io/weight]", "must be an integer from 0"),
        # identity
        (SERVICE, ["metadata", "name"], ..., "Service", "metadata.name", "is missing"),
        (SERVICE, ["metadata", "name"], "a/b", "Service shop/a/b", "metadata.name", "is no Kubernetes name"),
        (SERVICE, ["metadata", "namespace"], "Shop", "Service Shop/web", "metadata.namespace", "is no Kubernetes name"),
        (SERVICE, ["metadata"], None, "Service", "metadata.name", "is missing"),
        (SERVICE, ["spec"], ..., SVC, "spec", "is missing"),
        (SERVICE, ["apiVersion"], "v2", SVC, "apiVersion", '"v2" is not read; write v1'),
        (SLICE, ["apiVersion"], "discovery.k8s.io/v1beta1", SL, "apiVersion", "write discovery.k8s.io/v1"),
        (SERVICE, ["kind"], ..., "object shop/web", "kind", "is missing"),
        (SERVICE, ["apiVersion"], 1, SVC, "apiVersion", "must be a string"),
    ],
)  # fmt: skip
def test_a_fault_names_file_object_field_and_problem(text, path, value, name, field, problem):
    with pytest.raises(ManifestError) as caught:
        decode(change(text, path, value), FILE)
    error = caught.value
    assert (error.file, error.object_name, error.field) == ("m.yaml", name, field)
    assert problem in error.problem
    assert str(error) == f"m.yaml: {name}: {field}: {error.problem}"


@pytest.mark.parametrize("address", ["fe8::1", "::1:2", "12.0.0.1", "224.0.1.1", "ff0e::1"])
def test_an_external_ip_may_look_like_a_special_one(address):
    assert decode(change(SERVICE, ["spec", "externalIPs", 0], address), FILE)


@pytest.mark.parametrize("document", [None, 1, "text", [], [{}]])
def test_what_is_no_mapping_is_no_object(document):
    with pytest.raises(ManifestError, match=r"m\.yaml: document 2: is not a Kubernetes object"):
        decode(document, FILE, "document 2")


def test_a_lenient_reader_passes_over_unknown_fields():
    lenient = Context("the API server", strict=False)
    document = change(SERVICE, ["spec", "ports", 0, "newField"], 1)
    document["metadata"]["annotations"]["nfqproxy.io/new"] = "x"
    found = decode(document, lenient)
    assert isinstance(found, Service)
    assert found.ports[0].port == 80
