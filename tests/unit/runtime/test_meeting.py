import socket
import threading

import pytest

from chatlearn.errors import PlacementError
from chatlearn.runtime.meeting import NodeLink, NodesListener, listen

TOKEN = b"a shared secret"


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_a_caller_hears_the_address_and_the_exit_code(port):
    listener = NodesListener(("127.0.0.1",), port, TOKEN, 1)
    link = NodeLink("127.0.0.1", port, TOKEN, "node 1", 5.0)
    listener.start("10.0.0.1:6379")
    assert link.wait_start(5.0) == "10.0.0.1:6379"
    ending = threading.Thread(target=listener.end, args=(3, 5.0))
    ending.start()
    assert link.wait_end() == 3
    link.leave()
    ending.join(5.0)
    assert (listener.num_present, listener.left.empty()) == (0, True)


def test_a_late_caller_hears_the_address_too(port):
    listener = NodesListener(("127.0.0.1",), port, TOKEN, 1)
    listener.start("10.0.0.1:6379")
    link = NodeLink("127.0.0.1", port, TOKEN, "node 1", 5.0)
    assert link.wait_start(5.0) == "10.0.0.1:6379"
    link.leave()
    listener.end(0, 5.0)


def test_another_token_is_refused_on_both_sides(port):
    listener = NodesListener(("127.0.0.1",), port, TOKEN, 1)
    with pytest.raises(PlacementError, match="node 1 is refused .* its token differs"):
        NodeLink("127.0.0.1", port, b"another secret", "node 1", 5.0)
    left = listener.left.get(timeout=5.0)
    assert (left.was_in, "its token differs" in left.reason) == (False, True)
    listener.end(0, 5.0)


def test_a_second_caller_of_the_same_name_is_refused(port):
    listener = NodesListener(("127.0.0.1",), port, TOKEN, 2)
    link = NodeLink("127.0.0.1", port, TOKEN, "node 1", 5.0)
    with pytest.raises(PlacementError, match="there is a node 1 already"):
        NodeLink("127.0.0.1", port, TOKEN, "node 1", 5.0)
    link.leave()
    listener.end(0, 5.0)


def test_leaving_early_is_told_with_its_reason(port):
    listener = NodesListener(("127.0.0.1",), port, TOKEN, 1)
    NodeLink("127.0.0.1", port, TOKEN, "node 1", 5.0).leave("Ray ended")
    left = listener.left.get(timeout=5.0)
    assert (left.name, left.reason, left.was_in) == ("node 1", "left early: Ray ended", True)
    listener.end(0, 5.0)


def test_a_stranger_who_says_nothing_holds_nobody_up(port):
    listener = NodesListener(("127.0.0.1",), port, TOKEN, 1)
    with socket.create_connection(("127.0.0.1", port)):
        link = NodeLink("127.0.0.1", port, TOKEN, "node 1", 5.0)
    assert listener.num_present == 1
    link.leave()
    listener.end(0, 5.0)


def test_a_program_that_is_no_launcher_is_named_by_its_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        greet = threading.Thread(target=lambda: server.accept()[0].sendall(b"220 hello\n"))
        greet.start()
        with pytest.raises(PlacementError, match=f"{port} is not the driver's launcher"):
            NodeLink("127.0.0.1", port, TOKEN, "node 1", 5.0)
        greet.join(5.0)


def test_a_port_in_use_names_the_port(port):
    with (
        listen("127.0.0.1", port),
        pytest.raises(PlacementError, match=f"port {port} of this machine is in"),
    ):
        listen("127.0.0.1", port)
