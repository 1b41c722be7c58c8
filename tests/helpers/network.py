"""Keep tests on this machine."""

import ipaddress
import socket


class NetworkRefused(ConnectionError):
    """A test tried to leave this machine."""


def is_local(address: object) -> bool:
    """Say whether a socket address is a loopback address or a file (Unix sockets)."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    if host in {"", "localhost", socket.gethostname()}:
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


def refuse_network(monkeypatch) -> list[object]:
    """Let sockets of this process connect to loopback addresses only; return the list that collects the others."""
    refused: list[object] = []

    def guarded(original):
        def call(sock, address):
            if is_local(address):
                return original(sock, address)
            refused.append(address)
            raise NetworkRefused(f"tests run without a network, and this one asked for {address}")

        return call

    def guarded_lookup(host, *args, **kwargs):
        if host is None or is_local((host if isinstance(host, str) else host.decode(),)):
            return lookup(host, *args, **kwargs)
        refused.append(host)
        raise NetworkRefused(f"tests run without a network, and this one looked up {host!r}")

    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", guarded_lookup)
    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    return refused
