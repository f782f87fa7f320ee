"""Real servers for tests: Redis (or Valkey) and S3, as processes of their own that can be killed and started again."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

BUCKET = "test"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """`command(port)` as a process, on a port of this machine that stays the same over restarts."""

    def __init__(self, command: Callable[[int], list[str]], ready: Callable[[int], bool]) -> None:
        self.command, self.ready, self.port = command, ready, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        quiet = subprocess.DEVNULL
        self.process = process = subprocess.Popen(self.command(self.port), stdin=quiet, stdout=quiet, stderr=quiet)
        end = time.monotonic() + 120
        while not self.ready(self.port):
            if process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(f"{' '.join(self.command(self.port))} does not answer")
            time.sleep(0.02)

    def kill(self) -> None:
        """As `kill -9`."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _pong(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as found:
        found.sendall(b"PING\r\n")
        return found.recv(7) == b"+PONG\r\n"
    return False


def _bucket(port: int) -> bool:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        return error.code == 409  # it is there
    except OSError:
        return False


def _absent(why: str) -> None:
    """Skips the test; fails it where the servers have to be there."""
    (pytest.fail if os.environ.get("KVLOOM_NEED_SERVERS") else pytest.skip)(f"NOT RUN against a real server: {why}")


def redis_server(*options: str) -> Server:
    """Redis or Valkey with nothing kept on disk. Skips the test where neither is installed."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        _absent("neither redis-server nor valkey-server is installed")
    path = str(program)
    fixed = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--loglevel", "warning"]
    return Server(lambda port: [path, "--port", str(port), *fixed, *options], _pong)


def s3_server() -> Server:
    """moto's S3 with one empty bucket, in memory. Skips the test where it is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("moto", "flask", "flask_cors")):
        _absent("moto[s3], flask and flask-cors, a stand-in for S3, are not installed")
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    return Server(lambda port: [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], _bucket)


@pytest.fixture(scope="session")
def real_redis() -> Iterator[str]:
    """The address of a Redis server of this session."""
    server = redis_server()
    server.start()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.kill()


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The endpoint of an S3 server of this session; its bucket is `test`."""
    server = s3_server()
    server.start()
    yield f"http://127.0.0.1:{server.port}"
    server.kill()
