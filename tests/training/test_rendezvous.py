"""The rendezvous before JAX starts, with threads as processes: late, missing and wrong ones."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from osdn_jax.training import rendezvous
from osdn_jax.training.distributed import start
from osdn_jax.training.rendezvous import Address, gather, parse_address

pytestmark = pytest.mark.slow

FACTS = {"jax": "0.12.0"}


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Address(*free.getsockname())


def together(address, *processes, count=2, seconds=20.0):
    """Return the result or error of `gather` in each process (id, count) or (id, count, facts)."""

    def one(process, of=count, facts=FACTS):
        try:
            return gather(address, process, of, facts, seconds=seconds)
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(lambda process: one(*process), processes))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("127.0.0.1:1234", ("127.0.0.1", 1234)),
        ("node-01.rack_2.example.org:65535", ("node-01.rack_2.example.org", 65535)),
        ("[::1]:1", ("::1", 1)),
    ],
)
def test_addresses(text, want):
    assert parse_address(text) == want
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", ":1234", "host:", "host:port", "host:12 34", "host:-1", "host:1.5", "host:٣", "a b:1", " host:1"]
    + ["a:b:1", "::1:1234", "[::1:1234", "[host]:1", "[]:1", "http://host:1234", "host/path:1", "-host:1", "host:1:"],
)
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match="coordinator: got .* expected HOST:PORT, such as 10.0.0.1:1234") as error:
        start(text, 0, 2)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("port", ["0", "65536", "99999", "123456789012345678901"])
def test_ports(port):
    for process in (0, 1):
        with pytest.raises(ValueError, match=f"coordinator: got port {port} in 'a:{port}', expected from 1 to 65535"):
            start(f"a:{port}", process, 2)


def test_all_hear_all(address):
    facts = [{"process_count": 3, **FACTS}] * 3
    assert together(address, (1, 3), (0, 3), (2, 3)) == [facts] * 3
    assert together(address, (0, 3), (2, 3), (1, 3)) == [facts] * 3  # at once, at the same address


def test_counts_and_versions_that_differ_are_heard_by_all_that_come(address, monkeypatch):
    monkeypatch.setattr(rendezvous, "_GRACE", 0.5)
    two, three = ({"process_count": count, **FACTS} for count in (2, 3))
    assert together(address, (0, 2), (1, 3)) == [[two, three]] * 2
    assert together(address, (0, 3), (1, 2)) == [[three, two]] * 2  # without waiting for the third
    assert together(address, (0, 2), (2, 3)) == [[two, None, three]] * 2
    other = {"process_count": 2, "jax": "0.11.2"}
    assert together(address, (0, 2), (1, 2, {"jax": "0.11.2"})) == [[two, other]] * 2


def test_one_that_comes_twice(address, monkeypatch):
    monkeypatch.setattr(rendezvous, "_GRACE", 0.5)
    words = "process_id: got 1 in two processes, expected another in each"
    assert together(address, (0, 3), (1, 3), (1, 3)) == [words] * 3
    words = "process_id: got 0 in two processes, expected another in each"
    assert together(address, (0, 2), (0, 2)) == [words] * 2


def test_one_that_does_not_come(address, monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "_NOTICE", 1.0)
    words = "processes 1 and 3 of 4 did not come within 2 seconds"
    assert together(address, (0, 4), (2, 4), seconds=2.0) == [words] * 2
    assert "waiting for processes 1 and 3 of 4\n" == capsys.readouterr().err
    (said,) = together(address, (1, 2), seconds=1.2)
    assert said == f"coordinator: process 0 does not answer at {address} after 1 s: Connection refused"
    assert f"waiting for process 0 at {address}: Connection refused" in capsys.readouterr().err


def test_one_that_ends_while_it_waits(address, monkeypatch):
    monkeypatch.setattr(rendezvous, "_GRACE", 0.5)

    def ends():
        while True:
            try:
                with socket.create_connection(address) as gone:
                    gone.sendall(b'{"id": 1, "facts": {"process_count": 3, "jax": "0.12.0"}}\n')
                    time.sleep(0.3)
                    return
            except OSError:
                time.sleep(0.01)

    thread = threading.Thread(target=ends)
    thread.start()
    assert together(address, (0, 3)) == ["process 1 ended before all 3 processes had come"]
    thread.join()


def test_strangers_are_neither_heard_nor_believed(address, monkeypatch):
    """One program connects to process 0's port by mistake, and another one listens there."""

    def calls():
        for words in (b"", b"GET / HTTP/1.1\r\n", b'{"id": 1}\n', b"[]\n"):
            while True:
                try:
                    with socket.create_connection(address) as stranger:
                        stranger.sendall(words)
                    break
                except OSError:
                    time.sleep(0.01)

    thread = threading.Thread(target=calls)
    thread.start()
    first = ThreadPoolExecutor(1).submit(together, address, (0, 2))
    thread.join()
    assert together(address, (1, 2)) == first.result() == [[{"process_count": 2, **FACTS}] * 2]

    monkeypatch.setattr(rendezvous, "_STRANGER", 0.2)
    with socket.create_server(address) as other:

        def answers():
            for _ in range(2):
                with other.accept()[0] as connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        thread = threading.Thread(target=answers)
        thread.start()
        said = gather_error(address, 0)
        assert (
            said
            == f"coordinator: got {address}, but process 0 cannot listen at port {address.port}: Address already in use"
        )
        monkeypatch.setattr(rendezvous, "_STRANGER", -1.0)
        assert gather_error(address, 1).endswith("something else answers")
        thread.join()


def gather_error(address, process):
    with pytest.raises(RuntimeError) as error:
        gather(address, process, 2, FACTS, seconds=20.0)
    return str(error.value)


def test_hosts_that_are_not_there(address, monkeypatch):
    monkeypatch.setattr(rendezvous, "_PATIENCE", 0.2)
    nowhere = Address("host.invalid", address.port)
    assert gather_error(nowhere, 0).startswith(f"coordinator: got {nowhere}, which process 0 cannot reach (")
    assert gather_error(nowhere, 1).startswith("coordinator: cannot resolve 'host.invalid': ")
    elsewhere = Address("192.0.2.1", address.port)  # reserved for documentation
    assert gather_error(elsewhere, 0).endswith("expected its own address")
