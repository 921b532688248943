"""Rewards in processes and behind servers: the same numbers, whatever fails, and a server that nothing sent to it ends."""

import concurrent.futures
import contextlib
import http.server
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
from functools import partial
from pathlib import Path

import pytest
import torch

from fastvideo_grpo.rewards.base import RewardRequest, RewardResult
from fastvideo_grpo.rewards.placement import process as reward_process
from fastvideo_grpo.rewards.placement import wire
from fastvideo_grpo.rewards.placement.http import TOKEN_VARIABLE, HttpReward
from fastvideo_grpo.rewards.placement.process import ProcessReward, RewardProcessError
from fastvideo_grpo.rewards.registry import create
from fastvideo_grpo.rewards.reward_set import RewardSet
from tests import fork_server
from tests.trainer import runs
from tests.workers.faulty_rewards import KINDS, entry_point, serve_reward

ROOT = Path(__file__).parents[1]


def request_of(count=3, seed=0, frames=1, **metadata):
    generator = torch.Generator().manual_seed(seed)
    media = torch.randint(0, 256, (count, frames, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return RewardRequest([f"prompt {i}" for i in range(count)], media, metadata=[metadata] * count if metadata else [])


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """The folder of the reward "faulty", which is known here and in processes that are started from here."""
    packages = entry_point(tmp_path / "packages")
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), str(ROOT)]))
    (tmp_path / "came").mkdir()
    return tmp_path / "came"


@pytest.fixture
def forked(monkeypatch):
    """Processes of rewards are forked."""
    monkeypatch.setattr(reward_process, "subprocess", fork_server)


@pytest.fixture
def serve():
    """`serve(kind, "key=value", ...)` -> (process, url) of a server of its own; `fresh`: in an interpreter of its own."""
    started = []

    def start(*arguments, port=0, token=None, code=None, fresh=False):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        if token:
            environment[TOKEN_VARIABLE] = token
        words = [*map(str, arguments), "--port", str(port)]
        files = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE if code else None, "text": True}
        if fresh:
            command = [sys.executable, "-m", "fastvideo_grpo.cli", "serve-reward", *words]
            process = subprocess.Popen(command, cwd=ROOT, env=environment, **files)
        else:
            process = fork_server.Process(partial(serve_reward, words), cwd=ROOT, env=environment, **files)
        started.append(process)
        if code is not None:
            assert process.wait(120) == code
            return process.stderr.read()
        line = process.stdout.readline()
        assert "on http://" in line, line
        return process, "http://" + line.split("on http://")[1].split(",")[0]

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=60)


# --- bytes


@pytest.mark.parametrize("fps", [None, 8.0])
def test_requests_and_results_survive_the_wire_to_the_bit(fps):
    request = request_of(2, frames=5, caption="ü", n=1)
    request.fps = fps
    message = b"".join(wire.pack(*wire.pack_request(request)))
    back = wire.unpack_request(*wire.unpack(message))
    assert torch.equal(back.media, request.media) and back.prompts == request.prompts
    assert (back.fps, back.metadata) == (fps, request.metadata)
    scores = {"a": torch.tensor([0.1, torch.nan]), "b": torch.tensor([-torch.inf, 1e-38])}
    result = RewardResult(scores, torch.tensor([True, False]), "too dark")
    back = wire.unpack_result(*wire.unpack(b"".join(wire.pack(*wire.pack_result(result)))))
    assert all(torch.equal(back.scores[name].view(torch.int32), scores[name].view(torch.int32)) for name in scores)
    assert back.valid.tolist() == [True, False] and back.invalid_because == "too dark"


def header_of(**changes):
    return {"prompts": ["a"], "shape": [1, 1, 2, 2, 3], "fps": None, "metadata": [], **changes}


BAD_HEADERS = [
    header_of(shape=[1, 1, 2, 2, 4]),
    header_of(shape=[1, 1, 2, 2]),
    header_of(shape=[1, 1, 2, 3, 3]),
    header_of(shape=[1, 1, -2, -2, 3]),
    header_of(shape=[1, 1, 2.0, 2, 3]),
    header_of(shape=[10**30, 10**30, 2, 2, 3]),
    header_of(shape=[True, 1, 2, 2, 3]),
    header_of(shape="12"),
    header_of(prompts=["a", "b"]),
    header_of(prompts=[1]),
    header_of(prompts="a"),
    header_of(metadata=[1]),
    header_of(metadata={"a": 1}),
    header_of(fps="fast"),
    header_of(fps=-1),
    header_of(fps=True),
    header_of(checkpoint="../../../etc/passwd"),
    header_of(media="/etc/passwd"),
    {},
]


