"""Jobs of two real processes on loopback, with four devices each."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from faults.runner import MAIN

PROCESSES = 2


class Job:
    """The processes of one job, started as a launcher would."""

    def __init__(self, config, folder, sets=(), *, odd=()):
        """`config` is VERB.gin, and `odd` has settings for process 1 only."""
        verb = config.stem
        folder.mkdir(exist_ok=True)
        self.logs = [folder.parent / f"{folder.name}.{index}.log" for index in range(PROCESSES)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.processes = []
        for index, log in enumerate(self.logs):
            words = [verb, str(config), "--hosts"]
            own = odd if index else ()
            for word in (f"{verb.capitalize()}.workdir='{folder}'", *sets, *own):
                words += ["--set", word]
            here = {
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "4",
                "JAX_DEFAULT_MATMUL_PRECISION": "highest",
                "JAX_COMPILATION_CACHE_DIR": "",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(PROCESSES),
                "JAX_PROCESS_ID": str(index),
            }
            environment = os.environ | here
            with log.open("wb") as out:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", MAIN, *words],
                        env=environment,
                        stdout=out,
                        stderr=out,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self, index):
        return self.logs[index].read_text()[-3000:]

    def wait_for(self, has_come):
        until = time.monotonic() + 900
        while not has_come():
            assert all(p.poll() is None for p in self.processes), self.output(0) + self.output(1)
            assert time.monotonic() < until
            time.sleep(0.01)

    def wait(self, seconds=900):
        """Waits for all processes; returns their exit statuses."""
        until = time.monotonic() + seconds
        return [p.wait(timeout=max(until - time.monotonic(), 0)) for p in self.processes]

    def finish(self):
        assert self.wait() == [0] * PROCESSES, self.output(0) + self.output(1)
