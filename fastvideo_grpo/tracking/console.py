"""What a person sees while a run goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


class Console:
    """Lines on standard output, and on a terminal a bar while an iteration runs.

    Args:
        quiet: say nothing (all ranks but the first).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        """Print a line."""
        self._close_bar()
        if not self.quiet:
            print(text, flush=True)

    def progress(self, what: str) -> Callable[[int, int], None]:
        """A function (done, total) that shows how far ``what`` is; nothing where standard error is no terminal."""
        if self.quiet or not sys.stderr.isatty():
            return lambda done, total: None

        def show(done: int, total: int) -> None:
            if self._bar is None or self._bar.desc != f"{what}: ":
                self._close_bar()
                self._bar = tqdm(total=total, desc=what, leave=False, unit="batch", dynamic_ncols=True)
            self._bar.update(done - self._bar.n)
            if done >= total:
                self._close_bar()

        return show

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def iteration(self, finished: int, total: int, metrics: dict[str, Any]) -> None:
        """The line of an iteration, and the evaluation if it had one."""
        rewards = [
            f"{key.split('/', 1)[1].removesuffix('/mean')} {value:.3f}"
            for key, value in metrics.items()
            if key.startswith("reward/") and key.endswith("/mean")
        ]
        invalid = sum(value for key, value in metrics.items() if key.endswith("/invalid"))
        seconds = sum(value for key, value in metrics.items() if key.startswith("time/"))
        each = metrics["perf/seconds_per_sample"]
        parts = [
            f"iteration {finished:{len(str(total))}}/{total}",
            *rewards,
            *([f"{invalid} invalid"] if invalid else []),
            *(
                f"{count} not finite in {key.partition('/')[0]}"
                for key, count in metrics.items()
                if key in ("sampling/not_finite", "decoding/not_finite") and count
            ),
            *(
                f"{what} {metrics[key]:.0%}"
                for what, key in (("clipped", "train/clip_fraction"), ("masked", "train/masked_fraction"))
                if key in metrics
            ),
            f"grad {metrics['train/grad_norm']:.3g}",
            f"{seconds:.1f} s, {each:.{2 if each < 10 else 1}f} a sample",
        ]
        self.say("  ".join(parts))
        self.evaluation(f"after {finished}", {k: v for k, v in metrics.items() if k.startswith("eval/")})

    def evaluation(self, when: str, metrics: dict[str, Any]) -> None:
        """``evaluation after 50: train colour 0.71 +- 0.02, heldout ...``"""
        shown = []
        for key, value in metrics.items():
            if key.endswith("/mean"):
                error = metrics[key.removesuffix("mean") + "stderr"]
                _, name, reward = key.removesuffix("/mean").split("/", 2)
                shown.append(f"{name} {reward} {value:.3f} ± {error:.3f}")
            elif key.endswith("/not_finite") and value:
                shown.append(f"{key.split('/')[1]} {value} not finite")
        if shown:
            self.say(f"evaluation {when}: " + ", ".join(shown))