@pytest.mark.parametrize("header", BAD_HEADERS, ids=lambda header: str(header)[:60])
def test_wrong_requests_are_refused(header):
    with pytest.raises(wire.WireError):
        wire.unpack_request(header, memoryview(bytes(12)))


def bad_messages():
    """Bodies that are no request, made from one that is."""
    good = b"".join(wire.pack(*wire.pack_request(request_of(1))))
    draw = random.Random(0)
    yield from (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x04\x95\x1a\x00cos\nsystem\n(S'true'\ntR.",
        b"PK\x03\x04" * 10,
        b"\x93NUMPY" * 9,
    )
    yield from (good[:n] for n in (1, 15, 16, 40, len(good) - 1))
    yield good + b"x"
    for lie in (0, 1, 2**31, 2**32 - 1):
        yield good[:4] + lie.to_bytes(4, "big") + good[8:]
    for lie in (0, 1, 2**40, 2**64 - 1):
        yield good[:8] + lie.to_bytes(8, "big") + good[16:]
    yield b"".join(wire.pack({}, b"x" * 12))
    # JSON that can be read, but not passed on.
    for header in (r'{"prompts": ["\ud800"]}', '{"metadata": [{"a": 1e999}]}', r'{"\ud800": 1}'):
        encoded = json.dumps({**header_of(), **json.loads(header)}).replace("Infinity", "1e999").encode()
        yield wire.MAGIC + len(encoded).to_bytes(4, "big") + (12).to_bytes(8, "big") + encoded + bytes(12)
    yield wire.MAGIC + (10**5).to_bytes(4, "big") + bytes(8) + b"[" * 10**5  # nested deeper than a parser goes
    yield from (b"".join(wire.pack(header, bytes(12))) for header in BAD_HEADERS)
    length = int.from_bytes(good[4:8], "big")
    for _ in range(40):  # a byte of the lengths or of the header turned into another
        changed = bytearray(good)
        place = draw.randrange(16 + length)
        changed[place] ^= draw.randrange(1, 256)
        yield bytes(changed)


# --- a process


def test_a_process_gives_the_same_numbers_and_leaves_with_close():
    reward = ProcessReward("jpeg_size", params={"quality": 50})
    process = reward._process
    try:
        assert (reward.outputs, reward.media_kind) == (("jpeg_size",), "any")
        expected = create("jpeg_size", params={"quality": 50}).score(request_of())
        assert torch.equal(reward.score(request_of()).scores["jpeg_size"], expected.scores["jpeg_size"])
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert torch.equal(reward.score(request_of()).scores["jpeg_size"], expected.scores["jpeg_size"])
        assert reward.restarts == 1
        last = reward._process
    finally:
        reward.close()
    assert last.returncode is not None


def test_what_goes_wrong_at_the_start_of_a_process_is_told(forked):
    with pytest.raises(ValueError, match=r"ValueError: unknown reward kind 'jpg_size'.*did you mean 'jpeg_size'"):
        ProcessReward("jpg_size")
    with pytest.raises(ValueError, match="python is 'no/such/python'"):
        ProcessReward("jpeg_size", python="no/such/python")


def test_another_interpreter_needs_no_installed_package_and_keeps_its_own_others(tmp_path, monkeypatch):
    """What `python` is for: an environment in which this package is not installed, found through the path alone."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # torch and the like; folders that a .pth file names have no .pth files read, so that this package stays unknown there.
    (site / "others.pth").write_text(str(Path(torch.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert subprocess.run([python, "-c", "import torch, fastvideo_grpo"], capture_output=True).returncode == 1
    rewards = RewardSet({"size": {"kind": "jpeg_size", "placement": "process", "python": str(python)}})
    try:
        assert rewards.score(request_of()).valid["size/jpeg_size"].all()
        process = rewards.rewards["size"]._process
        environment = dict(
            line.split("=", 1) for line in Path(f"/proc/{process.pid}/environ").read_text().split("\0") if "=" in line
        )
        assert os.listdir(environment["PYTHONPATH"]) == ["fastvideo_grpo"]  # and what is installed beside it is not found
        folder = environment["PYTHONPATH"]
    finally:
        rewards.close()
    assert not Path(folder).exists()


def test_a_process_ends_with_the_one_that_started_it(faulty):
    code = f"""
import sys
from fastvideo_grpo.rewards.placement.process import ProcessReward
import torch
from fastvideo_grpo.rewards.base import RewardRequest
reward = ProcessReward("faulty", params={{"folder": {str(faulty)!r}}})
print(reward._process.pid, flush=True)
media = torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8)
reward.score(RewardRequest(["a"], media, metadata=[{{"fault": "hang", "times": 1, "id": 0}}]))
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    while not list(faulty.iterdir()):
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.1)


