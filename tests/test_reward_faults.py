"""A reward gets what is its own, and whatever it raises, returns or changes ends no run and makes up no number."""

import asyncio
import gc
import importlib.metadata
import logging
import os
import signal
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastvideo_grpo import cli, extensions
from fastvideo_grpo.errors import Escape
from fastvideo_grpo.rewards import answers, registry
from fastvideo_grpo.rewards.base import RewardRequest, RewardResult
from fastvideo_grpo.rewards.placement import process, wire
from fastvideo_grpo.rewards.placement.process_settings import process_settings_kept
from fastvideo_grpo.rewards.placement.server import RewardPool
from fastvideo_grpo.rewards.registry import kinds, register
from fastvideo_grpo.rewards.reward_set import RewardSet
from tests import fork_server
from tests.workers.faulty_rewards import entry_point

ROOT = Path(__file__).parents[1]


def request_of(count=3, **metadata):
    media = torch.arange(count * 8 * 8 * 3).remainder(251).to(torch.uint8).reshape(count, 1, 8, 8, 3)
    return RewardRequest([f"prompt {i}" for i in range(count)], media, metadata=[{"tags": ["a"], **metadata}] * count)


class Called:
    """Scores what `call(request)` returns; `made`, `moved` and `closed` are called where their names say."""

    outputs, media_kind = ("quality",), "any"

    def __init__(self, *, call=None, made=None, moved=None, closed=None):
        self.call, self.moved, self.closed = call or mean, moved, closed
        if made is not None:
            made()

    def score(self, request):
        return self.call(request)

    def score_differentiably(self, pixels, prompts, metadata):
        return {"quality": self.call(RewardLike(pixels, prompts, metadata))}

    def to(self, device):
        if self.moved is not None:
            self.moved()
        return self

    def close(self):
        if self.closed is not None:
            self.closed()


class RewardLike(SimpleNamespace):
    def __init__(self, media, prompts, metadata):
        super().__init__(media=media, prompts=prompts, metadata=metadata)


def mean(request):
    return result_of(request.media.double().mean((1, 2, 3, 4)))


def result_of(scores, valid=None, **more):
    return RewardResult({"quality": scores}, torch.ones(len(scores), dtype=torch.bool) if valid is None else valid, **more)


def destroying(request):
    """Score, then spoil everything that was given."""
    scores = request.media.double().mean((1, 2, 3, 4))
    request.media.zero_() if request.media.dtype == torch.uint8 else request.media.mul_(0)
    request.prompts.clear()
    for entry in request.metadata:
        entry["tags"].append("b")
        entry.pop("n")  # a KeyError, if samples of one prompt shared a dict
    return scores


def raising(error):
    def call(*_):
        raise error() if isinstance(error, type) else error

    return call


@pytest.fixture(autouse=True)
def called_kind(monkeypatch):
    kinds()
    monkeypatch.setattr(registry.REWARDS, "_registered", dict(registry.REWARDS._registered))
    register("called")(Called)


def set_of(retries=0, offload_idle=False, timeout_s=60.0, **calls):
    return RewardSet(
        {name: {"kind": "called", "params": params} for name, params in calls.items()},
        retries=retries, backoff_s=0.0, offload_idle=offload_idle, timeout_s=timeout_s,
    )  # fmt: skip


# --- what it gets is its own


def test_what_a_reward_does_to_its_request_no_one_else_sees():
    def spoil_then_fail(request):
        destroying(request)
        raise RuntimeError("lost")

    attempts = iter([spoil_then_fail, mean])
    request, untouched = request_of(n=1), request_of(n=1)
    rewards = set_of(
        retries=1,
        spoils={"call": lambda request: result_of(destroying(request))},
        again={"call": lambda request: next(attempts)(request)},  # its second attempt gets the whole request, not the ruins
        sees={
            "call": lambda request: result_of(torch.tensor([float(e["tags"] == ["a"] and e["n"]) for e in request.metadata]))
        },
        after={},
    )
    for batch in (rewards.score(request), set_of(after={}).score(request)):
        assert all(valid.all() for valid in batch.valid.values()), batch.failures
        expected = untouched.media.double().mean((1, 2, 3, 4)).float()
        assert torch.equal(batch.raw["after/quality"], expected)
    assert torch.equal(request.media, untouched.media)
    assert request.prompts == untouched.prompts and request.metadata == untouched.metadata


