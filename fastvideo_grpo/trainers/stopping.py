"""Stopping a run between two iterations: SIGUSR1 asks for it, the run saves, leaves, and can be started again."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvideo_grpo.engines.parallel import World

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and is saved: EX_TEMPFAIL of sysexits.h, "try again later"."""


class StopSignal:
    """Listens to SIGUSR1 from now on, in this process; made early, in the main thread.

    Only noted when it comes: a checkpoint is exact between iterations alone. One process of the run is enough to signal.

    SIGTERM is left as it is, and ends the process at once. torchrun sends it to the workers when one of them died, which the
    others could then never agree to, and kills them half a minute later: too early for most iterations. Nothing is lost
    by it but the work since the newest checkpoint.
    """

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGUSR1, self._receive)
        signal.siginterrupt(signal.SIGUSR1, False)  # libraries that read from a socket are not disturbed
        # train_scripts/torchrun.py starts workers with the signal blocked, so that one that comes early waits for this.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True

    def agreed(self, world: World) -> bool:
        """Whether any process of the run was asked to stop. All of them call this together, and all get the same answer."""
        return not world.all_true(not self.received)
