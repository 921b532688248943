"""A reward that fails on demand, for processes and servers: `entry_point(folder)` makes it known there; and a forked server."""

import os
import sys
import time
from pathlib import Path

import torch

from fastvideo_grpo.rewards.base import RewardResult

KINDS = ("raise", "nan", "shape", "hang", "die")


class Unspeakable(Exception):
    def __str__(self):
        raise SystemExit(0)


class Faulty:
    """Mean brightness. A request whose first sample's metadata say {"fault": KIND, "times": N, "id": ...} fails in that way
    the first N times it comes; how often it came is kept in `folder`, which outlives the process."""

    outputs, media_kind = ("brightness",), "any"

    def __init__(self, *, folder):
        self.folder = Path(folder)
        if (self.folder / "broken").exists():
            raise OSError("the disk is gone")

    def score(self, request):
        scores = request.media.double().mean((1, 2, 3, 4)).float()
        asked = request.metadata[0]
        if "fault" in asked:
            with (self.folder / str(asked["id"])).open("a+") as file:
                file.write("x")
                came = file.tell()
            if came <= asked["times"]:
                scores = self._fail(asked["fault"], scores)
            if asked["fault"] == "spoil":
                request.media.zero_()
        return scores if scores is None else RewardResult({"brightness": scores}, torch.ones(len(request), dtype=torch.bool))

    def _fail(self, fault, scores):
        if fault == "raise":
            raise RuntimeError("scorer lost")
        if fault == "hang":
            time.sleep(3600)
        if fault == "die":
            os._exit(7)
        if fault == "exit":
            sys.exit(0)
        if fault == "interrupt":
            raise KeyboardInterrupt
        if fault == "unspeakable":
            raise Unspeakable
        if fault == "none":
            return None
        if fault == "sparse":
            return scores.to_sparse()
        if fault == "complex":
            return scores.to(torch.complex64)
        if fault == "nan":
            scores[0] = torch.nan
            return scores
        return scores[:, None]

    def to(self, device):
        return self

    def close(self):
        pass


def entry_point(folder):
    """Write an installed distribution into `folder` (to be put on the path) that offers the reward as "faulty"."""
    info = folder / "faulty_rewards-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fastvideo_grpo.rewards]\nfaulty = tests.workers.faulty_rewards:Faulty\n")
    return folder


def serve_reward(words):
    """`fastvideo-grpo serve-reward`, whose processes are forked, too."""
    from fastvideo_grpo import cli
    from fastvideo_grpo.rewards.placement import process
    from tests import fork_server

    process.subprocess = fork_server
    return cli.main(["serve-reward", *words])
