"""Can this host carry the rules? Found out before anything is changed.

The rules are rehearsed in a network namespace that lives as long as one thread: what loads there
loads here. If the rehearsal fails, every ability is tried by itself to name the missing one. The
live rules are not looked at, let alone changed.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from nfqproxy.errors import HostError, KernelError, NfqproxyError
from nfqproxy.kernel import commands, iptables, node_rules
from nfqproxy.kernel.rule_settings import IptablesBackend, RuleSettings
from nfqproxy.model import Family

__all__ = ["check_host"]

_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_UDP_TIMEOUT = Path("/proc/sys/net/netfilter/nf_conntrack_udp_timeout")


def check_host(settings: RuleSettings) -> IptablesBackend:
    """Return the iptables back end that ``apply`` would use, or raise HostError.

    The error names everything that is missing: tools with the package that has them, kernel
    abilities with the modules to load.
    """
    if os.geteuid() != 0:
        raise HostError("programming the kernel needs root; run as root")
    missing = [tool for tool in ("ipset", "nft") if commands.find(tool) is None]
    backend = settings.iptables
    if commands.find("nft"):
        backend = iptables.choose_backend(settings.iptables)
        for family in settings.families:
            if iptables.command(family, backend, "restore") is None:
                word = "iptables" if family is Family.IPV4 else "ip6tables"
                missing.append(f"{word}-{backend.value}-restore")
    if missing:
        packages = " ".join(sorted({commands.PACKAGES[tool.split("-")[0]] for tool in missing}))
        verb = "is" if len(missing) == 1 else "are"
        raise HostError(f"{', '.join(missing)} {verb} not installed; apt-get install {packages}")
    if not settings.marks:
        _check_flow_timeout(settings)
    chosen = backend
    problem = _in_new_namespace(lambda: _rehearse(settings, chosen))
    if problem:
        raise HostError(problem)
    return backend


def _check_flow_timeout(settings: RuleSettings) -> None:
    try:
        kernel_s = int(_UDP_TIMEOUT.read_text(encoding="ascii"))
    except OSError:
        return  # connection tracking is not loaded yet; its default is 30 s
    if settings.flow_timeout_s >= kernel_s:
        raise HostError(
            f"flow_timeout_s {settings.flow_timeout_s} must be shorter than the kernel's "
            f"nf_conntrack_udp_timeout {kernel_s}: a datagram would skip the queue after its "
            f"connection was forgotten; lower it to {max(1, kernel_s - 5)} or raise the sysctl"
        )


def _in_new_namespace(function: Callable[[], str]) -> str:
    """Return ``function()`` as called in an empty network namespace; "" where none may be made."""
    libc = ctypes.CDLL(None, use_errno=True)
    results: list[str] = []
    failures: list[BaseException] = []

    def work() -> None:
        # unshare(2) moves only the calling thread; the namespace goes when the thread ends.
        if libc.unshare(_CLONE_NEWNET) != 0:
            return  # a container without CAP_SYS_ADMIN: apply undoes itself if something is amiss
        try:
            results.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="rehearsal")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0] if results else ""


def _rehearse(settings: RuleSettings, backend: IptablesBackend) -> str:
    """Return what is wrong, "" when the rules load."""
    try:
        # More slots are more of the same, and most of the time that loading takes.
        node_rules.apply(replace(settings, iptables=backend, slots=1))
    except NfqproxyError as error:
        lacking = [
            text for family in settings.families for text in _lacking(family, backend, settings)
        ]
        if not lacking:
            return f"the rules do not load: {error}; try nfqproxy doctor"
        return "; ".join(dict.fromkeys(lacking))
    return ""


def _lacking(family: Family, backend: IptablesBackend, settings: RuleSettings) -> list[str]:
    """Try each ability on its own, in the namespace of the rehearsal."""
    node_rules.cleanup()
    ip, addr = ("ip", "ipv4_addr") if family is Family.IPV4 else ("ip6", "ipv6_addr")
    inet = "inet" if family is Family.IPV4 else "inet6"
    word = f"{'iptables' if family is Family.IPV4 else 'ip6tables'}"
    legacy = "ip" if family is Family.IPV4 else "ip6"
    table_modules = (
        f"{legacy}table_raw {legacy}table_mangle"
        if backend is IptablesBackend.LEGACY
        else "nf_tables nft_compat"
    )
    lacking = []

    def attempt(ability: str, modules: str, action: Callable[[], object]) -> None:
        try:
            action()
        except KernelError as error:
            first = str(error).split("; ", 1)[-1]
            lacking.append(f"this kernel lacks {ability} ({first}); try: modprobe -a {modules}")

    def rule(table: str, text: str) -> Callable[[], object]:
        lines = {table: [":NFQPROXY-TRY - [0:0]", "-F NFQPROXY-TRY", f"-A NFQPROXY-TRY {text}"]}
        return lambda: iptables.restore(family, backend, iptables.restore_text(lines))

    def ipset(name: str, kind: str) -> Callable[[], object]:
        return lambda: commands.run(["ipset", "create", name, *kind.split(), "family", inet])

    def nft(rule_text: str, hook: str = "", kind: str = "nat") -> Callable[[], object]:
        body = f"type {kind} hook {hook} priority 0;\n" if hook else ""
        text = (
            f"table {ip} nfqproxy-try {{\n map m {{ type inet_proto . {addr} . inet_service : "
            f"{addr} . inet_service; }}\n set n {{ type inet_service . {addr}; flags interval; }}\n"
            f" map o {{ type mark . {addr} : {addr}; }}\n"
            f" counter k {{ }}\n chain c {{ {body} {rule_text}\n }}\n}}\n"
            f"delete table {ip} nfqproxy-try\n"
        )
        return lambda: commands.run(["nft", "-f", "-"], text)

    set_module = "ip_set ip_set_hash_ipport ip_set_hash_ipportip"
    table = "mangle" if settings.marks else "raw"
    attempt(f"{word} ({backend.value}) table mangle", table_modules, rule("mangle", "-p udp"))
    attempt(
        "the NFQUEUE target",
        "nfnetlink_queue xt_NFQUEUE",
        rule(table, "-p tcp -j NFQUEUE --queue-num 0 --queue-bypass"),
    )
    attempt("the comment match", "xt_comment", rule(table, "-m comment --comment x"))
    attempt(
        "the conntrack match",
        "nf_conntrack xt_conntrack",
        rule("mangle", "-p udp -m conntrack --ctstate DNAT --ctdir ORIGINAL"),
    )
    attempt("ipset type hash:ip,port", set_module, ipset("nfqproxy-try-a", "hash:ip,port"))
    attempt("the set match", "xt_set", rule(table, "-m set --match-set nfqproxy-try-a dst,dst"))
    if settings.marks:
        attempt("the MARK target", "xt_mark", rule("mangle", "-j MARK --set-xmark 0x1/0x1"))
        attempt(
            "nft maps by mark",
            "nf_tables nft_nat",
            nft(f"dnat {ip} to meta mark & 0x1 . {ip} daddr map @o", "prerouting"),
        )
        attempt(
            "nft chains of type route",
            "nf_tables",
            nft("meta mark set meta mark & 0x1", "output", "route"),
        )
        attempt(
            "nft snat", "nf_tables nft_nat", nft(f"snat {ip} to {ip} saddr", "postrouting", "nat")
        )
    else:
        attempt(f"{word} ({backend.value}) table raw", table_modules, rule("raw", "-p tcp --syn"))
        attempt("the sctp match", "xt_sctp", rule("raw", "-p sctp -m sctp --chunk-types only INIT"))
        attempt(
            "ipset type hash:ip,port,ip",
            set_module,
            ipset("nfqproxy-try-b", "hash:ip,port,ip timeout 9"),
        )
        attempt(
            "the SET target",
            "xt_set",
            rule("mangle", "-p udp -j SET --add-set nfqproxy-try-b src,src,dst --exist"),
        )
    attempt(
        "nft nat chains with maps",
        "nf_tables nft_chain_nat nft_nat",
        nft(f"dnat {ip} to meta l4proto . {ip} daddr . th dport map @m", "prerouting"),
    )
    attempt("nft numgen", "nft_numgen", nft("numgen random mod 2 vmap { 0 : drop, 1 : accept }"))
    attempt("nft fib", "nft_fib nft_fib_ipv4 nft_fib_ipv6", nft("fib saddr type local accept"))
    attempt("nft ct", "nft_ct", nft("ct status dnat accept"))
    attempt("nft jhash", "nft_hash", nft(f"jhash {ip} saddr mod 2 seed 0x1 vmap {{ 0 : accept }}"))
    attempt("nft named counters", "nf_tables", nft("counter name k accept"))
    attempt("nft sets of joined intervals", "nf_tables", nft(f"th dport . {ip} saddr @n accept"))
    reject = f"reject with {'icmp' if family is Family.IPV4 else 'icmpv6'} type port-unreachable"
    attempt(
        "nft reject", "nft_reject nft_reject_ipv4 nft_reject_ipv6", nft(reject, "input", "filter")
    )
    attempt("nft masquerade", "nft_masq", nft("masquerade", "postrouting"))
    node_rules.cleanup()
    return lacking