def test_what_a_reward_keeps_does_not_change_and_its_answer_is_copied_at_once():
    kept, buffer, valid = [], torch.zeros(3), torch.ones(3, dtype=torch.bool)

    def call(request):
        kept.append(request.media)
        buffer.add_(1)  # the same memory is answered with every time
        return result_of(buffer, valid)

    rewards, request = set_of(r={"call": call}), request_of()
    pending = [rewards.submit(request), rewards.submit(request)]
    first, second = (scores.result() for scores in pending)
    assert first.raw["r/quality"].tolist() == [1, 1, 1] and second.raw["r/quality"].tolist() == [2, 2, 2]
    before = request.media.clone()
    request.media.zero_()
    assert all(torch.equal(media, before) for media in kept)


def test_pixels_with_gradients_are_each_rewards_own():
    class Evil(Called):
        def score_differentiably(self, pixels, prompts, metadata):
            scores = pixels.mul_(0.5).mean((1, 2, 3, 4))  # in place, on what others look at after it
            metadata[0]["tags"].append("b")
            prompts.clear()
            return {"quality": scores}

    class Good(Called):
        def score_differentiably(self, pixels, prompts, metadata):
            assert len(prompts) == 2 and metadata[0]["tags"] == ["a"]
            return {"quality": pixels.mean((1, 2, 3, 4))}

    register("evil")(Evil)
    register("good")(Good)
    rewards = RewardSet({"evil": {"kind": "evil"}, "good": {"kind": "good"}})
    leaf = torch.full((2, 1, 4, 4, 3), 0.5, requires_grad=True)
    prompts, metadata = ["a", "b"], [{"tags": ["a"]}] * 2
    pixels = leaf * 1
    scores = rewards.differentiable(pixels, prompts, metadata)
    assert scores["evil/quality"].tolist() == [0.25, 0.25] and scores["good/quality"].tolist() == [0.5, 0.5]
    assert torch.equal(pixels, leaf) and prompts == ["a", "b"] and metadata == [{"tags": ["a"]}] * 2
    sum(s.sum() for s in scores.values()).backward()
    torch.testing.assert_close(leaf.grad, torch.full_like(leaf, 1.5 / 48))


# --- whatever it raises


class Unspeakable(Exception):
    def __str__(self):
        raise SystemExit(0)


class Odd(BaseException):
    pass


RAISED = [
    SystemExit(0), SystemExit, KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), StopIteration(3), Odd("odd"),
    Unspeakable(), RecursionError(), MemoryError(), torch.OutOfMemoryError("out of memory"), TimeoutError("its own"),
    ExceptionGroup("several", [ValueError("a")]), BaseExceptionGroup("several", [SystemExit(0)]), RuntimeError("\ud800"),
    RuntimeError("two\nlines"),
]  # fmt: skip


def test_whatever_a_reward_raises_masks_its_samples_and_is_named():
    for error in RAISED:
        rewards = set_of(bad={"call": raising(error)}, good={})
        batch = rewards.score(request_of())
        name = error.__name__ if isinstance(error, type) else type(error).__name__
        assert len(batch.failures) == 1 and batch.failures[0].startswith(f"reward bad: {name}"), (error, batch.failures)
        assert "3 of 3 samples masked" in batch.failures[0] and "\n" not in batch.failures[0]
        batch.failures[0].encode()
        assert not batch.valid["bad/quality"].any() and batch.scores["bad/quality"].isnan().all()
        assert batch.valid["good/quality"].all()
        assert not rewards.score(request_of()).valid["bad/quality"].any(), "its thread lives on"
        assert rewards.failure_counts.total() == 2
        rewards.close()


