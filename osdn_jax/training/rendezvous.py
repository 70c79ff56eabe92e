"""A rendezvous of the processes of a job before JAX starts: who is there, and what each reports about itself.

JAX's own start waits minutes for a process that does not come, does not notice one that was given another number of
processes, and aborts if something is wrong. So process 0 first listens at the same address with a plain socket, reads
one line of JSON from each other process, and answers each with all of them.
"""

import contextlib
import ipaddress
import json
import os
import re
import selectors
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from osdn_jax.training.reports import name_processes

_GREETING = b"osdn_jax rendezvous\n"  # from process 0, so that another program at its port is not mistaken for it
_GRACE = 5.0  # seconds for the others to connect and be told, once something is wrong
_PATIENCE = 10.0  # seconds for one answer, and for a host name that does not resolve yet
_NOTICE = 15.0  # seconds of waiting before the user is told
_STRANGER = 20.0  # seconds for which another program may answer at the address
_LONGEST = 1 << 20  # bytes per line


class Address(NamedTuple):
    """The address of process 0."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, name: str = "coordinator") -> Address:
    """Parse HOST:PORT, or [HOST]:PORT of an IPv6 address. Raises ValueError, naming `name`."""
    host, colon, port = text.rpartition(":")
    if not (colon and _is_host(host) and port.isascii() and port.isdecimal()):
        raise ValueError(f"{name}: got {text!r}, expected HOST:PORT, such as 10.0.0.1:1234 or [fe80::1]:1234")
    if not 1 <= int(port) <= 65535:
        raise ValueError(f"{name}: got port {port} in {text!r}, expected from 1 to 65535")
    return Address(host.strip("[]"), int(port))


def _is_host(text: str) -> bool:
    if not text.startswith("["):
        return re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?", text) is not None
    try:
        return text.endswith("]") and bool(ipaddress.IPv6Address(text[1:-1]))
    except ValueError:
        return False


def gather(
    address: Address,
    process_id: int,
    process_count: int,
    facts: Mapping[str, Any],
    *,
    seconds: float,
    bind: Address | None = None,
) -> list[dict[str, Any] | None]:
    """Exchange facts between all processes.

    Args:
        address: of process 0, the same in every process.
        process_id: of this process.
        process_count: total number of processes, as far as this process knows.
        facts: of this process, as JSON holds them. Once some differ from process 0's, the rest are not waited for.
        seconds: how long to wait for the others.
        bind: address at which process 0 listens; default: the port of its address, on all interfaces.

    Returns:
        The facts of each process, with its process_count; None for a process that had not connected when something
        was wrong.

    Raises:
        RuntimeError: the address cannot be used or reached, or a process does not connect, ends, or connects twice.
    """
    local_facts = {"process_count": process_count, **facts}
    if process_id == 0:
        answer = _listen(address, bind or Address("::", address.port), process_count, local_facts, seconds)
    else:
        answer = _call(address, {"id": process_id, "facts": local_facts}, seconds)
    if answer["error"]:
        raise RuntimeError(answer["error"])
    found = {int(number): facts for number, facts in answer["facts"].items()}
    return [found.get(number) for number in range(max(found) + 1)]


class _Peer(NamedTuple):
    connection: socket.socket
    process: int
    facts: dict[str, Any]


# Process 0


def _listen(address: Address, bind: Address, count: int, facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    try:
        server = _server(bind)
    except OSError as error:
        with contextlib.suppress(OSError):  # if another process 0 of this job has the port, all are told
            if (answer := _call_once(address, {"id": 0, "facts": facts}, seconds)) is not None:
                return answer
        raise RuntimeError(
            f"coordinator: got {address}, but process 0 cannot listen at port {bind.port}: {_reason(error)}"
        ) from error
    peers: list[_Peer] = []
    try:
        with server:
            _check_own(address)
            answer = _await_all(server, peers, count, facts, seconds)
        for peer in peers:
            with contextlib.suppress(OSError):  # a process that has ended since: JAX's own start will notice
                peer.connection.sendall(json.dumps(answer).encode() + b"\n")
    finally:
        for peer in peers:
            peer.connection.close()
    return answer


def _await_all(
    server: socket.socket, peers: list[_Peer], count: int, local_facts: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Fill `peers` and return the answer for all of them."""
    reported, error, wrong = {0: local_facts}, "", False
    notice, end = _Notice(), time.monotonic() + seconds
    while (missing := sorted(set(range(count)) - set(reported))) and time.monotonic() < end:
        ready = _ready([server, *(peer.connection for peer in peers)])
        for peer in [peer for peer in peers if peer.connection in ready]:
            # It has nothing more to send, so it has ended.
            error = error or f"process {peer.process} ended before all {count} processes had come"
            peer.connection.close()
            peers.remove(peer)
        if server in ready and (new := _greet(server)) is not None:
            peers.append(new)
            if new.process in reported:
                error = error or f"process_id: got {new.process} in two processes, expected another in each"
            reported.setdefault(new.process, new.facts)
        if not wrong and (error or any(facts != local_facts for facts in reported.values())):
            wrong, end = True, min(end, time.monotonic() + _GRACE)
        notice.after_a_while(f"waiting for {name_processes(missing)} of {count}")
    if missing and not wrong:
        error = f"{name_processes(missing)} of {count} did not come within {seconds:.0f} seconds"
    return {"error": error, "facts": reported}


