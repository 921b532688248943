"""The loop on one process, whatever the model: rewards that fail, KL, evaluation, pictures, asynchronous scoring."""

import json
import math
import subprocess
import sys
import threading
import time

import pytest
import torch

from fastvideo_grpo.rewards.base import RewardResult
from fastvideo_grpo.rewards.output_transform import OutputTransform
from fastvideo_grpo.sampling import noise
from tests.trainer import runs


def _lines(trainer):
    return trainer.run.log.read()


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kl_is_exactly_zero_at_the_start_and_grows_as_the_policy_leaves_the_reference(make_trainer, lora):
    """With one update an iteration, all of the first one is computed with the weights of the reference."""
    trainer = make_trainer(
        **({"model__lora__rank": 4, "model__lora__alpha": 8.0, "optim__lr": 1e-2} if lora else {"optim__lr": 1e-3}),
        grpo__kl_weight=0.01,
        grpo__updates_per_iteration=1,
    )
    trainer.train()
    first, second, third = (line["train/kl"] for line in _lines(trainer))
    assert first == 0.0 < second < third


def test_a_large_kl_weight_holds_the_policy_back(make_trainer, tmp_path):
    kl = {}
    for weight in (1e-4, 1e4):
        trainer = make_trainer(grpo__kl_weight=weight, optim__lr=1e-3, run__iterations=4, run__dir=tmp_path / str(weight))
        trainer.train()
        kl[weight] = _lines(trainer)[-1]["train/kl"]
    assert kl[1e4] < 0.5 * kl[1e-4]


class _Faulty:
    """A reward that answers NaN for some samples and raises for some requests."""

    outputs, media_kind = ("score",), "any"

    def __init__(self, bad):
        self.bad, self.calls = bad, 0

    def score(self, request):
        self.calls += 1
        if self.bad(self.calls) == "raise":
            raise OSError("scorer lost")
        scores = request.media.float().mean((1, 2, 3, 4))
        if self.bad(self.calls) == "nan":
            scores[0] = float("nan")
        return RewardResult({"score": scores}, torch.ones(len(scores), dtype=torch.bool))

    def to(self, device):
        return self

    def close(self):
        pass


def _with_reward(trainer, reward):
    trainer.run.scoring.rewards.rewards["pixels"] = reward
    trainer.run.scoring.rewards.attempts = 1  # the reward counts its calls
    trainer.run.scoring.rewards.weights = {"pixels/score": 1.0}
    trainer.run.scoring.rewards.transforms = {"pixels/score": OutputTransform()}


def test_failed_rewards_mask_their_samples_and_are_counted(make_trainer):
    """Promise 5: 8 requests of 2 samples an iteration; the second raises (2 samples), the fifth has one NaN."""
    trainer = make_trainer(rewards__max_invalid_fraction=0.5, run__iterations=1, optim__lr=1e-3)
    _with_reward(trainer, _Faulty(lambda call: {2: "raise", 5: "nan"}.get(call)))
    trainer.train()
    (line,) = _lines(trainer)
    assert line["reward/pixels/score/invalid"] == 3
    assert line["train/ratio_first_update_max_dev"] == 0.0 and line["train/updates"] == 2
    assert any("scorer lost" in failure for failure in trainer.run.scoring.rewards.failure_counts)


def test_too_many_failed_rewards_stop_the_run_with_what_was_trained_saved(make_trainer):
    from fastvideo_grpo.trainers.invalid_samples import TooManyInvalidRewards

    trainer = make_trainer(rewards__max_invalid_fraction=0.1, run__iterations=5, run__save_every=4)
    _with_reward(trainer, _Faulty(lambda call: "raise" if call > 8 else None))  # from the second iteration on
    with pytest.raises(TooManyInvalidRewards, match=r"16 of 16 samples.*scorer lost"):
        trainer.train()
    assert trainer.run.store.iterations() == [1] and len(_lines(trainer)) == 1


class _Answers(_Faulty):
    """A reward whose answer for the last of every four samples, asked for one by one, is ``bad``."""

    def score(self, request):
        self.calls += 1
        scores = request.media.float().mean((1, 2, 3, 4))
        valid = torch.ones(1, dtype=torch.bool)
        if self.calls % 4 == 0:
            if self.bad == "raise":
                raise OSError("scorer lost")
            if self.bad is not None:
                scores[:], valid[:] = self.bad
        return RewardResult({"score": scores}, valid)


