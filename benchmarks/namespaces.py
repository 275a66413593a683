"""Two network namespaces of this machine, joined by a link with a delay and a rate: two machines for a benchmark.

Needs root and `ip`. The link is a veth pair; tc's netem slows it down, or, where the kernel has no netem, a wire of our own.
"""

import contextlib
import fcntl
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

DEVICE = "wire"  # what either namespace calls its end of the link
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # seen by nobody outside the two

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # of <linux/if_tun.h>
_PACKET = 9000  # bytes of the largest packet on our own wire: it carries some 1.3 Gbit/s each way, in Python; less of 1500


class Link(NamedTuple):
    """What a packet meets, in either direction."""

    delay_ms: float = 0.0
    mbit_per_s: float | None = None  # None: as fast as the machine

    @property
    def is_plain(self) -> bool:
        return self == Link()


def why_not() -> str | None:
    """Why there can be no namespaces here, or None if they can be made."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (iproute2)"
    try:
        with _namespaces():
            return None
    except OSError as error:
        return f"network namespaces cannot be made: {error}"


def inside(name: str) -> list[str]:
    """The words that start a command in a namespace."""
    return ["ip", "netns", "exec", name]


@contextlib.contextmanager
def linked(link: Link) -> Iterator[tuple[tuple[str, str], str]]:
    """The names of two namespaces that see each other through DEVICE, and what slows their link down. Gone afterwards."""
    with _namespaces() as names, contextlib.ExitStack() as stack:
        if link.is_plain or _has_netem(names[0]):
            ends = [["name", DEVICE, "netns", name] for name in names]
            _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        else:
            stack.enter_context(_wire(names, link))
        for name, address in zip(names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/30", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", "dev", DEVICE, "up")
        if link.is_plain:
            yield names, "nothing"
        elif _has_netem(names[0]):
            for name in names:
                _run("tc", "-n", name, "qdisc", "replace", "dev", DEVICE, "root", *_netem(link))
            yield names, "tc netem"
        else:
            yield names, "our own wire"


@contextlib.contextmanager
def _namespaces() -> Iterator[tuple[str, str]]:
    names = (f"vae-dist-{os.getpid()}-a", f"vae-dist-{os.getpid()}-b")
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        yield names
    finally:
        for name in names:  # the devices in it go with it
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"`{' '.join(command)}`: {' '.join(done.stderr.split())}")


def _netem(link: Link) -> list[str]:
    rate = ["rate", f"{link.mbit_per_s}mbit"] if link.mbit_per_s else []
    # netem drops what is over its limit of packets: it must hold all that TCP may have under way.
    return ["netem", "delay", f"{link.delay_ms}ms", *rate, "limit", "100000"]


def _has_netem(name: str) -> bool:
    """Whether tc and the kernel know netem: tried on the namespace's own loopback, which nothing uses."""
    if shutil.which("tc") is None:
        return False
    trial = ["tc", "-n", name, "qdisc", "replace", "dev", "lo", "root", *_netem(Link(1.0))]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def _wire(names: tuple[str, str], link: Link) -> Iterator[None]:
    """A link between two TUN devices, one in each namespace: a thread of this process carries the packets."""
    with contextlib.ExitStack() as stack:
        ends = []
        for number, name in enumerate(names):
            ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
            stack.callback(os.close, ends[-1])
            born = f"vae{os.getpid()}{number}"
            fcntl.ioctl(ends[-1], _TUNSETIFF, struct.pack("16sH", born.encode(), _IFF_TUN | _IFF_NO_PI))
            _run("ip", "link", "set", "dev", born, "netns", name, "name", DEVICE, "mtu", str(_PACKET))
        stop = threading.Event()
        carrier = threading.Thread(target=_carry, args=(ends, link, stop), daemon=True)
        carrier.start()
        stack.callback(carrier.join)
        stack.callback(stop.set)  # last in, first out: stop, join, close
        yield


def _carry(ends: list[int], link: Link, stop: threading.Event) -> None:
    """Takes packets from either end, and gives each to the other end once the link has carried it."""
    per_byte = 8e-6 / link.mbit_per_s if link.mbit_per_s else 0.0
    under_way: list[deque[tuple[float, bytes]]] = [deque(), deque()]  # when due, and the packet
    free = [0.0, 0.0]  # when the sender's last packet has left
    while not stop.is_set():
        due = min((queue[0][0] for queue in under_way if queue), default=time.perf_counter() + 0.1)
        readable, _, _ = select.select(ends, [], [], max(0.0, due - time.perf_counter()))
        for sender, queue in enumerate(under_way):
            if ends[sender] in readable:
                packet = os.read(ends[sender], _PACKET)
                free[sender] = max(free[sender], time.perf_counter()) + len(packet) * per_byte
                queue.append((free[sender] + link.delay_ms / 1e3, packet))
            while queue and queue[0][0] <= time.perf_counter():
                packet = queue.popleft()[1]
                with contextlib.suppress(OSError):  # an end that is not up yet loses the packet, as on any link
                    os.write(ends[1 - sender], packet)
