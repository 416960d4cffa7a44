"""A server that speaks as much of vLLM's protocol as the client uses, with a tiny Llama behind it: completions by token
ids, pause and resume, reloading a checkpoint, and the weight transfer with a group in place of NCCL's."""

from __future__ import annotations

import base64
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, END, CONTEXT = 12, 1, 64
Body = dict[str, Any]
Misbehaviour = Callable[["Handler", Body], Body | None]


def tiny_llama(seed: int, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, eos_token_id=END, bos_token_id=0,
        tie_word_embeddings=tied, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def log_probs_of(model: LlamaForCausalLM, prompt: list[int], tokens: list[int], temperature: float) -> Tensor:
    """Of each token after the prompt and the tokens before it, at the temperature."""
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, 1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


class Refused(Exception):
    """The status and the text of an answer that is no success."""


class Wire:
    """Both ends of a group that carries tensors in this process: each end waits until the other takes part."""

    def __init__(self) -> None:
        self.learner_joined, self.workers_joined, self.warm = threading.Event(), threading.Event(), threading.Event()
        self.tensors: queue.Queue[Tensor] = queue.Queue()
        self.size = 0

    def unique_id(self) -> bytes:
        return b"\xff" * 128

    def join(self, unique_id: bytes, size: int) -> None:
        self.meet(size)
        self.warm.set()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.tensors.put(tensor.clone())
        self.tensors.join()

    def meet(self, size: int) -> None:
        self.size = size
        self.learner_joined.set()
        assert self.workers_joined.wait(20)

    def stand_in_for_nccl(self, patch: pytest.MonkeyPatch) -> None:
        """Put this wire under torch's functions for NCCL, so that the code that calls them can run without a GPU."""

        def init_rank(size: int, unique_id: bytes, rank: int) -> Wire:
            assert (unique_id, rank) == (self.unique_id(), 0)
            self.meet(size)
            return self

        def all_reduce(tensors: list[Tensor], comms: list[Wire]) -> None:
            assert comms == [self]
            assert [(tensor.dtype, tensor.numel()) for tensor in tensors] == [(torch.float32, 1)]
            self.warm.set()

        def broadcast(tensors: list[Tensor], comms: list[Wire]) -> None:
            assert comms == [self]
            assert self.warm.is_set()
            self.tensors.put(tensors[0].clone())

        patch.setattr(torch._C, "_nccl_init_rank", None, raising=False)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "synchronize", self.tensors.join)
        for function in (self.unique_id, init_rank, all_reduce, broadcast):
            patch.setattr(torch.cuda.nccl, function.__name__, function)