def test_what_a_failed_attempt_held_is_free_at_once():
    """Tensors of a failed attempt, on a device that ran out of memory above all, are not kept by its error."""
    held = []

    def call(request):
        held.append(weakref.ref(request.media))
        raise SystemExit(0) if len(held) % 2 else RuntimeError("out of memory")

    rewards = set_of(r={"call": call})
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            assert not rewards.score(request_of()).valid["r/quality"].any()
        rewards.close()  # its thread has gone on
        assert [media() for media in held] == [None, None]
    finally:
        gc.enable()


class Evasive(RewardResult):
    """Each attribute raises."""

    def __getattribute__(self, name):
        raise SystemExit(name)


class Subclassed(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *arguments, **more):
        raise SystemExit("an operator")


GOOD, ALL = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, dtype=torch.bool)
RETURNED = [
    None, {}, {"quality": GOOD}, GOOD, [1.0, 2.0, 3.0], "1.0", 1.0, GeneratorExit(), RewardResult, Evasive({}, ALL),
    RewardResult(None, ALL), RewardResult([GOOD], ALL), RewardResult({}, ALL), RewardResult({1: GOOD}, ALL),
    result_of(np.ones(3)), result_of([1.0, 2.0, 3.0]), result_of(["nan"] * 3), result_of(GOOD.to(torch.complex64)),
    result_of(GOOD.to_sparse(), ALL), result_of(GOOD[:2], ALL), result_of(GOOD[:, None]), result_of(GOOD[0].repeat(3, 3)),
    result_of(GOOD.to("meta"), ALL), result_of(torch.quantize_per_tensor(GOOD, 1.0, 0, torch.quint8), ALL),
    result_of(torch.nested.nested_tensor([GOOD, GOOD[:1]], layout=torch.jagged), ALL),
    result_of(GOOD.as_subclass(Subclassed), ALL),
    result_of(torch.full((3,), torch.nan)), result_of(torch.full((3,), 1e300, dtype=torch.float64)),
    result_of(GOOD, [True] * 3), result_of(GOOD, np.ones(3, bool)), result_of(GOOD, GOOD), result_of(GOOD, ALL.to_sparse()),
    result_of(GOOD, ALL[:2]), result_of(GOOD, ~ALL, invalid_because=["dark"] * 3), result_of(GOOD, ~ALL, invalid_because=None),
    result_of(GOOD, ~ALL, invalid_because="\ud800"),
]  # fmt: skip


def test_whatever_a_reward_returns_instead_of_scores_masks_its_samples():
    for answer in RETURNED:
        rewards = set_of(bad={"call": lambda request, answer=answer: answer}, good={})
        batch = rewards.score(request_of())
        assert not batch.valid["bad/quality"].any() and batch.scores["bad/quality"].isnan().all(), type(answer)
        assert len(batch.failures) == 1 and batch.failures[0].startswith("reward bad"), batch.failures
        batch.failures[0].encode()
        assert batch.valid["good/quality"].all() and rewards.failure_counts.total() == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_real_numbers_of_other_dtypes_are_scores(dtype):
    scores = torch.tensor([0, 1, 1], dtype=dtype)
    scores = scores.requires_grad_() if dtype.is_floating_point else scores
    batch = set_of(r={"call": lambda request: result_of(scores)}).score(request_of())
    assert batch.raw["r/quality"].tolist() == [0, 1, 1] and not batch.failures


def test_a_reason_that_is_no_text_costs_the_samples_it_was_given_for_and_no_other():
    valid = torch.tensor([True, False, True])
    batch = set_of(r={"call": lambda request: result_of(GOOD, valid, invalid_because=["dark"] * 3)}).score(request_of())
    assert batch.valid["r/quality"].tolist() == valid.tolist()
    assert "invalid_because is list; it must be a text (1 of 3 samples masked)" in batch.failures[0]


