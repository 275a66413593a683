"""Network namespaces of this machine, joined by links with a delay, a rate and a loss: the machines of a benchmark or a test.

Needs root and `ip`. Each has an address and a host's name of its own, and sees the others through a bridge. tc's netem slows
its link down, or, where the kernel has no netem, a switch of our own.
"""

import contextlib
import fcntl
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

DEVICE = "wire"  # what each host calls its end of its link
_NETWORK = "10.77.0."  # seen by nobody outside
_ETC = Path("/etc/netns")  # `ip netns exec` shows the files of /etc/netns/NAME in place of those of /etc
_BRIDGE = "bridge"

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # of <linux/if_tun.h>
_PACKET = 9000  # bytes of the largest packet in our own switch: it carries some 1.3 Gbit/s, in Python; less of 1500
_IPV4, _RECEIVER = 4, 19  # its version, and where the last byte of the receiver's address is


class Link(NamedTuple):
    """What a packet meets on its way from one host to another."""

    delay_ms: float = 0.0
    mbit_per_s: float | None = None  # None: as fast as the machine
    loss: float = 0.0  # the share of packets that never arrive

    @property
    def is_plain(self) -> bool:
        return self == Link()


class Hosts:
    """Some namespaces, while they last. The first is host 0."""

    def __init__(self, names: Sequence[str], switch: "_Bridge | _Switch", slowed_by: str) -> None:
        self.names, self.slowed_by = names, slowed_by
        self._switch = switch

    def cut_off(self, host: int) -> None:
        """Takes a host's cable out, at the switch: it can speak to itself only, and nobody is told."""
        self._switch.connect(host, False)

    def join_again(self, host: int) -> None:
        self._switch.connect(host, True)

    def kill(self, host: int) -> None:
        """SIGKILL to every process there. Its peers are told by the kernel, unless the host has been cut off before."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=True)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def address(host: int) -> str:
    return f"{_NETWORK}{host + 1}"


def host_name(host: int) -> str:
    """What a host calls itself, and what the others find it by."""
    return f"node{host}"


def why_not() -> str | None:
    """Why there can be no namespaces here, or None if they can be made."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (iproute2)"
    try:
        with linked(Link()):
            return None
    except OSError as error:
        return f"network namespaces cannot be made: {error}"


def inside(name: str) -> list[str]:
    """The words that start a command in a namespace, under its host's name."""
    set_name = 'hostname "$0" && exec "$@"'
    return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", set_name, host_name(int(name.split("-")[-1]))]


@contextlib.contextmanager
def linked(link: Link, count: int = 2) -> Iterator[Hosts]:
    """Hosts that see each other through DEVICE. They, and all that runs there, are gone afterwards."""
    with _namespaces(count) as (names, middle), contextlib.ExitStack() as stack:
        by_netem = not link.is_plain and _has_netem(middle)
        by_bridge = link.is_plain or by_netem
        switch: _Bridge | _Switch = _Bridge(middle, names) if by_bridge else stack.enter_context(_switch(names, link))
        for host, name in enumerate(names):
            _run("ip", "-n", name, "addr", "add", f"{address(host)}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", "dev", DEVICE, "up")
            _run("ip", "-n", name, "link", "set", "dev", "lo", "up")
            if by_netem:
                _run("tc", "-n", name, "qdisc", "replace", "dev", DEVICE, "root", *_netem(link))
        hosts = Hosts(names, switch, "nothing" if link.is_plain else "tc netem" if by_netem else "our own switch")
        for host in range(count):
            stack.callback(hosts.kill, host)
        yield hosts


@contextlib.contextmanager
def _namespaces(count: int) -> Iterator[tuple[list[str], str]]:
    """The names of the hosts' namespaces, and of one for what joins them."""
    names = [f"vae-dist-{os.getpid()}-{host}" for host in range(count)]
    middle = f"vae-dist-{os.getpid()}-middle"
    try:
        for name in [*names, middle]:
            _run("ip", "netns", "add", name)
        table = ["127.0.0.1 localhost", *(f"{address(host)} {host_name(host)}" for host in range(count))]
        for name in names:
            (_ETC / name).mkdir(parents=True)
            (_ETC / name / "hosts").write_text("\n".join(table) + "\n")
            (_ETC / name / "nsswitch.conf").write_text("hosts: files\n")  # no server of names answers there
        yield names, middle
    finally:
        for name in [*names, middle]:  # the devices in it go with it
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(_ETC / name, ignore_errors=True)
        with contextlib.suppress(OSError):  # others have theirs in it, or it never was
            _ETC.rmdir()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"`{' '.join(command)}`: {' '.join(done.stderr.split())}")


