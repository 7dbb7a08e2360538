"""What reaches the disk, and in which order."""

import os
from pathlib import Path


def record_disk(monkeypatch):
    """Record each fsync and each move in a list: ("flush", path) and ("move", source, destination).

    A file that is flushed before its last bytes were written does not count.
    """
    events, fsync = [], os.fsync
    flushed = {}

    def record_flush(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        flushed[path] = os.fstat(handle).st_size
        events.append(("flush", path))
        fsync(handle)

    def recording(move):
        def record_move(source, destination):
            source, destination = Path(source), Path(destination)
            if source.is_file() and flushed.get(source) != source.stat().st_size:
                events[:] = [event for event in events if event != ("flush", source)]
            events.append(("move", source, destination))
            move(source, destination)

        return record_move

    monkeypatch.setattr(os, "fsync", record_flush)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, recording(getattr(os, name)))
    return events