def test_a_masked_sample_is_as_if_it_had_not_been_drawn(make_trainer, tmp_path):
    """Promise 5: whatever a reward answers for it, a masked fourth sample leaves the update of three, bitwise."""
    answers = {
        "three drawn": None,
        "NaN": (float("nan"), True),
        "raise": "raise",
        "invalid, large": (1e6, False),
        "invalid, small": (-1e6, False),
        "four valid": None,
    }
    results = {}
    for name, bad in answers.items():
        size = 3 if name == "three drawn" else 4
        trainer = make_trainer(
            run__dir=tmp_path / name,
            run__iterations=1,
            grpo__group_size=size,
            grpo__prompts_per_iteration=2,
            grpo__updates_per_iteration=1,
            engine__micro_batch_size=1,
            rewards__max_invalid_fraction=0.5,
            optim__lr=1e-3,
        )
        _with_reward(trainer, _Answers(bad))
        trainer.train()
        (line,) = _lines(trainer)
        assert line["reward/pixels/score/invalid"] == (0 if bad is None else 2)
        assert line["train/updates"] == 1
        results[name] = trainer.engine.state_dict(), {k: v for k, v in line.items() if k.startswith("train/")}
    three, statistics = results.pop("three drawn")
    weights, _ = results.pop("four valid")
    assert not runs.same_bits(weights, three)
    for name, (weights, line) in results.items():
        assert runs.same_bits(weights, three), name
        assert line == statistics, name


@pytest.mark.parametrize(
    "what,members",
    [("latents", [2]), ("latents", [0, 1, 2, 3]), ("log_probs", [2])],
    ids=["latents of one sample", "latents of all samples of a prompt", "a log-prob of one sample"],
)
def test_samples_that_are_not_finite_are_masked_and_the_update_goes_on(
    make_trainer, tmp_path, monkeypatch, caplog, what, members
):
    """The update is bitwise the one where a reward failed for the same samples."""
    settings = {"rewards__max_invalid_fraction": 0.5, "run__iterations": 1, "optim__lr": 1e-3}

    def hit(keys):
        return [row for row, key in enumerate(keys) if key.group == 1 and key.member in members]

    masked = make_trainer(**settings, run__dir=tmp_path / "masked")
    draw = masked.draw
    last = []
    monkeypatch.setattr(masked, "draw", lambda prompt, keys: last.append(keys) or draw(prompt, keys))

    class Brightness(_Faulty):
        def score(self, request):
            scores = request.media.float().mean((1, 2, 3, 4))
            scores[hit(last[-1])] = float("nan")
            return RewardResult({"score": scores}, torch.ones(len(scores), dtype=torch.bool))

    _with_reward(masked, Brightness(None))
    masked.train()

    trainer = make_trainer(**settings, run__dir=tmp_path / "poisoned")
    _with_reward(trainer, _Faulty(lambda call: None))
    if what == "latents":
        step_noise = noise.step_noise

        def poisoned(keys, shape, step):
            drawn = step_noise(keys, shape, step)
            drawn[hit(keys)] = float("nan") if step == 1 else 1.0
            return drawn

        monkeypatch.setattr(noise, "step_noise", poisoned)
    else:
        sound = trainer.draw

        def poisoned(prompt, keys):
            drawn = sound(prompt, keys)
            drawn.trajectory.log_probs[hit(keys), 0] = float("inf")
            return drawn

        monkeypatch.setattr(trainer, "draw", poisoned)
    trainer.train()
    (line,), (expected,) = _lines(trainer), _lines(masked)
    assert line["reward/pixels/score/invalid"] == len(members)
    assert line["train/updates"] == 2 and line["train/skipped_updates"] == 0
    assert line["train/ratio_first_update_max_dev"] == 0.0
    assert "not finite" in caplog.text
    assert runs.same_bits(trainer.engine.state_dict(), masked.engine.state_dict())
    assert all(
        line[key] == expected[key] for key in line if not key.startswith(runs.OF_THE_MACHINE) and key != "sampling/not_finite"
    )
    assert (line["sampling/not_finite"], expected["sampling/not_finite"]) == (len(members), 0)


