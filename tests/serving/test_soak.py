"""Load at saturation while versions change and a worker is killed: nothing lost, nothing wrong, memory flat.

TFVLLM_SOAK_SECONDS sets how long (default 12).
"""

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests import tiny_models
from tfvllm.bench import serve as bench
from tfvllm.savedmodel import versions

SECONDS = float(os.environ.get("TFVLLM_SOAK_SECONDS", "12"))


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def workers(pid: int) -> list[int]:
    """The worker processes: the children that hold TensorFlow (multiprocessing has a small one of its own)."""
    return [child for child in children(pid) if memory_of(child) > 150]


def memory_of(pid: int) -> float:
    """Resident MiB."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_two_clients_two_reloads_one_dead_worker(base, monkeypatch):
    import subprocess

    started, popen = [], subprocess.Popen

    def remember(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(bench.subprocess, "Popen", remember)
    options = ["--workers", "2", "--poll", "0.2"]
    with bench.serving(base / "many", options) as (url, _):
        server = started[0]
        wrong, statuses, memory = [], [], []
        of_workers: dict[int, list[tuple[float, float]]] = {}
        known = {12.0: 1, 18.0: 2, 30.0: 3, 42.0: 4}
        body = json.dumps({"instances": [{"a": [1, 2, 3], "b": 4}]}).encode()
        stop = time.monotonic() + SECONDS

        async def client(number: int) -> None:
            import urllib.parse

            parts = urllib.parse.urlsplit(url)
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            head = f"POST {parts.path}:predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            highest = 0
            while time.monotonic() < stop:
                writer.write(head + body)
                status, answer = await bench._answer(reader)
                statuses.append(status)
                prediction = json.loads(answer)["predictions"][0] if status == 200 else answer
                version = known.get(prediction["sum"]) if status == 200 and prediction["twice"] == 8 else None
                if version is None or version < highest:  # a version once seen does not go back
                    wrong.append(prediction)
                highest = max(highest, version or 0)
            writer.close()

        def meddle() -> None:
            time.sleep(SECONDS * 0.2)
            tiny_models_saved(base, 5.0)
            time.sleep(SECONDS * 0.2)
            victims = workers(server.pid)
            if victims:
                os.kill(victims[0], signal.SIGKILL)
            killed.append(len(victims))
            time.sleep(SECONDS * 0.3)
            tiny_models_saved(base, 7.0)

        def tiny_models_saved(base, factor):
            tiny_models.save_many(base / f"new{factor}", factor)
            versions.publish(base / f"new{factor}", base / "many")

        def watch() -> None:
            while time.monotonic() < stop - 0.5:
                at = time.monotonic() - stop + SECONDS
                memory.append((at, memory_of(server.pid)))
                for child in workers(server.pid):
                    of_workers.setdefault(child, []).append((at, memory_of(child)))
                time.sleep(0.5)

        killed: list[int] = []
        threads = [threading.Thread(target=target) for target in (meddle, watch)]
        for thread in threads:
            thread.start()

        async def both() -> None:
            await asyncio.gather(client(0), client(1))

        asyncio.run(both())
        for thread in threads:
            thread.join()
        assert killed == [2]
        deadline = time.monotonic() + 60
        while len(workers(server.pid)) < 2:  # the dead one has a successor
            assert time.monotonic() < deadline
            time.sleep(0.2)
    sizes = {child: [size for _, size in seen] for child, seen in of_workers.items()}
    shown = ", ".join(f"{seen[0]:.0f} -> {seen[-1]:.0f}" for seen in sizes.values())
    print(
        f"{len(statuses)} answers in {SECONDS:g} s, front process {memory[0][1]:.0f} -> {memory[-1][1]:.0f} MiB, "
        f"workers {shown} MiB"
    )
    assert wrong == []
    assert set(statuses) == {200}
    assert len(statuses) > 5 * SECONDS
    early = [size for at, size in memory if at < SECONDS * 0.3]
    late = [size for at, size in memory if at > SECONDS * 0.8]
    assert max(late) < 1.1 * max(early) + 5
    assert len(sizes) == 3  # two at first; the killed one's successor
    # Each of them loads two further versions and drops two, and never holds more than the first two did at first.
    first = max(size for seen in of_workers.values() for at, size in seen if at < SECONDS * 0.2)
    assert max(map(max, sizes.values())) < 1.1 * first + 10
