"""torchrun that hands SIGUSR1 on to its workers, and whose exit code says that a run stopped because of it.

    python train_scripts/torchrun.py --nnodes 2 --node-rank 0 ... -m fastvideo_grpo.cli train CONFIG

torchrun itself is killed by SIGUSR1, and whatever its workers exit with, it exits with 1. Here the signal reaches the
workers, those that do not listen to it yet too: it is blocked from the start, a worker inherits that, and it waits for the
worker until it listens (fastvideo_grpo/trainers/stopping.py).
"""

import signal

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # before there are threads, which inherit it

import contextlib  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402

import psutil  # noqa: E402
from torch.distributed import run  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402

from fastvideo_grpo.trainers.stopping import EXIT_STOPPED  # noqa: E402


def forward() -> None:
    """Hand every SIGUSR1 on to the workers (for other children it stays blocked)."""
    while True:
        signal.sigwait({signal.SIGUSR1})
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it may just have left
                child.send_signal(signal.SIGUSR1)


def main() -> int:
    """torchrun; the exit code is 0, ``EXIT_STOPPED`` if that is what a worker left with, else 1."""
    threading.Thread(target=forward, daemon=True).start()
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        if any(failure.exitcode == EXIT_STOPPED for failure in error.failures.values()):
            return EXIT_STOPPED
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