def _ready(sockets: list[socket.socket]) -> list[Any]:
    """Return the readable sockets after at most 0.1 s; for any number of them, unlike `select.select`."""
    with selectors.DefaultSelector() as selector:
        for each in sockets:
            selector.register(each, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(0.1)]


def _greet(server: socket.socket) -> _Peer | None:
    """Accept one connection; return None if it is not from a process of this job."""
    connection, _ = server.accept()
    try:
        connection.settimeout(_PATIENCE)
        connection.sendall(_GREETING)
        hello = json.loads(connection.makefile("rb").readline(_LONGEST))
        return _Peer(connection, int(hello["id"]), dict(hello["facts"]))
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()
        return None


def _server(bind: Address) -> socket.socket:
    if bind.host != "::":
        family = socket.AF_INET6 if ":" in bind.host else socket.AF_INET
        return socket.create_server((bind.host, bind.port), family=family)
    if _has_ipv6():
        return socket.create_server(("::", bind.port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", bind.port))


def _has_ipv6() -> bool:
    if not socket.has_dualstack_ipv6():
        return False
    try:
        with socket.create_server(("::", 0), family=socket.AF_INET6):
            return True
    except OSError:  # supported, but disabled on this machine
        return False


def _check_own(address: Address) -> None:
    """Check that process 0 reaches itself at its address, as JAX will."""
    try:
        socket.create_connection(address, _PATIENCE).close()
    except OSError as error:
        raise RuntimeError(
            f"coordinator: got {address}, which process 0 cannot reach ({_reason(error)}); expected its own address"
        ) from error


# The others


def _call(address: Address, hello: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the answer of process 0, retrying until it is there."""
    began, strange, notice = time.monotonic(), None, _Notice()
    while True:
        try:
            answer = _call_once(address, hello, seconds)
            if answer is not None:
                return answer
            strange = strange or time.monotonic()
            fault = "something else answers"
        except socket.gaierror as error:
            if time.monotonic() - began > _PATIENCE:
                raise RuntimeError(f"coordinator: cannot resolve {address.host!r}: {_reason(error)}") from error
            fault = _reason(error)
        except OSError as error:
            fault = _reason(error)
        now = time.monotonic()
        if now - began > seconds or (strange is not None and now - strange > _STRANGER):
            raise RuntimeError(
                f"coordinator: process 0 does not answer at {address} after {now - began:.0f} s: {fault}"
            )
        notice.after_a_while(f"waiting for process 0 at {address}: {fault}")
        time.sleep(0.1)


def _call_once(address: Address, hello: dict[str, Any], seconds: float) -> dict[str, Any] | None:
    """Return the answer of process 0; None if another program answers. Raises OSError if none does."""
    with socket.create_connection(address, _PATIENCE) as peer, peer.makefile("rb") as lines:
        try:
            peer.sendall(json.dumps(hello).encode() + b"\n")
            if lines.readline(len(_GREETING)) != _GREETING:
                return None
        except OSError:
            return None
        try:
            peer.settimeout(seconds + _PATIENCE)  # as long as process 0 may wait: it reports who is late
            return json.loads(lines.readline(_LONGEST))
        except (OSError, ValueError) as error:
            raise RuntimeError(f"process 0 ended before all {hello['facts']['process_count']} had come") from error


class _Notice:
    """One line on stderr that explains a long wait."""

    def __init__(self) -> None:
        self._at: float | None = time.monotonic() + _NOTICE

    def after_a_while(self, words: str) -> None:
        if self._at is not None and time.monotonic() > self._at:
            print(words, file=sys.stderr, flush=True)
            self._at = None


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if isinstance(error, socket.gaierror) or number is None:
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
    return os.strerror(number)
