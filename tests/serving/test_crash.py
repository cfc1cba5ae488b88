"""The real command, killed with SIGKILL under load: it starts again on the same port and answers as before; clients
that open connections and say nothing, or half of something, take nothing from those who ask.
"""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests

GOOD = {"instances": [{"a": [1, 2, 3], "b": 4}]}
ANSWER = {"predictions": [{"sum": 18.0, "twice": 8}]}


def start(base, port, *options):
    """`tfvllm serve`, once it says where it serves."""
    command = [sys.executable, "-m", "tfvllm", "serve", f"many={base / 'many'}", "--rest-port", str(port), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    for line in process.stderr:
        if line.startswith("Serving many at "):
            return process, line.split(" at ")[1].split()[0].rstrip(".,")
    raise AssertionError("the server said nothing of serving")


def children_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_killed_under_load_and_started_again(base, workers):
    options = ("--workers", str(workers))
    process, url = start(base, 0, *options)
    port = int(url.split(":")[2].split("/")[0])
    answers, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                answer = requests.post(f"{url}/many:predict", json=GOOD, timeout=20)
                answers.append((answer.status_code, answer.json()))
            except requests.exceptions.RequestException:  # nobody is there, or the answer was cut off
                time.sleep(0.05)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while len(answers) < 30 and time.monotonic() < deadline:
            time.sleep(0.02)
        orphans = children_of(process)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        before = len(answers)
        assert before >= 30
        process, again = start(base, port, *options)
        assert again == url
        deadline = time.monotonic() + 60
        while len(answers) < before + 30 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(answers) >= before + 30
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert {json.dumps(answer) for answer in answers} == {json.dumps((200, ANSWER))}  # none was wrong or half
    deadline = time.monotonic() + 20
    while any(map(alive, orphans)) and time.monotonic() < deadline:  # workers go when their server has gone
        time.sleep(0.1)
    assert not any(map(alive, orphans))


def test_silent_and_half_open_connections_take_nothing(server, url):
    """A hundred clients that connect and say nothing, a hundred that stop in the middle: the next is answered at once,
    and the silent ones are shown out."""
    address = ("127.0.0.1", server.rest_port)
    head = b"POST /v1/models/many:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    silent, half = [], []
    try:
        for _ in range(100):
            silent.append(socket.create_connection(address, timeout=10))
            half.append(socket.create_connection(address, timeout=10))
            half[-1].sendall(head)
        assert requests.post(f"{url}/many:predict", json=GOOD, timeout=20).json() == ANSWER
        for connection in half[:50]:
            connection.shutdown(socket.SHUT_WR)  # half open: it will read, and send no more
        assert requests.post(f"{url}/many:predict", json=GOOD, timeout=20).json() == ANSWER
        assert [connection.recv(1) for connection in silent] == [b""] * 100
        told = [connection.recv(200) for connection in half[50:]]
        assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in told)
        for connection in half[:50]:
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(200):
                    pass
    finally:
        for connection in (*silent, *half):
            connection.close()
    assert requests.post(f"{url}/many:predict", json=GOOD, timeout=20).json() == ANSWER


@pytest.mark.parametrize(
    "body",
    [
        b'{"signature_name": "echo", "instances": ["\xff\xfe"]}',
        b'{"signature_name": "echo", "instances": ["\xc3"]}',
        b'{"signature_name": "echo", "instances": ["\xed\xa0\x80"]}',  # a surrogate, encoded
        b'{"signature_name": "echo", "instances": ["\xf5\x80\x80\x80"]}',  # beyond Unicode
        b'{"signature_name": "\xff", "instances": ["a"]}',
        b'{"\xff": 1, "instances": ["a"]}',
    ],
)
def test_bytes_that_are_no_utf_8(url, body):
    answer = requests.post(f"{url}/many:predict", data=body, timeout=20)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    fine = requests.post(
        f"{url}/many:predict", data='{"signature_name": "echo", "instances": ["ÿ"]}'.encode(), timeout=20
    )
    assert fine.json() == {"predictions": [{"copy_bytes": {"b64": "w78="}, "length": 2}]}
