"""The operations of a network, which every run counts at its start, counted once a session for all that are alike."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

from fastvideo_grpo.disk.durable_files import write_atomic
from fastvideo_grpo.planning import operations
from fastvideo_grpo.trainers import throughput
from tests import fork_server


def share() -> None:
    """From here on this process's runs look among those that the session's others have counted."""
    throughput.count_operations = _shared


def _shared(trainer: type[Any], config: Any, facts: Any) -> operations.Operations:
    read = (config.model, config.sample, config.prompts.text_length, config.engine, facts.components)
    name = hashlib.sha256(f"{trainer.__qualname__} {read}".encode()).hexdigest()
    file = Path(os.environ[fork_server.SESSION_VARIABLE]) / f"operations-{name}"
    if not file.exists():
        write_atomic(file, pickle.dumps(operations.count_operations(trainer, config, facts)))
    counted: operations.Operations = pickle.loads(file.read_bytes())
    return counted