def test_the_wire_sends_no_answer_that_an_inline_reward_may_not_give():
    for answer in RETURNED:
        with pytest.raises(BaseException) as raised:  # the worker's process answers with it
            header, payload = wire.pack_result(answers.checked(answer, 3))
            back = wire.unpack_result(*wire.unpack(b"".join(wire.pack(header, bytes(payload)))))
            column = answers.column(back, "quality", 3)
            assert back.valid.any() and column.isfinite().any(), "masked"
        assert isinstance(raised.value, Exception | SystemExit), answer


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit(), asyncio.CancelledError()])
def test_what_a_gradient_raises_never_ends_the_run_as_if_all_were_well(error):
    pixels = torch.rand(2, 1, 4, 4, 3, requires_grad=True)
    with pytest.raises(Escape, match=type(error).__name__) as raised:
        set_of(bad={"call": raising(error)}).differentiable(pixels, ["a", "b"], [])
    assert raised.value.__notes__ == ["raised by the reward bad in score_differentiably"]


# --- elsewhere than in score()


@pytest.mark.parametrize("error", [SystemExit(0), RuntimeError("x"), GeneratorExit(), OSError(2, "no file"), Unspeakable()])
@pytest.mark.parametrize("where", ["made", "moved"])
def test_a_reward_that_cannot_be_made_is_an_error_that_names_it(where, error):
    with pytest.raises(ValueError, match=r"rewards\.models\.bad") as raised:
        set_of(good={}, bad={where: raising(error)})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), RuntimeError("x")])
def test_moving_and_closing_end_no_run(error, caplog):
    moved, closed = [], []

    def move():
        moved.append(1)
        if len(moved) % 2 == 0:  # back to host memory, after its scores
            raise error

    rewards = set_of(
        offload_idle=True, bad={"moved": move, "closed": raising(error)}, good={"closed": lambda: closed.append(1)}
    )
    batch = rewards.score(request_of())
    assert batch.valid["good/quality"].all() and f"reward bad: {type(error).__name__}" in batch.failures[0]
    with caplog.at_level(logging.ERROR):
        rewards.close()
        rewards.close()
    assert closed == [1], "and the others are closed, once"
    assert [
        f"reward bad: close(): {type(error).__name__}" in r.getMessage() for r in caplog.records if r.levelname == "ERROR"
    ] == [True]


def test_a_reward_that_hangs_in_close_is_left(monkeypatch, caplog):
    from fastvideo_grpo.rewards.placement import inline

    monkeypatch.setattr(inline, "CLOSE_TIMEOUT_S", 0.1)
    release = threading.Event()
    set_of(bad={"closed": lambda: release.wait(30)}).close()
    release.set()
    assert "reward bad: close(): TimeoutError: no answer within 0.1 s" in caplog.text


def test_ctrl_c_ends_the_wait_for_a_reward():
    release = threading.Event()
    rewards = set_of(slow={"call": lambda request: release.wait(30) and mean(request)})
    pending = rewards.submit(request_of())
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pending.result()
    assert time.monotonic() - begun < 10
    release.set()
    assert pending.result().valid["slow/quality"].all()


def test_what_belongs_to_the_process_is_put_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads, interrupt = torch.get_num_threads(), signal.getsignal(signal.SIGINT)

    def change(*arguments):
        os.chdir("/")
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads + 1)
        torch.set_grad_enabled(False)
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.benchmark = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        answer = mean(*arguments) if arguments else None
        torch.set_default_device("meta")
        return answer

    try:
        rewards = set_of(r={"call": change, "made": change, "moved": change})
        for _ in range(2):
            assert Path.cwd() == tmp_path and torch.get_default_dtype() == torch.float32
            assert torch.get_num_threads() == threads and torch.is_grad_enabled()
            assert torch.get_default_device().type == "cpu"
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.benchmark
            assert signal.getsignal(signal.SIGINT) is interrupt
            assert rewards.score(request_of()).valid["r/quality"].all()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(True)
        torch.set_default_device(None)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False
        signal.signal(signal.SIGINT, interrupt)