# --- faults


def mixed_faults(models, folder, requests, faulty_every, wanted, timeout_s=2.0):
    """Scores of `requests` requests, every `faulty_every`-th of which fails, half of them for good, against those of the
    reward itself; `wanted` kinds of faults take turns."""
    faults = {}
    for number, index in enumerate(range(0, requests, faulty_every)):
        times = 1 if number % 2 else 99
        faults[index] = {"fault": wanted[number // 2 % len(wanted)], "times": times, "id": index}
    rewards = RewardSet(models, timeout_s=timeout_s, retries=1, backoff_s=0.01)
    (folder / "direct").mkdir()
    direct = create("faulty", params={"folder": str(folder / "direct")})
    lost = 0
    try:
        pending = [
            (index, rewards.submit(request_of(2, seed=index, **faults.get(index, {"n": 0})))) for index in range(requests)
        ]
        for index, scores in pending:
            batch = scores.result()
            valid, fault = batch.valid["r/brightness"], faults.get(index, {})
            expected = direct.score(request_of(2, seed=index)).scores["brightness"]
            bad = [False, False]
            if fault.get("times") == 99:
                bad = [True, fault["fault"] != "nan"]
            assert valid.tolist() == [not b for b in bad], (index, fault, batch.failures)
            assert torch.equal(batch.scores["r/brightness"][valid], expected[valid]), index
            lost += sum(bad)
            assert bool(batch.failures) == any(bad)
        assert rewards.retried["r"] == len(faults)
        assert rewards.failure_counts.total() == sum(fault["times"] == 99 for fault in faults.values())
        assert lost > 0
    finally:
        rewards.close()
    return rewards


@pytest.mark.parametrize("size", [20, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_faults_of_all_kinds_cost_their_samples_and_nothing_else(faulty, forked, size):
    models = {"r": {"kind": "faulty", "placement": "process", "params": {"folder": str(faulty)}}}
    # Half of the faults pass with the second attempt.
    rewards = mixed_faults(models, faulty, size, 2 if size == 20 else 10, KINDS)
    assert rewards.rewards["r"].restarts > 0


@pytest.mark.parametrize("size", [20, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_faults_behind_a_server(faulty, serve, size):
    _, url = serve("faulty", f"folder={faulty}", "--timeout", "1")
    models = {"r": {"kind": "faulty", "placement": "http", "url": url}}
    kinds = ("raise", "nan", "shape", "die", "hang")
    mixed_faults(models, faulty, size, 4 if size == 20 else 10, kinds, timeout_s=60.0)  # restarts of the process included


def test_inline_rewards_fail_alike(faulty):
    models = {"r": {"kind": "faulty", "params": {"folder": str(faulty)}}}
    mixed_faults(models, faulty, 40, 2, ("raise", "nan", "shape"))


# --- a server


def test_a_server_gives_the_same_numbers_asks_for_its_token_and_is_found_again(serve, monkeypatch):
    port = runs.free_port()
    process, url = serve("jpeg_size", "quality=50", "--workers", "2", port=port, token="secret", fresh=True)
    assert url == f"http://127.0.0.1:{port}"
    for token in (None, "secre", "Secret"):
        monkeypatch.setenv(TOKEN_VARIABLE, token) if token else monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
        with pytest.raises(ValueError, match=f"wants a token: set {TOKEN_VARIABLE}"):
            HttpReward("jpeg_size", url=url)
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with pytest.raises(ValueError, match="offers the reward jpeg_size, not hps"):
        HttpReward("hps", url=url)
    import httpx

    assert httpx.get(url + "/health").json() == {"status": "ok", "workers": 2, "free": 2, "restarts": 0}
    assert httpx.post(url + "/score", content=b"x").status_code == 401
    rewards = RewardSet({"size": {"kind": "jpeg_size", "placement": "http", "url": url}}, retries=3, backoff_s=1.0)
    expected = create("jpeg_size", params={"quality": 50}).score(request_of()).scores["jpeg_size"]
    assert torch.equal(rewards.score(request_of()).raw["size/jpeg_size"], expected)
    process.terminate()
    process.wait(60)
    scores = rewards.submit(request_of())  # refused, until there is one again
    serve("jpeg_size", "quality=50", token="secret", port=port)
    batch = scores.result()
    if not batch.valid["size/jpeg_size"].all():  # the start took longer than the attempts
        batch = rewards.score(request_of())
    assert torch.equal(batch.raw["size/jpeg_size"], expected)
    assert rewards.retried["size"] >= 1
    rewards.close()


def test_nothing_that_is_sent_to_a_server_ends_it(serve):
    import httpx

    _, url = serve("jpeg_size", "--max-mib", "1")
    client = httpx.Client(timeout=60)
    for body in bad_messages():
        answer = client.post(f"{url}/score", content=body)
        if answer.status_code == 200:  # a changed byte inside a prompt is another prompt
            assert wire.unpack_result(*wire.unpack(answer.content)).valid.all()
            continue
        assert 400 <= answer.status_code < 500, (answer.status_code, body[:80])
        assert answer.json()["error"]
    assert client.post(f"{url}/score", content=bytes(2 * 2**20)).status_code in (400, 413)
    large = b"".join(wire.pack(header_of(shape=[1, 1, 1024, 1024, 3]), bytes(3 * 2**20)))
    assert client.post(f"{url}/score", content=large).status_code == 413
    assert client.post(f"{url}/score", content=(large[i : i + 999] for i in range(0, len(large), 999))).status_code == 413
    for path in ("/", "/../../etc/passwd", "/score/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/score\x00"):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert connection.recv(4096).split()[1][:1] == b"4", path
    with socket.create_connection((host, int(port)), timeout=30) as connection:  # says more than it sends, and leaves
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nFVG1")
    assert client.get(f"{url}/score").status_code == 405
    good = b"".join(wire.pack(*wire.pack_request(request_of())))
    answer = client.post(f"{url}/score", content=good)
    expected = create("jpeg_size").score(request_of()).scores["jpeg_size"]
    assert torch.equal(wire.unpack_result(*wire.unpack(answer.content)).scores["jpeg_size"], expected)
    assert client.get(f"{url}/health").json() == {"status": "ok", "workers": 1, "free": 1, "restarts": 0}


def test_a_server_that_drips_its_answer_is_late():
    """Every byte comes within the time limit, the whole answer would not."""
    described = json.dumps({"kind": "jpeg_size", "outputs": ["jpeg_size"], "media_kind": "any"}).encode()
    stop = threading.Event()

    class Dripping(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(described)))
            self.end_headers()
            self.wfile.write(described)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            with contextlib.suppress(OSError):
                while not stop.wait(0.1):
                    self.wfile.write(b"H")
                    self.wfile.flush()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        models = {"size": {"kind": "jpeg_size", "placement": "http", "url": f"http://127.0.0.1:{server.server_port}"}}
        rewards = RewardSet(models, timeout_s=0.5, retries=0)
        assert "TimeoutError: no answer within" in rewards.score(request_of()).failures[0]
        rewards.close()
    finally:
        stop.set()
        server.shutdown()
        server.server_close()


def test_who_gave_up_waiting_is_not_scored_any_more(serve, faulty):
    _, url = serve("faulty", f"folder={faulty}", "--timeout", "3")
    host, port = url.removeprefix("http://").split(":")

    def ask(name):
        body = b"".join(wire.pack(*wire.pack_request(request_of(fault="hang", times=1, id=name))))
        connection = socket.create_connection((host, int(port)), timeout=60)
        connection.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    with ask("first") as first:
        while not (faulty / "first").exists():
            time.sleep(0.05)
        ask("second").close()
        assert b"504" in first.recv(4096).split(b"\r\n")[0]
    with ask("first") as again:  # not a hang any more; behind the second one
        assert b"200" in again.recv(4096).split(b"\r\n")[0]
    assert not (faulty / "second").exists()


def test_more_requests_wait_at_a_server_than_it_has_threads(serve):
    _, url = serve("jpeg_size")
    expected = create("jpeg_size").score(request_of()).scores["jpeg_size"]
    rewards = [HttpReward("jpeg_size", url=url, timeout_s=60.0) for _ in range(64)]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda reward: reward.score(request_of()), rewards))
    assert len(answers) == 64 and all(torch.equal(answer.scores["jpeg_size"], expected) for answer in answers)


def test_servers_say_what_is_wrong_before_they_start(serve):
    assert "set it to a long random word" in serve("jpeg_size", "--host", "0.0.0.0", code=1)
    assert "no parameter 'qualty' (did you mean 'quality'?)" in serve("jpeg_size", "qualty=3", code=1)


def test_nobody_at_the_address_is_told_with_the_way_out():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        models = {"size": {"kind": "jpeg_size", "placement": "http", "url": url}}
        with pytest.raises(ValueError, match=r"rewards.models.size: no reward server answers at .*serve-reward jpeg_size"):
            RewardSet(models)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"placement": "cloud"}, "placement is 'cloud'; allowed: inline, process, http"),
        ({"placement": "http"}, "url is missing"),
        ({"placement": "http", "url": "gpu-box:8800"}, "url is 'gpu-box:8800'; it must be like http://127.0.0.1:8800"),
        ({"placement": "http", "url": "http://x", "params": {"quality": 3}}, "params is for placement=inline or process"),
        ({"url": "http://x"}, "url is for placement=http, not inline"),
        ({"placement": "http", "url": "http://x", "python": "y"}, "python is for placement=process"),
        ({"device": "cuda:1"}, "device is for placement=process"),
        ({"placement": "process", "device": "gpu 1"}, "device is 'gpu 1'; it must be a device, for example cpu or cuda:1"),
    ],
)
def test_keys_that_do_not_go_with_the_placement_are_refused(entry, text):
    with pytest.raises(ValueError, match=f"rewards.models.size.{text}"):
        RewardSet({"size": {"kind": "jpeg_size", **entry}})


