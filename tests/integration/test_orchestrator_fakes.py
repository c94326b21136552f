"""A made-up inference server and a made-up trainer for the orchestrator's tests. Torch-free."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from graftwork.config.load import build, digest, dump
from graftwork.config.run import RunConfig
from graftwork.rollouts.environment import Task
from graftwork.store.disk import Disk
from graftwork.store.layout import RunId, RunTree
from graftwork.store.queue import Version, publish_version, read_batch
from graftwork.store.status import Status, write_status

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>' + m.content + '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
ADAPTER = "adapter_model.safetensors"


def make_base(folder: Path) -> Path:
    folder.mkdir(parents=True)
    characters = "\n" + "".join(map(chr, range(32, 127)))
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate((*SPECIAL, *characters))}, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder


def make_run(root: Path, base: Path, url: str, **changes: Any) -> RunTree:
    """outputs/run_tiny with an orch.toml."""
    tree = RunTree.at(root / "run_tiny")
    sampling = {"prompts_per_step": 3, "samples_per_prompt": 2, "max_tokens": 5}
    values = {"model": {"path": str(base)}, "inference_url": url, "max_steps": 4, "sampling": sampling, **changes}
    Disk().publish_file(tree.orch_toml, dump(build(RunConfig, values, source="test")))
    return tree


class TwoTurns:
    """An environment that asks twice, so that a batch takes two requests."""

    def task(self, seed: int, index: int, split: str) -> Task:
        return Task(({"role": "user", "content": f"{split} {index}"},))

    async def run(self, task: Task, policy: Any) -> float:
        first = await policy.ask(task.messages)
        second = await policy.ask([{"role": "user", "content": "again"}])
        return float(len(first.text) - len(second.text))


class Breaks:
    """An environment in which every so-manyth task cannot be played."""

    def __init__(self, every: int) -> None:
        self.every = every

    def task(self, seed: int, index: int, split: str) -> Task:
        return Task(({"role": "user", "content": f"{split} {index}"},), {"index": index})

    async def run(self, task: Task, policy: Any) -> float:
        if task.data["index"] % self.every == 0:
            raise OSError("broken")
        return float(len((await policy.ask(task.messages)).text))


class FakeServer:
    """Speaks the inference API. Its answers are a function of (adapter bytes, prompt, seed, index).

    Completions are counted from 1; what happens at one of them is told by the sets below.
    """

    def __init__(self, *, tells_digest: bool = True) -> None:
        self.tells_digest = tells_digest
        self.answer_as: str | None = None
        """Pretend that another adapter answered."""
        self.wrong_digest = False
        self.die_at: set[int] = set()
        """It hangs up and listens no more."""
        self.when_dead: Callable[[], None] = lambda: None
        self.forget_at: set[int] = set()
        """All adapters are gone."""
        self.fail_at: set[int] = set()
        """Answered with 500; together with die_at, those are its last words."""
        self.hang_at: set[int] = set()
        """Never answered."""
        self.adapters: dict[str, str] = {}
        """Loaded adapters: name -> digest."""
        self.log: list[tuple[str, str]] = []
        """(path, model) of every POST."""
        self.requests: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                owner = "graftwork" if server.tells_digest else "vllm"
                cards = [{"id": name, "owned_by": owner} for name in ["base", *server.adapters]]
                self.say(200, {"data": cards} if self.path == "/v1/models" else {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                code, answer = server.handle(self.path, body)
                if code:
                    self.say(code, answer)
                if not code or server.dead:
                    self.close_connection = True
                    self.connection.close()

            def say(self, code: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.handler = Handler
        self.port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.dead = False
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.dead = True
        self.http.shutdown()
        self.http.server_close()

    def start_again(self) -> None:
        """As a new process does: on the same port, without adapters."""
        self.adapters = {}
        self.start()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.dead:
            self.close()

    def handle(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        name = body.get("lora_name") or body.get("model")
        self.log.append((path, name))
        if path == "/v1/load_lora_adapter":
            if name in self.adapters:
                return 400, {"error": {"message": f"{name} is loaded already"}}
            self.adapters[name] = hashlib.sha256((Path(body["lora_path"]) / ADAPTER).read_bytes()).hexdigest()
            return 200, {}
        if path == "/v1/unload_lora_adapter":
            return (200, {}) if self.adapters.pop(name, None) else (404, {})
        if body["max_tokens"] == 1 and body["logprobs"] > 1:
            return 200, self.probed(body)
        self.requests.append(body)
        number = len(self.requests)
        if number in self.die_at:
            self.close()
            self.when_dead()
        if number in self.fail_at:
            return 500, {"error": {"message": "the engine failed"}}
        if number in self.die_at:
            return 0, None
        if number in self.hang_at:
            time.sleep(3600)
        if number in self.forget_at:
            self.adapters.clear()
        if name not in self.adapters:
            return 404, {"error": {"message": f"no model {name}"}}
        return 200, self.complete(body)

    def probed(self, body: dict[str, Any]) -> dict[str, Any]:
        said = [value / body["temperature"] for value in likely(self.adapters[body["model"]])]
        found = {f"token_id:{70 + i}": value for i, value in enumerate(said)}
        logprobs = {"token_logprobs": [-1.0], "top_logprobs": [found]}
        choice = {"index": 0, "token_ids": [70], "logprobs": logprobs, "finish_reason": "length"}
        return {"model": body["model"], "choices": [choice]}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        held = self.adapters[body["model"]]
        choices = []
        for i in range(len(body["prompt"]) * body["n"]):
            rng = random.Random(f"{held} {body['prompt'][i // body['n']]} {body.get('seed')} {i}")
            token_ids = [rng.randrange(70, 96) for _ in range(rng.randrange(1, body["max_tokens"]))]
            ended = rng.random() < 0.6
            token_ids += [1] if ended else []
            logprobs = {"token_logprobs": [-rng.random() for _ in token_ids]}
            reason = "stop" if ended else "length"
            choices.append({"index": i, "token_ids": token_ids, "logprobs": logprobs, "finish_reason": reason})
        answer = {"model": self.answer_as or body["model"], "choices": choices}
        if self.tells_digest:
            told = "0" * 64 if self.wrong_digest else held
            answer["graftwork"] = {"version": self.answer_as or body["model"], "digest": told}
        return answer


def likely(digest: str) -> list[float]:
    """Log-probs of tokens 70 to 77 after the probe's prompt, under the adapter of this digest."""
    rng = random.Random(digest)
    return [-1 - 5 * rng.random() for _ in range(8)]


