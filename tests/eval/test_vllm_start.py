"""What vLLM and its processes write while it starts is in a file; the terminal shows the stage, or why it failed."""

import os
import subprocess
import time

from eval.generate.vllm_start import FIRST_STAGE, stage_of, start_logged, why_not_started

LOADING = "(EngineCore pid=7) INFO 11-27 06:37:00 [runner.py:68] Starting to load model m...\n"
WARMING = "(EngineCore pid=7) INFO 11-27 06:37:09 [utils.py:2328] CPU KV cache size: 1,024 tokens, ...\n"
# As vLLM 0.32 logs a start that fails: the reason, then two lines of other processes that only point to it
FAILED = """\
(EngineCore pid=7) ERROR 11-27 06:37:09 [core.py:1266] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-27 06:37:09 [core.py:1266]   File "cpu_worker.py", line 9, in determine_available_memory
(EngineCore pid=7) ERROR 11-27 06:37:09 [core.py:1266] ValueError: Not enough memory:\x1b[2J 1 of 2 GiB
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_all_that_is_written_in_the_block_is_in_the_log_and_the_stages_are_lines(tmp_path, capfd):
    log = tmp_path / "new" / "vllm.log"
    with start_logged(log):
        time.sleep(0.2)
        os.write(1, b"from a native library\n")
        subprocess.run(["sh", "-c", "echo from a process; echo its warning >&2"], check=True)
        os.write(2, LOADING.encode())
        time.sleep(0.8)
        os.write(1, WARMING.encode())
        time.sleep(0.8)
    os.write(2, b"afterwards\n")
    shown = capfd.readouterr()
    assert shown.err.splitlines() == [
        f"=> vLLM: {FIRST_STAGE}", "=> vLLM: loading the weights", "=> vLLM: warming up", "afterwards"
    ]  # fmt: skip
    assert shown.out == ""
    text = log.read_text()
    assert all(words in text for words in ("from a native library", "from a process", "its warning", LOADING, WARMING))


def test_a_process_of_the_block_writes_to_the_log_after_it(tmp_path, capfd):
    log = tmp_path / "vllm.log"
    with start_logged(log, shown=False):
        child = subprocess.Popen(["sh", "-c", "sleep 0.3; echo late"])
    child.wait()
    assert log.read_text() == "late\n"
    assert capfd.readouterr() == ("", "")


def test_the_terminal_is_given_back_after_an_error(tmp_path, capfd):
    try:
        with start_logged(tmp_path / "vllm.log", shown=False):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        os.write(1, b"back\n")
    assert capfd.readouterr().out == "back\n"


def test_a_later_stage_follows_an_earlier_one():
    assert stage_of("") == FIRST_STAGE
    assert stage_of(WARMING + LOADING) == "warming up"


def test_the_reason_of_a_failed_start_is_the_error_that_its_process_logged(tmp_path):
    log = tmp_path / "vllm.log"
    assert why_not_started(log) is None
    log.write_text(FAILED)
    assert why_not_started(log) == "ValueError: Not enough memory:␛[2J 1 of 2 GiB"
    log.write_text(LOADING)
    assert why_not_started(log) is None