def test_a_reward_that_cannot_be_loaded_again_is_started_anew_and_none_after_closing(faulty, forked):
    rewards = RewardSet(
        {"r": {"kind": "faulty", "placement": "process", "params": {"folder": str(faulty)}}}, retries=1, backoff_s=0.0
    )
    reward = rewards.rewards["r"]
    try:
        (faulty / "broken").touch()  # from now on it cannot be made
        batch = rewards.score(request_of(fault="die", times=1, id="a"))
        assert "the disk is gone" in batch.failures[0] and reward._process is None
        (faulty / "broken").unlink()
        assert rewards.score(request_of()).valid["r/brightness"].all()
        waiting = rewards.submit(request_of(fault="hang", times=9, id="b"))
        while not (faulty / "b").exists():
            time.sleep(0.05)
    finally:
        rewards.close()
    assert not waiting.result().valid["r/brightness"].any()
    assert reward._process is None  # the request that broke off did not start it again
    with pytest.raises(RuntimeError, match="was closed"):
        rewards.submit(request_of())


def test_what_does_not_go_into_a_message_costs_no_process(forked):
    reward = ProcessReward("jpeg_size")
    try:
        with pytest.raises(wire.WireError, match="does not go into JSON"):
            reward.score(request_of(limit=float("nan")))
        assert reward.score(request_of()).valid.all() and reward.restarts == 0
    finally:
        reward.close()


def test_an_error_of_the_reward_in_a_process_is_told_in_its_words(faulty, forked):
    reward = ProcessReward("faulty", params={"folder": str(faulty)})
    try:
        with pytest.raises(RewardProcessError, match="RuntimeError: scorer lost"):
            reward.score(request_of(fault="raise", times=1, id="a"))
        with pytest.raises(RewardProcessError, match="the process ended with exit code 7"):
            reward.score(request_of(fault="die", times=1, id="b"))
        assert json.dumps(reward.score(request_of(fault="die", times=1, id="b")).valid.tolist()) == "[true, true, true]"
    finally:
        reward.close()
