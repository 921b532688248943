"""``fastvideo-grpo train``: check everything, load, train or resume."""

from __future__ import annotations

import argparse

from fastvideo_grpo import launcher
from fastvideo_grpo.commands.arguments import path_argument
from fastvideo_grpo.config import saved as config_saved
from fastvideo_grpo.config.keys import Config
from fastvideo_grpo.errors import ConfigError
from fastvideo_grpo.models import run_config
from fastvideo_grpo.models.checkpoint import model_facts
from fastvideo_grpo.models.facts import ModelFacts
from fastvideo_grpo.planning import plan
from fastvideo_grpo.planning.cards import CARDS, card_of
from fastvideo_grpo.printed_commands import runnable
from fastvideo_grpo.trainers.stopping import EXIT_STOPPED, StopSignal

EPILOG = """\
examples:
  fastvideo-grpo train train_scripts/configs/flux_t2i_tiny.yaml
  fastvideo-grpo train train_scripts/configs/flux_t2i_tiny.yaml run.iterations=10 optim.lr=1e-4
  torchrun --nproc-per-node 8 -m fastvideo_grpo.cli train train_scripts/configs/flux_t2i_released.yaml
  fastvideo-grpo train train_scripts/configs/flux_t2i_paper.yaml --dry-run --world-size 32 --gpu h100

A text (a prompt, a path, a name) is what stands behind the first =, as it is; rewards.models.NAME=null removes a reward.
A second start with the same run.dir resumes from its newest whole checkpoint, exactly.
All keys, their defaults and meaning: docs/configuration.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=path_argument, metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="single keys, e.g. run.iterations=10; a text is all behind the ="
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration, the sizes and what one iteration does"
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: plan for N processes")
    parser.add_argument(
        "--gpu",
        choices=[card.key for card in CARDS],
        help="with --dry-run: seconds an iteration and GPU-hours of the run on these cards, worked out",
    )
    parser.epilog = EPILOG


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0: all iterations are done. 75 (EXIT_STOPPED): stopped by SIGUSR1, saved; start it again to go on."""
    stop = None if arguments.dry_run else StopSignal()
    config = run_config.load(arguments.config, arguments.overrides)
    if arguments.world_size is not None and not arguments.dry_run:
        raise ConfigError("--world-size only goes with --dry-run; start real processes with torchrun")
    if arguments.gpu is not None and not arguments.dry_run:
        raise ConfigError("--gpu only goes with --dry-run: a run takes the GPUs that are here")
    if arguments.world_size is not None and arguments.world_size < 1:
        raise ConfigError(f"--world-size is {arguments.world_size}; it must be at least 1")
    ranks = arguments.world_size or launcher.world_size()
    facts = model_facts(config, published_if_missing=arguments.dry_run)
    plan.check_run(config, facts, ranks, here=not arguments.dry_run)
    if arguments.dry_run:
        print(config_saved.to_yaml(config))
        print(runnable(plan.describe(config, facts, ranks)))
        if arguments.gpu is not None:
            print("\n".join(_cost(config, facts, ranks, arguments.gpu)))
        return 0
    plan.warn(config, facts)
    plan.warn_of_memory(config, facts, ranks)
    return 0 if train(config, stop) else EXIT_STOPPED


def _cost(config: Config, facts: ModelFacts, ranks: int, gpu: str) -> list[str]:
    """What the run takes on such cards, for a person."""
    from fastvideo_grpo.planning.cost import describe_cost, run_cost
    from fastvideo_grpo.planning.memory import estimate
    from fastvideo_grpo.trainers.load import trainer_class

    cost = run_cost(trainer_class(config.model.kind), config, facts, ranks, card_of(gpu))
    needed = estimate(config, facts, ranks, plan.count_parameters(config, facts)).peak
    return describe_cost(cost, config, needed)


def train(config: Config, stop: StopSignal | None = None) -> bool:
    """Load the model and train; the configuration was checked. False: ``stop`` asked to leave before the end."""
    from fastvideo_grpo.engines.compiled_blocks import check_compiler
    from fastvideo_grpo.engines.parallel import World
    from fastvideo_grpo.engines.process import prepare_process
    from fastvideo_grpo.tracking.console import Console
    from fastvideo_grpo.trainers.load import load_trainer

    prepare_process(config)
    world = World.current(timeout_minutes=config.run.timeout_minutes, sequence_parallel=config.engine.sequence_parallel)
    if config.model.compile != "none":
        check_compiler(world.device)
    plan.check_images(config, world)
    plan.check_folder(config)
    done = plan.iterations_done(config, world)
    if done is not None:
        Console(quiet=world.rank != 0).say(plan.all_done(config, done))
        world.leave()
        return True
    world.on_rank_0(lambda: plan.check_disk(config, model_facts(config)))
    with load_trainer(config, world) as trainer:
        trainer.setup_training()
        finished = trainer.train(stop)
    world.leave()
    return finished
