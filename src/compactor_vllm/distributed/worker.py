"""The program of a rank that `LLM` has started: `python -m compactor_vllm.distributed.worker`.

What it is to do comes through standard input, whose end says that the process that started it is gone.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; rank 0 decides
    parent = sys.stdin.buffer
    seat, entry, payload = pickle.load(parent)

    def end_with_parent() -> None:
        parent.read()
        time.sleep(5)  # this rank may be ending properly
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    import torch.distributed as dist

    from compactor_vllm.distributed.team import run_member

    host, port = seat.store
    store = dist.TCPStore(host, port, seat.size, is_master=False)
    try:
        run_member(seat, store, entry, payload)
    except BaseException:
        # Rank 0 has the traceback. Process groups must not wait for ranks that are gone.
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