def _netem(link: Link) -> list[str]:
    rate = ["rate", f"{link.mbit_per_s}mbit"] if link.mbit_per_s else []
    # netem drops what is over its limit of packets: it must hold all that TCP may have under way.
    return ["netem", "delay", f"{link.delay_ms}ms", "loss", f"{link.loss:.3%}", *rate, "limit", "100000"]


def _has_netem(name: str) -> bool:
    """Whether tc and the kernel know netem: tried on the loopback of a namespace that nothing runs in."""
    if shutil.which("tc") is None:
        return False
    trial = ["tc", "-n", name, "qdisc", "replace", "dev", "lo", "root", *_netem(Link(1.0))]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


class _Bridge:
    """The kernel's own bridge, in a namespace of its own, with a veth pair to each host."""

    def __init__(self, middle: str, names: Sequence[str]) -> None:
        self._middle = middle
        _run("ip", "-n", middle, "link", "add", _BRIDGE, "type", "bridge")
        _run("ip", "-n", middle, "link", "set", "dev", _BRIDGE, "up")
        for host, name in enumerate(names):
            ends = ["name", f"port{host}", "netns", middle], ["name", DEVICE, "netns", name]
            _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            _run("ip", "-n", middle, "link", "set", "dev", f"port{host}", "master", _BRIDGE, "up")

    def connect(self, host: int, connected: bool) -> None:
        _run("ip", "-n", self._middle, "link", "set", "dev", f"port{host}", "up" if connected else "down")


class _Switch:
    """Between TUN devices, one in each namespace: gives each packet to its receiver once the link has carried it."""

    def __init__(self, ends: Sequence[int], link: Link) -> None:
        """`ends` are the descriptors of the devices."""
        self._ends, self._link = ends, link
        self._cut: set[int] = set()
        self._chance = random.Random(0)

    def connect(self, host: int, connected: bool) -> None:
        if connected:
            self._cut.discard(host)
        else:
            self._cut.add(host)

    def carry(self, stop: threading.Event) -> None:
        """Until told to stop. It drops what it cannot deliver, as any network does."""
        link = self._link
        per_byte = 8e-6 / link.mbit_per_s if link.mbit_per_s else 0.0
        under_way: list[deque[tuple[float, bytes]]] = [deque() for _ in self._ends]  # of a sender: when due, and the packet
        free = [0.0 for _ in self._ends]  # when the sender's last packet has left
        while not stop.is_set():
            due = min((queue[0][0] for queue in under_way if queue), default=time.perf_counter() + 0.1)
            readable, _, _ = select.select(self._ends, [], [], max(0.0, due - time.perf_counter()))
            for sender, queue in enumerate(under_way):
                if self._ends[sender] in readable:
                    packet = os.read(self._ends[sender], _PACKET)
                    free[sender] = max(free[sender], time.perf_counter()) + len(packet) * per_byte
                    if self._chance.random() >= link.loss:
                        queue.append((free[sender] + link.delay_ms / 1e3, packet))
                while queue and queue[0][0] <= time.perf_counter():
                    self._deliver(sender, queue.popleft()[1])

    def _deliver(self, sender: int, packet: bytes) -> None:
        receiver = packet[_RECEIVER] - 1 if packet[0] >> 4 == _IPV4 else -1
        if 0 <= receiver < len(self._ends) and not self._cut & {sender, receiver}:
            with contextlib.suppress(OSError):  # a device that is not up yet
                os.write(self._ends[receiver], packet)


@contextlib.contextmanager
def _switch(names: Sequence[str], link: Link) -> Iterator[_Switch]:
    """Our own switch, at work in a thread of this process."""
    with contextlib.ExitStack() as stack:
        ends: list[int] = []
        for number, name in enumerate(names):
            ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
            stack.callback(os.close, ends[-1])
            born = f"vae{os.getpid()}{number}"
            fcntl.ioctl(ends[-1], _TUNSETIFF, struct.pack("16sH", born.encode(), _IFF_TUN | _IFF_NO_PI))
            _run("ip", "link", "set", "dev", born, "netns", name, "name", DEVICE, "mtu", str(_PACKET))
        switch, stop = _Switch(ends, link), threading.Event()
        carrier = threading.Thread(target=switch.carry, args=[stop], daemon=True)
        carrier.start()
        stack.callback(carrier.join)
        stack.callback(stop.set)  # last in, first out: stop, join, close
        yield switch
