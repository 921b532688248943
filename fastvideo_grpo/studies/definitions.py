"""The studies: what is compared, and what the paper says of it.

Everything here was written before any run; what was seen is worked out from the numbers (:mod:`.report`). A claim is put as
comparisons of two arms in a measure, each of which :func:`.statistics.verdict` judges on its own.
"""

from __future__ import annotations

from dataclasses import dataclass

BUDGET = 24_000
"""Network evaluations of a run (see :mod:`.budget`); about 40 seconds on one core."""

SEEDS = 3

SEARCH_SEED = 100
"""Of the runs that choose an arm's learning rate, so that none of those that are compared has chosen it."""

SEARCH_POINTS = 8
"""Evaluations during such a run, besides the one before it."""

REACHED = 0.80
"""colour_match that ``until`` waits for."""

BEFORE = "untrained"
"""The arm that every study has besides its own: the model as it was."""


@dataclass(frozen=True)
class Arm:
    """One way of doing it: overrides of the base configuration. The label says, by itself, what is done."""

    label: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """``first`` is larger in ``measure`` than ``second`` (">"), or they do not differ ("=")."""

    first: str
    relation: str
    second: str
    measure: str = "colour_match"


@dataclass(frozen=True)
class Study:
    """One of the paper's comparisons.

    Attributes:
        name: on the command line.
        settings: base configuration, a YAML file in data/.
        claim: what the paper says, and where.
        miniature: how this differs from the paper's experiment, for a reader who weighs the result.
        overrides: of the base configuration, for all arms.
        measures: columns of the table, from :data:`MEASURES`.
        budget: in multiples of the run's budget; guidance makes two passes of each evaluation.
        equal_iterations: evaluate often enough to compare the arms after equally many iterations, too.
        curve_points: evaluations during a run, besides the one before it.
        search: overrides of which each arm takes the one that serves it best, in a run of a seed of its own; none: no search.
        of_the_paper: the claim is the paper's; else a question of this project's.
    """

    name: str
    title: str
    settings: str
    question: str
    claim: str
    source: str
    miniature: str
    overrides: tuple[str, ...]
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    measures: tuple[str, ...]
    budget: int = 1
    equal_iterations: bool = False
    curve_points: int = 4
    search: tuple[str, ...] = ()
    of_the_paper: bool = True


MEASURES = {
    "colour_match": "fraction of the coloured area that has the prompt's colour",
    "colour_match_train": "the same, prompts trained on",
    "colour_match_heldout": "the same, prompts kept out of training",
    "colour_distance": "minus the distance of the coloured area from the prompt's colour; smooth",
    "jpeg_size": "minus the size as a JPEG in kilobytes",
    "size_change": "kilobytes by which the JPEG size moved from the untrained model's, either way",
    "area": "mean of colour_match over the whole curve: how fast was learned",
    "at_equal_iterations": "colour_match after as many iterations as the dearest arm made",
    "until": f"thousands of network evaluations until colour_match is {REACHED:.2f} in the curve, between whose points it is "
    "taken to rise evenly",
    "distance": "distance of the trained weights from the first, in percent of their length",
    "ratio_mean": "mean of the ratio minus 1, in parts of the clip range: below 0 where steps shift it to the left",
    "diversity": "mean pairwise distance of pictures of a prompt, root mean square of pixels in [0, 1]",
    "shape_diversity": "the same of the coloured areas alone: fraction of pixels that only one of two pictures colours",
    "roughness": "mean difference of neighbouring pixels in [0, 1]: noise raises it",
    "ratio_dev": "largest deviation of the ratio from 1 before an iteration's first step; exactly 0 is right",
}

_FLOW, _DIFFUSION = "study_flow.yaml", "study_diffusion.yaml"
_COLOUR = "rewards.models.reward.kind=colour_match"
_DISTANCE = "rewards.models.reward.kind=colour_distance"
_REWARD = ("colour_match", "colour_match_heldout", "area")

