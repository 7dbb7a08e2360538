"""Shared by the tests of runs: a server that runs train.py in forked processes, and the unbroken run of each engine."""

import subprocess
from pathlib import Path

import pytest

from tests.support.engines import skip_without_deepspeed
from tests.support.killed_runs import RunServer


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = RunServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def unbroken(server, tmp_path_factory):
    """One run from start to finish for each engine: its folder, and how many file operations each process made."""
    runs = {}

    def get(engine):
        skip_without_deepspeed(engine)
        if engine not in runs:
            output = tmp_path_factory.mktemp(engine) / "run"
            codes, shown = server.run(output, engine=engine)
            assert set(codes) == {0}, shown[-4000:]
            events = [int(Path(f"{output}.log.{rank}.events").read_text()) for rank in range(len(codes))]
            runs[engine] = output, events
        return runs[engine]

    return get


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a tmpfs with the given options; skips the test where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("a tmpfs cannot be mounted here (it needs root)")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