@dataclass
class FakeTrainer:
    """Publishes versions whose bytes are a hash over the batches so far. Use as a context manager: runs in a thread."""

    tree: RunTree
    start_step: int = 0
    max_steps: int = 4
    ends: dict[int, tuple[str, str]] = field(default_factory=dict)
    """step -> (state, reason): how the run ends after that step."""
    set_aside: set[int] = field(default_factory=set)
    """Batches that are stale when they first come."""
    step_seconds: float = 0.0
    seen: list[tuple[int, str]] = field(default_factory=list)
    """(step, digest) of every batch that was consumed."""
    versions: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.disk, self.stop = Disk(), threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def __enter__(self) -> FakeTrainer:
        self.say("queued", self.start_step)  # before an orchestrator can read how the run ended the last time
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(10)

    def say(self, state: Any, step: int, reason: str | None = None) -> None:
        orch_digest = digest(self.tree.orch_toml.read_bytes())
        wanted = step + 1 if state == "active" else None
        status = Status(str(self.tree.id), state, orch_digest, 1, True, 0, step, self.start_step, wanted, reason)
        write_status(self.disk, self.tree, status)

    def publish(self, step: int) -> None:
        chain = [batch[1] for s in range(1, step + 1) if (batch := read_batch(self.tree, s))]
        data = json.dumps(["weights", step, *chain]).encode()
        version = Version(RunId("tiny"), step, hashlib.sha256(data).hexdigest())
        lists = {"version": likely(version.digest), "previous": None, "base": likely("base")}
        probe = json.dumps({"prompt": [70, 71], "tokens": list(range(70, 78)), **lists}).encode()
        files = {ADAPTER: data, "adapter_config.json": b"{}", "probe.json": probe}
        publish_version(self.disk, self.tree, version, files, {})
        self.versions.append(version.name)

    def work(self) -> None:
        step = self.start_step
        self.publish(step)
        self.say("active", step)
        while not self.stop.is_set():
            if step in self.ends:
                return self.say(self.ends[step][0], step, self.ends[step][1])
            if step >= self.max_steps:
                return self.say("finished", step)
            found = read_batch(self.tree, step + 1)
            if found is None:
                time.sleep(0.005)
                continue
            if step + 1 in self.set_aside:
                time.sleep(0.1)  # publish_batch reads the manifest back
                self.set_aside.remove(step + 1)
                self.disk.quarantine(self.tree.batch(step + 1), self.tree.trash)
                self.say("active", step, "stale")
                continue
            time.sleep(self.step_seconds)
            step += 1
            self.seen.append((step, found[1]))
            if step not in self.ends:
                self.publish(step)
                self.say("active", step)
        return None
