"""Asks DNS servers in all the ways that sockets know, and prints what it sees: a line for each.

Arguments: NAME=ADDRESS for addresses that have other names in other pods. 53 is captured, 123 is not.
"""
import ctypes
import itertools
import socket
import struct
import sys

NAMES = {ip: name for name, ip in (argument.split("=") for argument in sys.argv[1:])}
ADDRESSES = {name: ip for ip, name in NAMES.items()}
LIBC = ctypes.CDLL(None, use_errno=True)
IP_PKTINFO, IP_UNICAST_IF, IPV6_UNICAST_IF = 8, 50, 76
DEVICE = socket.if_nametoindex("eth0")


class Kind:
    """A kind of address: IPv4, IPv6, or IPv4 as an IPv6 socket names it."""

    def __init__(self, name, family, prefix, servers, own, second, local):
        self.name, self.family, self.prefix = name, family, prefix
        self.first, self.other = servers
        self.own, self.second, self.local = own, second, local
        self.any = "0.0.0.0" if family == socket.AF_INET else "::"

    def at(self, ip, port=53):
        return (self.prefix + ADDRESSES.get(ip, ip), port)

    def socket(self):
        new = socket.socket(self.family, socket.SOCK_DGRAM)
        new.settimeout(PATIENCE)
        return new


PATIENCE = float(ADDRESSES.pop("patience"))
V4 = ("10.96.53.1", "10.96.53.2"), "own4", "second4", "127.0.0.1"
V6 = ("fd96::53:1", "fd96::53:2"), "own6", "second6", "::1"
KINDS = [
    Kind("v4", socket.AF_INET, "", *V4),
    Kind("v6", socket.AF_INET6, "", *V6),
    Kind("mapped", socket.AF_INET6, "::ffff:", *V4),
]


def name(address):
    ip = address[0].removeprefix("::ffff:")
    return NAMES.get(ip, ip)


def port(address):
    return f"{name(address)}:{address[1]}"


def heard(sock):
    try:
        data, source = sock.recvfrom(512)
    except socket.timeout:
        return "nothing"
    return f"{data.decode()} from {port(source)}"


def addresses(sock):
    return f"{name(sock.getsockname())} to {port(sock.getpeername())}"


def disconnect(sock):
    unspecified = struct.pack("H14x", socket.AF_UNSPEC)
    if LIBC.connect(sock.fileno(), unspecified, len(unspecified)):
        raise OSError(ctypes.get_errno(), "connect(AF_UNSPEC)")


def asks(sock, *servers):
    """Asks each, not connected; what is heard, in any order."""
    for server in servers:
        sock.sendto(b"asked", server)
    return ", ".join(sorted(heard(sock) for _ in servers))


def asks_connected(sock, server):
    sock.connect(server)
    sock.send(b"asked")
    return f"{addresses(sock)}, {heard(sock)}"


# F50: whom a connected socket takes itself and its peer for, and where it may go next.


def connected(kind, sock):
    return asks_connected(sock, kind.at(kind.first))


def connected_bound_to_any(kind, sock):
    sock.bind((kind.any, 0))
    return asks_connected(sock, kind.at(kind.first))


def connected_bound_to_own(kind, sock):
    sock.bind(kind.at(kind.own, 0))
    return asks_connected(sock, kind.at(kind.first))


def connected_bound_to_second(kind, sock):
    sock.bind(kind.at(kind.second, 0))
    return asks_connected(sock, kind.at(kind.first))


def connected_to_own(kind, sock):
    return asks_connected(sock, kind.at(kind.own))


def connected_to_localhost(kind, sock):
    return asks_connected(sock, kind.at(kind.local))


def connected_then_elsewhere(kind, sock):
    sock.connect(kind.at(kind.first))
    return asks_connected(sock, kind.at(kind.other, 123))


def connected_then_another(kind, sock):
    sock.connect(kind.at(kind.first))
    return asks_connected(sock, kind.at(kind.other))


def connected_then_local(kind, sock):
    sock.connect(kind.at(kind.first))
    return asks_connected(sock, kind.at(kind.local, 15053))


def elsewhere_then_connected(kind, sock):
    sock.connect(kind.at(kind.other, 123))
    return asks_connected(sock, kind.at(kind.first))