def test_a_prompt_whose_samples_all_failed_leaves_the_update_to_the_others(make_trainer):
    """The ratio is that of the first update that is made, not of the first one planned."""
    trainer = make_trainer(rewards__max_invalid_fraction=1.0, run__iterations=1)
    _with_reward(trainer, _Faulty(lambda call: "raise" if call <= 4 else None))  # both prompts of the first update
    rollout = trainer.rollout

    def shifted(*args):
        result = rollout(*args)
        for (what, *_), log_prob in result.trajectories.items():
            if what == "log_probs":
                log_prob += 0.1
        return result

    trainer.rollout = shifted
    trainer.train()
    (line,) = _lines(trainer)
    assert line["train/updates"] == 1 and line["train/skipped_updates"] == 1
    assert line["train/ratio_first_update_max_dev"] == pytest.approx(1 - math.exp(-0.1), rel=1e-3)


def test_an_iteration_whose_samples_all_failed_changes_nothing_and_has_no_ratio(make_trainer):
    trainer = make_trainer(rewards__max_invalid_fraction=1.0, run__iterations=1)
    before = trainer.engine.state_dict()
    _with_reward(trainer, _Faulty(lambda call: "raise"))
    trainer.train()
    (line,) = _lines(trainer)
    assert line["train/updates"] == 0 and line["train/skipped_updates"] == 2
    assert line["train/ratio_first_update_max_dev"] is None and line["train/ratio_max_dev"] is None
    assert runs.same_bits(trainer.engine.state_dict(), before)


def test_groups_without_spread_do_not_move_the_weights(make_trainer):
    trainer = make_trainer(run__iterations=1, optim__weight_decay=0.0)
    before = trainer.engine.state_dict()

    class Constant(_Faulty):
        def score(self, request):
            return RewardResult({"score": torch.full((len(request),), 0.3)}, torch.ones(len(request), dtype=torch.bool))

    _with_reward(trainer, Constant(None))
    trainer.train()
    assert _lines(trainer)[0]["advantage/zero_spread_groups"] == 4
    assert runs.same_bits(trainer.engine.state_dict(), before)


def test_evaluation_is_on_fixed_noise_and_pictures_are_saved_with_rewards(make_trainer, tmp_path):
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("a magenta square\n")
    trainer = make_trainer(
        prompts__eval_path=heldout, run__eval_every=1, run__eval_samples=3, run__sample_every=2, run__iterations=2
    )
    assert trainer.run.monitor.evaluate() == trainer.run.monitor.evaluate()
    trainer.train()
    before = json.loads((trainer.run.folder / "evaluation_before.json").read_text())
    line = _lines(trainer)[-1]
    for name in ("eval/train/pixels/brightness/mean", "eval/heldout/pixels/brightness/stderr"):
        assert name in before and name in line
    index = json.loads((trainer.run.folder / "samples" / "000002" / "index.json").read_text())
    assert index[0]["prompt"] == "a magenta square" and "pixels/brightness" in index[0]["rewards"]
    assert (trainer.run.folder / "samples" / "000000" / "grid.png").is_file()


def test_wandb_offline_writes_captioned_pictures_and_a_run_that_a_resumed_training_continues(make_trainer):
    folders = []
    for iterations in (1, 2):
        trainer = make_trainer(run__wandb="offline", run__iterations=iterations, run__sample_every=1)
        trainer.train()
        identity = json.loads((trainer.run.folder / "wandb.json").read_text())["id"]
        new = set((trainer.run.folder / "wandb").glob("offline-run-*")) - set(folders)
        assert len(new) == 1
        folder = new.pop()
        assert folder.name.endswith(f"-{identity}")
        folders.append(folder)
        pictures = {path.read_bytes() for path in (folder / "files" / "media").rglob("samples*.png")}
        saved = trainer.run.folder / "samples" / f"{iterations:06d}"
        # wandb's own process writes it, and on a loaded machine may still be at it when the run has finished.
        for _ in range(120):
            record = (folder / f"run-{identity}.wandb").read_bytes()
            if b"brightness" in record:
                break
            time.sleep(0.5)
        for entry in json.loads((saved / "index.json").read_text()):
            assert (saved / entry["file"]).read_bytes() in pictures
            caption = json.dumps(f"{entry['prompt']}\nbrightness {entry['rewards']['pixels/brightness']:.3f}")
            assert caption.encode() in record
    assert folders[0].name.rpartition("-")[2] == folders[1].name.rpartition("-")[2]


def test_two_trainings_in_one_folder_are_refused(make_trainer):
    from fastvideo_grpo.errors import UserError

    first = make_trainer()
    with pytest.raises(UserError, match="another process is training"):
        make_trainer()
    first.close()
    first.close()  # once more does nothing
    make_trainer()