_TINY = "A 0.5 M parameter FLUX that draws coloured shapes, rewarded for the colour that the prompt names."
_TINY_SD = (
    "A tiny Stable Diffusion that draws coloured shapes, sampled by DDIM with noise and guided; two updates an iteration, as "
    "in the released settings."
)


PAPERS_WAY = "the paper's way"
BEST_WAY = "the best of them together"
_ALL_TRAINED = ("grpo.timesteps.strategy=all", "grpo.timesteps.fraction=1.0")
_ONE = ("sample.stochastic.steps=one", *_ALL_TRAINED)
_BEST = (*_ONE, "sample.stochastic.tail=0.4", "grpo.timesteps.weight=rectified")


STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        Study(
            name="initial_noise",
            title="Initial noise",
            settings=_FLOW,
            question="Should the samples of a prompt start from the same noise?",
            claim="With different initial noise for samples of one prompt, training hacks the reward and is unstable; with "
            "shared noise it does not and is not.",
            source="section 2.2 and Figure 8 (HunyuanVideo)",
            miniature=f"{_TINY} The paper saw hacking in videos, on learned rewards; colour_match is hard to hack. What can "
            "move without being rewarded is looked at instead: the pictures' size as JPEGs, and noise in them. Instability "
            "would show in the last columns, and in the spread over seeds.",
            overrides=(_COLOUR,),
            arms=(Arm("shared noise"), Arm("noise per sample", ("sample.init_noise=per_sample",))),
            comparisons=(
                Comparison("shared noise", ">", "noise per sample"),
                Comparison("noise per sample", ">", "shared noise", "size_change"),
                Comparison("noise per sample", ">", "shared noise", "roughness"),
            ),
            measures=(*_REWARD, "size_change", "roughness", "ratio_dev"),
        ),
        Study(
            name="timesteps",
            title="Timestep selection",
            settings=_FLOW,
            question="Which of a trajectory's timesteps should an update train on?",
            claim="The first 30 % of the timesteps, from noise, matter most, but training on them alone is worse than training "
            "on the whole sequence. Dropping 40 % at random is taken as the trade-off.",
            source="section 3.6 and Figure 4(b) (HunyuanVideo-T2I)",
            miniature=f"{_TINY} The budgets are equal in network evaluations, so that an arm with fewer timesteps makes more "
            "iterations; the paper plots reward against iterations.",
            overrides=(_COLOUR,),
            arms=(
                Arm("first 30 % of steps", ("grpo.timesteps.strategy=first", "grpo.timesteps.fraction=0.3")),
                Arm("random 30 % of steps", ("grpo.timesteps.strategy=random", "grpo.timesteps.fraction=0.3")),
                Arm("last 40 % of steps", ("grpo.timesteps.strategy=last", "grpo.timesteps.fraction=0.4")),
                Arm("random 60 % of steps"),
                Arm("all steps", ("grpo.timesteps.strategy=all", "grpo.timesteps.fraction=1.0")),
            ),
            comparisons=(
                Comparison("first 30 % of steps", ">", "last 40 % of steps"),
                Comparison("first 30 % of steps", ">", "random 30 % of steps"),
                Comparison("all steps", ">", "first 30 % of steps"),
                Comparison("random 60 % of steps", "=", "all steps"),
            ),
            measures=_REWARD,
        ),
        Study(
            name="noise_level",
            title="Noise level",
            settings=_FLOW,
            question="How much noise should the SDE of the rollout have?",
            claim="A lower noise level learns markedly worse; above 0.3 the pictures are sometimes noisy after training.",
            source="section 3.6 and Figure 4(c) (FLUX)",
            miniature=f"{_TINY} The base of all studies on flow has noise level 1.0, not the paper's 0.3: a model this small "
            "needs it to learn within the budget.",
            overrides=(_COLOUR,),
            arms=(
                Arm("noise 0.1", ("sample.noise_level=0.1",)),
                Arm("noise 0.3", ("sample.noise_level=0.3",)),
                Arm("noise 0.6", ("sample.noise_level=0.6",)),
                Arm("noise 1.0"),
                Arm("noise 1.5", ("sample.noise_level=1.5",)),
            ),
            comparisons=(
                Comparison("noise 0.3", ">", "noise 0.1"),
                Comparison("noise 1.0", ">", "noise 0.3"),
                Comparison("noise 1.0", ">", "noise 0.3", "roughness"),
                Comparison("noise 1.5", ">", "noise 0.3", "roughness"),
            ),
            measures=(*_REWARD, "roughness"),
        ),
        Study(
            name="noise_schedule",
            title="Noise schedules that decay",
            settings=_FLOW,
            question="Should the noise level fall from noise to data?",
            claim="Schedules that decay, as DDPM's do, make no significant difference to a constant noise level.",
            source="section 3.6 (FLUX)",
            miniature=f"{_TINY} The noise level at time t is 1.0, its square root of t, or t. With three seeds only a large "
            "difference could be told.",
            overrides=(_COLOUR,),
            arms=(
                Arm("constant noise"),
                Arm("noise falls as sqrt(t)", ("sample.noise_decay=0.5",)),
                Arm("noise falls as t", ("sample.noise_decay=1.0",)),
            ),
            comparisons=(
                Comparison("noise falls as sqrt(t)", "=", "constant noise"),
                Comparison("noise falls as t", "=", "constant noise"),
                Comparison("noise falls as t", "=", "constant noise", "roughness"),
            ),
            measures=(*_REWARD, "roughness"),
        ),
        Study(
            name="best_of_n",
            title="Best-of-N",
            settings=_FLOW,
            question="Does training on the best and worst 8 of more samples pay?",
            claim="Training on the top 8 and bottom 8 of larger pools (16, 64, 256) converges faster per iteration, at the "
            "price of sampling efficiency.",
            source="section 3.2 and Figure 4(a) (Stable Diffusion)",
            miniature=f"{_TINY} One prompt an iteration, whose pool is drawn by network evaluations that count: the dearest "
            "arm makes the fewest iterations. Compared at equal iterations, as the paper plots it, and at equal cost.",
            overrides=(
                _COLOUR,
                "grpo.prompts_per_iteration=1",
                "grpo.updates_per_iteration=1",
                "engine.micro_batch_size=16",
            ),
            arms=(
                Arm("16 of 16 samples", ("grpo.group_size=16",)),
                Arm("16 of 64 samples", ("grpo.group_size=64", "grpo.best_of.top=8", "grpo.best_of.bottom=8")),
                Arm("16 of 256 samples", ("grpo.group_size=256", "grpo.best_of.top=8", "grpo.best_of.bottom=8")),
            ),
            comparisons=(
                Comparison("16 of 64 samples", ">", "16 of 16 samples", "at_equal_iterations"),
                Comparison("16 of 256 samples", ">", "16 of 64 samples", "at_equal_iterations"),
                Comparison("16 of 16 samples", ">", "16 of 64 samples"),
                Comparison("16 of 64 samples", ">", "16 of 256 samples"),
            ),
            measures=("at_equal_iterations", *_REWARD),
            budget=2,
            equal_iterations=True,
        ),
        Study(
            name="binary_reward",
            title="Binary reward",
            settings=_FLOW,
            question="Is 1 above a threshold, else 0, enough to learn from?",
            claim="Training on a thresholded reward works.",
            source="section 3.2 and Figure 3(a) (Stable Diffusion)",
            miniature=f"{_TINY} The threshold is 0.8. Both arms are judged by the score before the threshold.",
            overrides=(_COLOUR,),
            arms=(
                Arm("continuous reward"),
                Arm("binary reward", ("rewards.models.reward.outputs.colour_match.threshold=0.8",)),
            ),
            comparisons=(Comparison("binary reward", ">", BEFORE), Comparison("continuous reward", ">", BEFORE)),
            measures=_REWARD,
        ),
        Study(
            name="multi_reward",
            title="Two rewards",
            settings=_FLOW,
            question="What becomes of each reward when both are trained on?",
            claim="Adding the CLIP score to HPS-v2.1 lowers the HPS that is reached, and raises the CLIP score: the "
            "advantages of two rewards can be added.",
            source="section 2.2, Tables 2 and 3, Figure 1",
            miniature=f"{_TINY} In place of HPS and CLIP: colour_match and jpeg_size (smaller files), which is won by "
            "destroying the picture, where colour_match is lost.",
            overrides=(),
            arms=(
                Arm("colour alone", (_COLOUR,)),
                Arm("size alone", ("rewards.models.size.kind=jpeg_size",)),
                Arm("colour and size", (_COLOUR, "rewards.models.size.kind=jpeg_size")),
            ),
            comparisons=(
                Comparison("colour alone", ">", "colour and size"),
                Comparison("colour and size", ">", "colour alone", "jpeg_size"),
                Comparison("colour and size", ">", "size alone"),
                Comparison("size alone", ">", "colour and size", "jpeg_size"),
                Comparison("colour and size", ">", BEFORE),
                Comparison("colour and size", ">", BEFORE, "jpeg_size"),
            ),
            measures=("colour_match", "colour_match_heldout", "jpeg_size", "shape_diversity"),
        ),
        Study(
            name="diversity",
            title="Diversity before and after",
            settings=_FLOW,
            question="Do pictures from different noise become alike?",
            claim="After training, different seeds tend to give similar pictures.",
            source="Figure 7",
            miniature=f"{_TINY} Distances are of pixels. Pictures of the right colour are alike in colour, which the reward "
            "asks for; the coloured areas alone show whether more than that is lost.",
            overrides=(_COLOUR,),
            arms=(Arm("trained on shared noise"), Arm("trained on noise per sample", ("sample.init_noise=per_sample",))),
            comparisons=(
                Comparison(BEFORE, ">", "trained on shared noise", "diversity"),
                Comparison(BEFORE, ">", "trained on shared noise", "shape_diversity"),
            ),
            measures=("colour_match", "diversity", "shape_diversity"),
        ),
        Study(
            name="objectives",
            title="Objectives",
            settings=_DIFFUSION,
            question="GRPO, DDPO, DPOK, ReFL or online DPO on a diffusion model?",
            claim="GRPO reaches more than DDPO and online DPO by far and slightly more than ReFL (HPS 0.365; DDPO 0.297, ReFL "
            "0.357, DPO 0.241, untrained 0.239).",
            source="Table 4 (Stable Diffusion), section 3.2, Appendix 9",
            miniature=f"{_TINY_SD} All are trained on colour_distance, which ReFL can differentiate, at one learning rate: "
            "none was tuned. ReFL's way back through the decoder and the reward is not counted. DPOK is not in the paper's "
            "table.",
            overrides=(_DISTANCE,),
            arms=(
                Arm("GRPO"),
                Arm("DDPO", ("grpo.objective=ddpo",)),
                Arm("DPOK", ("grpo.objective=dpok",)),
                Arm("ReFL", ("grpo.objective=refl",)),
                # A pair a micro-batch: no rows that only fill.
                Arm("DPO", ("grpo.objective=dpo", "engine.micro_batch_size=2")),
            ),
            comparisons=(
                Comparison("GRPO", ">", BEFORE, "colour_distance"),
                Comparison("GRPO", ">", "DDPO", "colour_distance"),
                Comparison("GRPO", ">", "ReFL", "colour_distance"),
                Comparison("GRPO", ">", "DPO", "colour_distance"),
                Comparison("ReFL", ">", "DDPO", "colour_distance"),
                Comparison("DDPO", ">", "DPO", "colour_distance"),
            ),
            measures=("colour_distance", "colour_match", "colour_match_heldout", "area", "diversity"),
            budget=2,
        ),
        Study(
            name="methods",
            title="Methods after DanceGRPO",
            settings=_FLOW,
            question="Which way needs fewest network evaluations for the same reward?",
            claim="Windows, single steps, solved tails and other trust regions reach the same reward in fewer network "
            "evaluations.",
            source="MixGRPO, Flash-GRPO, Flow-CPS, GRPO-Guard and Flow-DPPO, each against a baseline of its own "
            "(docs/methods.md)",
            miniature=f"{_TINY} The budgets are equal in network evaluations. Each arm takes the learning rate of four "
            "with which it needed fewest evaluations until 0.80 in a run of another seed. The paper's way is the baseline: all "
            "steps stochastic, a random 60 % of them trained, clip, noise level 1.0.",
            overrides=(_COLOUR, "run.eval_samples=4"),
            arms=(
                Arm(PAPERS_WAY),
                Arm("window of 4", ("sample.stochastic.steps=window", *_ALL_TRAINED)),
                Arm(
                    "window of 4 at the start, tail solved in 0.2 (Flash*)",
                    ("sample.stochastic.steps=window", "sample.stochastic.tail=0.2", *_ALL_TRAINED),
                ),
                Arm("one step, rectified (Flash-GRPO)", (*_ONE, "grpo.timesteps.weight=rectified")),
                Arm("CPS", ("sample.transition=cps", "sample.noise_level=0.8")),
                Arm("guard", ("grpo.trust_region=guard", "grpo.timesteps.weight=guard")),
                Arm("dppo", ("grpo.trust_region=dppo",)),
                Arm(BEST_WAY, _BEST),
            ),
            comparisons=(
                *(Comparison(label, ">", PAPERS_WAY) for label in (BEST_WAY,)),
                Comparison(PAPERS_WAY, ">", BEST_WAY, "until"),
                Comparison("guard", ">", PAPERS_WAY, "ratio_mean"),
            ),
            measures=(*_REWARD, "until", "jpeg_size", "diversity", "shape_diversity", "distance", "ratio_mean", "ratio_dev"),
            budget=2,
            curve_points=20,
            search=("optim.lr=7e-4", "optim.lr=3.5e-4", "optim.lr=1.4e-3", "optim.lr=2.8e-3"),
            of_the_paper=False,
        ),
        Study(
            name="ddpo_flow",
            title="DDPO on the SDE of a rectified flow",
            settings=_FLOW,
            question="Does DDPO's objective train a rectified flow?",
            claim="DDPO always diverges on rectified-flow SDEs; GRPO does not.",
            source="Appendix 10 and Figure 5",
            miniature=f"{_TINY} DDPO as its own settings have it: advantages over each prompt's history, noise per sample.",
            overrides=(_COLOUR,),
            arms=(Arm("GRPO"), Arm("DDPO", ("grpo.objective=ddpo",))),
            comparisons=(Comparison("GRPO", ">", "DDPO"), Comparison(BEFORE, ">", "DDPO")),
            measures=(*_REWARD, "roughness", "ratio_dev"),
        ),
        Study(
            name="cfg_training",
            title="Training through guidance",
            settings=_DIFFUSION,
            question="Which of guidance's two passes needs gradients?",
            claim="Where a model needs guidance, training the conditional pass alone diverges; both passes must get gradients.",
            source="Appendix 8",
            miniature=f"{_TINY_SD} Guidance 3. The conditional arm saves a backward, which buys it iterations.",
            overrides=(_DISTANCE,),
            arms=(
                Arm("both passes trained"),
                Arm("conditional pass trained", ("grpo.cfg_gradients=conditional", "model.cfg_batched=false")),
            ),
            comparisons=(
                Comparison("both passes trained", ">", "conditional pass trained", "colour_distance"),
                Comparison(BEFORE, ">", "conditional pass trained", "colour_distance"),
            ),
            measures=("colour_distance", *_REWARD, "roughness", "ratio_dev"),
            budget=2,
        ),
    )
}