def test_what_one_reward_changes_is_not_what_another_one_puts_back(tmp_path, monkeypatch):
    """The second begins when the first has changed it, and ends last."""
    monkeypatch.chdir(tmp_path)
    changed, begun, done = (threading.Event() for _ in range(3))

    def first():
        with process_settings_kept():
            os.chdir("/")
            torch.set_default_dtype(torch.float64)
            changed.set()
            assert begun.wait(10)
        done.set()

    def second():
        assert changed.wait(10)
        with process_settings_kept():
            begun.set()
            assert done.wait(10)

    threads = [threading.Thread(target=work) for work in (first, second)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done.is_set() and Path.cwd() == tmp_path and torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"outputs": "quality"}, r"outputs 'quality'; it must be a tuple of names"),
        ({"outputs": ()}, "outputs .*tuple of names"),
        ({"outputs": ("a/b",)}, "without '/'"),
        ({"outputs": ("a", "a")}, "tuple of names"),
        ({"media_kind": "picture"}, "media_kind 'picture'; allowed: image, video, any"),
        ({"close": None, "score": property(lambda self: raising(AttributeError)())}, "has no score"),
    ],
)
def test_what_is_no_reward_is_told_when_it_is_made(changes, text):
    register("odd")(type("OddReward", (Called,), changes))
    with pytest.raises(ValueError, match=f"rewards.models.it: reward 'odd'.*{text}"):
        RewardSet({"it": {"kind": "odd"}})


# --- other placements


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    packages = entry_point(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), str(ROOT)]))
    (tmp_path / "came").mkdir()
    return {"folder": str(tmp_path / "came")}


def test_a_process_survives_what_its_reward_raises_and_gives_each_attempt_its_own(faulty, monkeypatch):
    """`serve-reward` scores with such processes."""
    monkeypatch.setattr(process, "subprocess", fork_server)
    pool = RewardPool("faulty", checkpoint=None, params=faulty, devices=["cpu"], timeout_s=60.0)
    try:
        for kind, text in [
            ("exit", "SystemExit: 0"), ("interrupt", "KeyboardInterrupt"), ("none", "returned NoneType"),
            ("sparse", "sparse_coo"), ("complex", "complex64"), ("unspeakable", "Unspeakable, whose message cannot be read"),
        ]:  # fmt: skip
            with pytest.raises(RuntimeError, match=text):
                pool.score(request_of(fault=kind, times=1, id=kind))
        request = request_of(fault="spoil", times=0, id="spoil")
        first, second = pool.score(request), pool.score(request)
        assert torch.equal(first.scores["brightness"], second.scores["brightness"])
        assert pool.restarts == 0
    finally:
        pool.close()


# --- the command


def test_a_package_that_leaves_while_it_is_imported_is_told(tmp_path, monkeypatch):
    (tmp_path / "leaving_rewards.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    point = importlib.metadata.EntryPoint("leaving", "leaving_rewards:Leaving", registry.REWARDS.group)
    monkeypatch.setattr(extensions, "entry_points", lambda group: [point])
    with pytest.raises(ValueError, match="'leaving_rewards:Leaving', which cannot be imported: SystemExit: 0"):
        RewardSet({"it": {"kind": "leaving"}})


@pytest.mark.parametrize("code", [None, 0, 75])
def test_no_command_ends_well_because_something_called_sys_exit(monkeypatch, capsys, code):
    command = SimpleNamespace(command="train"), SimpleNamespace(run=raising(SystemExit(code)))
    monkeypatch.setattr(cli, "parse", lambda argv: command)
    assert cli.main(["train"]) == 1
    told = capsys.readouterr().err
    assert f"fastvideo-grpo train: ended by sys.exit({code})" in told and "in call" in told, "and where"
