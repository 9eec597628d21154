"""How ranks begin and end: from scripts, under torchrun, and when one of them or the program is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from compactor_vllm import LLM, SamplingParams, WorkerDiedError

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
from dataclasses import dataclass
from compactor_vllm import LLM, BaseCompressionMethod, LLMConfig, SamplingParams, SequenceCompressionParams

@dataclass(frozen=True, kw_only=True)
class Late(BaseCompressionMethod):
    def post_rope_scoring(self, q, k, v, before, context):
        return context.positions_T[:, None].float().expand(k.shape[:2])

llm = LLM(LLMConfig(model=sys.argv[1], device="cpu", tensor_parallel_size=2, kv_cache_memory_bytes=2**22,
                    kvcache_page_size=16, max_model_len=2048, show_progress_bar=False))
print(*(llm._parts.team.process_ids if llm._parts.team else ()), flush=True)
params = SequenceCompressionParams(compression_ratio=0.5, compression_method=Late(),
                                   protected_first_tokens=0, protected_last_tokens=0)
sampling = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
answer = llm.generate(list(range(40)), sampling, None, params, return_sequences=True)
print(answer.kept_tokens, answer.error, flush=True)
"""

FOREVER = """
while True:
    llm.generate([list(range(100))] * 4, SamplingParams(temperature=0, max_new_tokens=50, ignore_eos=True))
"""


def script(tmp_path: Path, text: str, model: Path, *launcher: str) -> subprocess.Popen:
    path = tmp_path / "script.py"
    path.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *launcher, str(path), str(model)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What a shell starts in the background ignores interrupts, and so do its children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_gone(pids: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"{alive} are still there"
        time.sleep(0.1)


def check_a_killed_rank(llm: LLM) -> None:
    """Kills the last rank of an engine while it generates: an error within ten seconds, and nothing is left."""
    pids = llm._parts.team.process_ids
    sampling = SamplingParams(temperature=0, max_new_tokens=500, ignore_eos=True)
    stream, waiting = (llm.stream(list(range(50)), sampling) for _ in range(2))
    next(stream)
    killed = time.monotonic()
    os.kill(pids[-1], signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=r"rank \d"):
        list(stream)
    assert time.monotonic() - killed < 10
    assert [s.sequence.finish_reason for s in (stream, waiting)] == ["error", "error"]
    with pytest.raises(WorkerDiedError):
        llm.generate([1, 2, 3])
    assert_gone(pids, 10 - (time.monotonic() - killed))


def test_a_script_without_a_main_guard_leaves_nothing(tmp_path, checkpoints):
    """Its method exists in the script only, and it ends without closing the engine."""
    process = script(tmp_path, SCRIPT, checkpoints["llama"])
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    pids, result = output.splitlines()
    assert result == "20 None"
    assert_gone([int(pid) for pid in pids.split()], 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_program_that_is_interrupted_or_killed_leaves_nothing(tmp_path, checkpoints, kind):
    process = script(tmp_path, SCRIPT + FOREVER, checkpoints["llama"])
    pids = [int(pid) for pid in process.stdout.readline().split()]
    process.stdout.readline()
    time.sleep(0.5)
    if kind == "SIGINT":  # as a terminal does, to all of them
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(getattr(signal, kind))
    _, errors = process.communicate(timeout=15)
    assert process.returncode != 0
    assert ("KeyboardInterrupt" in errors) == (kind == "SIGINT")
    assert_gone(pids)


@pytest.mark.slow
def test_ctrl_c_waits_for_the_step_and_the_engine_goes_on(tmp_path, checkpoints):
    text = (
        SCRIPT
        + """
import signal, threading, os
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        llm.generate([list(range(100))] * 4, sampling)
except KeyboardInterrupt:
    pass
print(llm.generate(list(range(40)), sampling, None, params, return_sequences=True).kept_tokens)
llm.clear_prefix_cache()
llm._engine.manager.check_integrity([])
"""
    )
    process = script(tmp_path, text, checkpoints["llama"])
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and output.splitlines()[-1] == "20", errors


@pytest.mark.slow
def test_under_torchrun(tmp_path, checkpoints):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = script(tmp_path, SCRIPT, checkpoints["llama"], *launcher)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert output.splitlines() == ["", "20 None"]  # rank 0 alone goes on behind LLM(...)


@pytest.mark.slow
def test_a_rank_that_cannot_start_says_why(tmp_path, checkpoints, start, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'compactor_vllm.distributed.worker' in sys.orig_argv: os._exit(7)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(WorkerDiedError, match="rank 1 has ended with status 7 while it started"):
        start("llama", 2)
