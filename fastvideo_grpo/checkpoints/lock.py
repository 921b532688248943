"""A run's folder belongs to one training at a time."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path
from typing import IO

from fastvideo_grpo.disk.room import describe
from fastvideo_grpo.errors import UserError

logger = logging.getLogger(__name__)


def lock_folder(folder: Path) -> IO[str]:
    """Hold ``folder/lock`` as long as the returned file is open (the kernel lets go of it when the process ends).

    Raises:
        UserError: another process trains in this folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(f"run.dir={folder} cannot be written: {describe(error)}; repair it, or choose another") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process is training in {folder}; wait for it, stop it, or choose another run.dir") from error
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): take care that no second training writes to it", folder, error)
    return file
