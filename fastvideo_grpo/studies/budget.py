"""What an iteration costs, so that the arms of a study get equal budgets.

The unit is one network evaluation: a forward of one sample at one timestep. A backward costs two more, the usual estimate (it
computes gradients of activations and of weights). Decoding, rewards, the optimiser and evaluations are not counted:
they are the same for all arms, or next to nothing.
"""

from __future__ import annotations

from fastvideo_grpo.config.keys import Config, guidance_of, make_objective
from fastvideo_grpo.errors import UserError
from fastvideo_grpo.planning.plan import dealing
from fastvideo_grpo.planning.run_steps import RunSteps, drawing_of

FORWARD = 1
BACKWARD = 2


def evaluations_per_iteration(config: Config) -> int:
    """Network evaluations of one iteration of Algorithm 1.

    Sampling: prompts x samples x steps forwards, what a group shares once, and the solver's steps behind; on average over where
    the stochastic steps are. Update: for each trained sample (rows that only fill a micro-batch included, since they are
    computed) and timestep a forward with its backward, and a forward of the reference where the objective has one, and of each
    weights whose outputs are stored. Classifier-free guidance makes each of these two passes; the one without the prompt has no
    backward where ``grpo.cfg_gradients`` is conditional (and the two are not one pass).
    """
    grpo, guidance, steps = config.grpo, guidance_of(config), RunSteps(config)
    passes, trained_passes = (2 if scale > 1 else 1 for scale in (guidance.rollout, guidance.training))
    dealt = dealing(config, ranks=1)
    rows = sum(len(dealt.update_batches(u, 0)) for u in range(grpo.updates_per_iteration)) * dealt.micro_batch_size
    trained = rows * steps.trained
    sampling = round(drawing_of(config, dealt, 0).samples) * passes * FORWARD
    # In one pass over both texts the gradient goes back through both, whatever is made of it.
    backwards = 1 if grpo.cfg_gradients == "conditional" and not config.model.cfg_batched else trained_passes
    update = trained * (trained_passes * FORWARD + backwards * BACKWARD)
    update += trained * trained_passes * FORWARD * (make_objective(config).needs_reference + len(steps.stored))
    if "old" in steps.stored:
        update += dealt.micro_batch_size * trained_passes * FORWARD  # one of them once more, to be compared
    return sampling + update


def iterations(config: Config, budget: int) -> int:
    """Whole iterations that ``budget`` network evaluations pay for.

    Raises:
        UserError: not even one.
    """
    cost = evaluations_per_iteration(config)
    if budget < cost:
        raise UserError(f"--budget is {budget}, but one iteration takes {cost} network evaluations: give at least {cost}")
    return budget // cost