class FakeVLLM(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.model_lock = model, threading.RLock()
        self.wire: Wire | None = None
        self.calls: list[str] = []
        self.requests: list[Body] = []
        self.misbehaviour: dict[str, list[Misbehaviour]] = {}  # by path: what happens to the next requests
        self.reports: Literal["processed_logprobs", "raw_logprobs", "processed_logits"] = "processed_logprobs"
        self.end: int | None = END
        self.running = threading.Event()
        self.running.set()
        self.aborts = self.active = self.most_active = 0
        self.updating = self.stale_cache = False
        self.version: str | None = None
        self.before_token: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is part of the tests."""

    # What the server does

    def completions(self, body: Body) -> Body:
        if body["model"] != "tiny":
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > CONTEXT:
            raise Refused(400, "This model's maximum context length is 64 tokens.")
        self.requests.append(body)
        with self.model_lock:
            self.active += 1
            self.most_active = max(self.active, self.most_active)
        try:
            choices = [self.completion(body, index) for index in range(body["n"])]
        finally:
            with self.model_lock:
                self.active -= 1
        return {"object": "text_completion", "model": "tiny", "choices": choices}

    def completion(self, body: Body, index: int) -> Body:
        generator = torch.Generator().manual_seed(body["seed"] + index)
        tokens: list[int] = []
        chosen: list[float] = []
        tops: list[dict[str, float]] = []
        reason, stop_reason, aborts = "length", None, self.aborts
        while len(tokens) < body["max_tokens"]:
            self.running.wait(20)
            self.before_token()
            if self.aborts != aborts:
                reason = "abort"
                break
            with self.model_lock, torch.no_grad():
                assert not self.stale_cache, "a token was drawn with what old weights computed"
                logits = self.model(torch.tensor([body["prompt"] + tokens])).logits[0, -1]
            tempered = torch.log_softmax(logits / body["temperature"], 0)
            drawn = int(torch.multinomial(tempered.exp(), 1, generator=generator))
            raw = torch.log_softmax(logits, 0)
            reported = {"processed_logprobs": tempered, "raw_logprobs": raw}.get(self.reports, tempered + 4)
            tokens.append(drawn)
            chosen.append(float(reported[drawn]))
            shown = [drawn, *reported.topk(body["logprobs"]).indices.tolist()]
            tops.append({f"token_id:{token}": float(reported[token]) for token in shown})
            text = "".join(chr(ord("a") + token) for token in tokens)
            found = [stop for stop in body["stop"] if stop in text]
            if drawn == self.end or drawn in body["stop_token_ids"] or found:
                reason, stop_reason = "stop", None if drawn == self.end else found[0] if found else drawn
                break
        return {
            "index": index, "text": "", "finish_reason": reason, "stop_reason": stop_reason, "token_ids": tokens,
            "prompt_token_ids": body["prompt"],
            "logprobs": {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": chosen,
                         "top_logprobs": tops, "text_offset": []},
        }  # fmt: skip

    def pause(self, mode: str) -> Body:
        if mode == "wait":
            while self.active:
                threading.Event().wait(0.005)
        self.aborts += mode == "abort"
        self.running.clear()
        return {"status": "paused"}

    def take(self, weights: dict[str, Tensor]) -> None:
        with self.model_lock:
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
            assert not unexpected
            assert set(missing) <= {"lm_head.weight"}
            self.stale_cache = True

    def collective_rpc(self, body: Body) -> Body:
        self.must_be_paused()
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        self.take(load_file(folder / "model.safetensors"))
        return {"results": [None]}

    def init_weight_transfer_engine(self, body: Body) -> Body:
        info = body["init_info"]
        assert self.wire is not None
        assert base64.b64decode(info["nccl_unique_id_b64"]) == self.wire.unique_id()
        assert info["rank_offset"] == 1
        assert self.wire.learner_joined.wait(20)
        assert info["world_size"] == self.wire.size == 3
        self.wire.workers_joined.set()
        assert self.wire.warm.wait(5), "the learner did not take part in the first all_reduce"
        return {"message": "Weight transfer initialized"}

    def start_weight_update(self) -> Body:
        self.must_be_paused()
        if self.updating:
            raise Refused(500, "a weight update is already under way")
        self.updating = True
        return {"message": "Weight update started"}

    def update_weights(self, body: Body) -> Body:
        assert self.updating
        assert self.wire is not None
        info, weights = body["update_info"], {}
        assert set(info) == {"names", "dtype_names", "shapes"}
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            weights[name] = self.wire.tensors.get(timeout=20)
            assert list(weights[name].shape) == shape
            assert weights[name].dtype == getattr(torch, dtype)
        self.take(weights)
        for _ in weights:
            self.wire.tensors.task_done()
        return {"message": "Weights updated"}

    def finish_weight_update(self, body: Body) -> Body:
        assert self.updating
        self.updating, self.version = False, body["weight_version"]
        return {"message": "Weight update finished"}

    def reset_prefix_cache(self, query: dict[str, list[str]]) -> Body:
        if query.get("reset_running_requests") != ["true"] and self.active:
            return {"success": False}
        self.stale_cache = False
        return {"success": True}

    def must_be_paused(self) -> None:
        if self.running.is_set():
            raise Refused(409, "not paused")


class Handler(BaseHTTPRequestHandler):
    server: FakeVLLM

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: Body) -> None:
        parts = urlsplit(self.path)
        self.server.calls.append(self.path)
        try:
            planned = self.server.misbehaviour.get(parts.path)
            if planned:
                result = planned.pop(0)(self, body)
                if result is None:  # it has answered, or hung up
                    return
            else:
                result = self.result(parts.path, parse_qs(parts.query), body)
            self.send(200, json.dumps(result))
        except Refused as error:
            self.send(*error.args)
        except AssertionError as error:
            self.send(500, f"protocol: {error}")

    def result(self, path: str, query: dict[str, list[str]], body: Body) -> Body:
        server = self.server
        routes: dict[str, Callable[[], Body]] = {
            "/health": lambda: {},
            "/v1/models": lambda: {"object": "list", "data": [{"id": "tiny", "max_model_len": CONTEXT}]},
            "/v1/completions": lambda: server.completions(body),
            "/is_paused": lambda: {"is_paused": not server.running.is_set()},
            "/pause": lambda: server.pause(query["mode"][0]),
            "/resume": lambda: server.running.set() or {"status": "resumed"},  # type: ignore[func-returns-value]
            "/collective_rpc": lambda: server.collective_rpc(body),
            "/get_world_size": lambda: {"world_size": 2},
            "/init_weight_transfer_engine": lambda: server.init_weight_transfer_engine(body),
            "/start_weight_update": server.start_weight_update,
            "/update_weights": lambda: server.update_weights(body),
            "/finish_weight_update": lambda: server.finish_weight_update(body),
            "/reset_prefix_cache": lambda: server.reset_prefix_cache(query),
        }
        if path not in routes:
            raise Refused(404, '{"detail":"Not Found"}')
        return routes[path]()

    def send(self, status: int, text: str, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(model: LlamaForCausalLM) -> Iterator[FakeVLLM]:
    server = FakeVLLM(model)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.running.set()
        server.shutdown()
        server.server_close()
        thread.join()