def test_importing_a_trainer_on_an_unpatched_fastvideo_stops_before_fastvideo_is_imported():
    code = (
        "import sys; from fastvideo_grpo import patching\n"
        "def unpatched(): raise patching.PatchError(patching.APPLY_COMMAND)\n"
        "patching.require_patched = unpatched\n"
        "try: import fastvideo_grpo.models.flux.trainer\n"
        "except patching.PatchError as error: assert 'fastvideo-grpo patch apply' in str(error)\n"
        "else: raise AssertionError('imported')\n"
        "assert 'fastvideo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class _Slow(_Faulty):
    """Mean brightness; the first request waits until `go` is set, or for `seconds`, the others for `seconds`."""

    def __init__(self, seconds, go=None):
        super().__init__(lambda call: None)
        self.seconds, self.go, self.met = seconds, go or threading.Event(), None

    def score(self, request):
        met = self.go.wait(self.seconds)
        self.met = met if self.met is None else self.met
        return super().score(request)


def test_asynchronous_scoring_gives_the_same_numbers_beside_the_rollout(make_trainer, tmp_path):
    """``rewards.async``: weights and metrics of the run that waits; the second micro-batch is drawn while the first one is
    scored."""
    weights, lines, met = {}, {}, {}
    for mode, seconds in (("false", 0.2), ("true", 60.0)):
        trainer = make_trainer(run__dir=tmp_path / mode, run__iterations=2, optim__lr=1e-3, rewards__async=mode)
        second_drawn = threading.Event()
        reward = _Slow(seconds, second_drawn)
        _with_reward(trainer, reward)
        drawn = []
        draw = trainer.draw

        def watched(*arguments, draw=draw, drawn=drawn, event=second_drawn, **options):
            drawn.append(draw(*arguments, **options))
            if len(drawn) == 2:
                event.set()
            return drawn[-1]

        trainer.draw = watched
        trainer.train()
        weights[mode], lines[mode], met[mode] = trainer.engine.state_dict(), _lines(trainer), reward.met
    assert met == {"false": False, "true": True}
    assert runs.same_bits(weights["false"], weights["true"])
    for one, two in zip(lines["false"], lines["true"], strict=True):
        same = {key for key in one if not key.startswith(runs.OF_THE_MACHINE)}
        assert {key: one[key] for key in same} == {key: two[key] for key in same}


def test_a_rollout_waits_when_too_much_is_to_be_scored(make_trainer, monkeypatch):
    """Media that wait take host memory: no more than a few micro-batches do."""
    from fastvideo_grpo.trainers import scoring

    monkeypatch.setattr(scoring, "MAX_PENDING", 1)
    trainer = make_trainer(run__iterations=1, rewards__async="true")
    reward = _Slow(0.3)
    _with_reward(trainer, reward)
    waiting = []
    draw = trainer.draw

    def watched(*arguments, **options):
        waiting.append(len(waiting) - reward.calls)
        return draw(*arguments, **options)

    trainer.draw = watched
    trainer.train()
    assert max(waiting) <= 2


def test_a_reward_that_hangs_stops_the_run_after_its_time_with_what_was_trained_saved(make_trainer):
    """It is asked until the samples without a score are more than may be, and then no more."""
    from fastvideo_grpo.rewards.placement.inline import InlineReward
    from fastvideo_grpo.trainers.invalid_samples import TooManyInvalidRewards

    settings = {"rewards__max_invalid_fraction": 0.2, "run__iterations": 5, "run__save_every": 4}
    make_trainer(**settings).train(stop=_After(1))
    trainer = make_trainer(**settings)
    hanging = _Slow(600.0)
    reward = InlineReward(hanging, timeout_s=0.5)
    _with_reward(trainer, reward)
    try:
        with pytest.raises(TooManyInvalidRewards, match=r"16 of 16 samples.*no answer within 0.5 s.*not asked"):
            trainer.train()
    finally:  # while it hangs, working directory and torch's defaults are kept for it, in the tests after this one, too
        hanging.go.set()
        reward._thread._thread.join(60)
    assert trainer.run.store.iterations() == [1]


class _After:
    """Stops a run after some iterations, as SIGUSR1 does."""

    def __init__(self, iterations):
        self.left = iterations

    def agreed(self, world):
        self.left -= 1
        return self.left < 0