def connected_sends_elsewhere(kind, sock):
    sock.connect(kind.at(kind.first))
    sock.sendto(b"asked", kind.at(kind.other, 123))
    sock.send(b"asked")
    return heard(sock)


def connected_sends_to_another(kind, sock):
    sock.connect(kind.at(kind.first))
    sock.sendto(b"another", kind.at(kind.other))
    sock.send(b"asked")
    return heard(sock)


def connected_sends_by_name(kind, sock):
    sock.connect(kind.at(kind.first))
    return asks(sock, kind.at(kind.first))


def disconnected(kind, sock):
    sock.connect(kind.at(kind.first))
    disconnect(sock)
    own = name(sock.getsockname())
    elsewhere = asks(sock, kind.at(kind.other, 123))
    return f"{own}, {elsewhere}, {asks(sock, kind.at(kind.first), kind.at(kind.other))}"


def disconnected_then_connected(kind, sock):
    sock.connect(kind.at(kind.first))
    disconnect(sock)
    return asks_connected(sock, kind.at(kind.other, 123))


def unconnected(kind, sock):
    return asks(sock, kind.at(kind.first), kind.at(kind.other), kind.at(kind.own))


def bound_to_own(kind, sock):
    sock.bind(kind.at(kind.own, 0))
    return asks(sock, kind.at(kind.first), kind.at(kind.other))


def bound_to_second(kind, sock):
    sock.bind(kind.at(kind.second, 0))
    return asks(sock, kind.at(kind.first))


# F51: sockets that name the device that they send by.


def unicast_if(kind, sock):
    index = struct.pack("!I", DEVICE)
    if kind.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_UNICAST_IF, index)
    if kind.name != "v6":
        sock.setsockopt(socket.IPPROTO_IP, IP_UNICAST_IF, index)


def unicast_if_connected(kind, sock):
    unicast_if(kind, sock)
    return asks_connected(sock, kind.at(kind.first))


def unicast_if_unconnected(kind, sock):
    unicast_if(kind, sock)
    return asks(sock, kind.at(kind.first), kind.at(kind.other))


def pktinfo(kind, sock, source=None):
    if kind.name == "v6":
        source = socket.inet_pton(socket.AF_INET6, kind.at(source)[0] if source else "::")
        info = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, source + struct.pack("@I", DEVICE))
    else:
        source = socket.inet_aton(ADDRESSES[source] if source else "0.0.0.0")
        info = (socket.IPPROTO_IP, IP_PKTINFO, struct.pack("@I", DEVICE) + source + bytes(4))
    for server in (kind.first, kind.other):
        sock.sendmsg([b"asked"], [info], 0, kind.at(server))
    return ", ".join(sorted(heard(sock) for _ in range(2)))


def pktinfo_device(kind, sock):
    return pktinfo(kind, sock)


def pktinfo_device_and_own(kind, sock):
    return pktinfo(kind, sock, kind.own)


def pktinfo_device_and_second(kind, sock):
    return pktinfo(kind, sock, kind.second)


def bound_to_device(kind, sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    return asks(sock, kind.at(kind.first), kind.at(kind.other))


def bound_to_device_connected(kind, sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    return asks_connected(sock, kind.at(kind.first))


WAYS = [
    connected,
    connected_bound_to_any,
    connected_bound_to_own,
    connected_bound_to_second,
    connected_to_own,
    connected_to_localhost,
    connected_then_elsewhere,
    connected_then_another,
    connected_then_local,
    elsewhere_then_connected,
    connected_sends_elsewhere,
    connected_sends_to_another,
    connected_sends_by_name,
    disconnected,
    disconnected_then_connected,
    unconnected,
    bound_to_own,
    bound_to_second,
    unicast_if_connected,
    unicast_if_unconnected,
    pktinfo_device,
    pktinfo_device_and_own,
    pktinfo_device_and_second,
    bound_to_device,
    bound_to_device_connected,
]

for way, kind in itertools.product(WAYS, KINDS):
    with kind.socket() as sock:
        try:
            seen = way(kind, sock)
        except OSError as error:
            seen = f"{type(error).__name__} {error.errno}"
    print(f"{way.__name__} {kind.name}: {seen}", flush=True)
