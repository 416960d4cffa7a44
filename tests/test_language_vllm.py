"""The client of a vLLM server, against a local server that speaks its protocol; never against a real one."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from headwater.language.generation import Generated, Sampling
from headwater.language.vllm import VLLMGenerator
from headwater.language.vllm_server import Server, ServerError, ServerUnavailable
from headwater.language.vllm_weights import CheckpointTransfer, NCCLGroup, NCCLTransfer, separate
from vllm_helpers import (
    CONTEXT,
    END,
    VOCABULARY,
    Body,
    FakeVLLM,
    Handler,
    Refused,
    Wire,
    log_probs_of,
    serving,
    tiny_llama,
)

PROMPTS = [[2, 3], [4, 5, 6], [2, 3], [7], [2, 3]]
SAMPLING = Sampling(temperature=0.7, max_new_tokens=6)


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    with serving(tiny_llama(0)) as running:
        yield running


def client(server: FakeVLLM, folder: Path, **settings: object) -> VLLMGenerator:
    """With short waits."""
    to = Server(server.url, timeout=20.0, attempts=3, backoff=0.01)
    transfer = settings.pop("transfer", None) or CheckpointTransfer(folder)
    options = {"vocabulary": VOCABULARY, "ends": [END], "start": 5.0} | settings
    return VLLMGenerator(to, transfer, **options)  # type: ignore[arg-type]


def check_log_probs(model: torch.nn.Module, prompt: list[int], completion: Generated, temperature: float) -> None:
    expected = log_probs_of(model, prompt, completion.tokens, temperature)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.tensor(completion.log_probs), expected, rtol=0, atol=1e-4)


# Completions


def test_completions_come_in_order_with_the_log_probabilities_of_the_draw(server: FakeVLLM, tmp_path: Path) -> None:
    generator = client(server, tmp_path)
    completions = generator.generate(PROMPTS, SAMPLING, seed=3)
    assert len(completions) == len(PROMPTS)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        check_log_probs(server.model, prompt, completion, 0.7)
    again = generator.generate(PROMPTS, SAMPLING, seed=3)
    assert [one.tokens for one in again] == [one.tokens for one in completions]
    assert [one.tokens for one in generator.generate(PROMPTS, SAMPLING, seed=4)] != [one.tokens for one in completions]
    assert generator.generate([], SAMPLING, seed=3) == []


def test_equal_prompts_are_one_request_and_no_two_completions_share_a_seed(server: FakeVLLM, tmp_path: Path) -> None:
    client(server, tmp_path).generate(PROMPTS, SAMPLING, seed=3)
    requests = server.requests[2:]  # after those that check the server
    assert sorted((request["prompt"], request["n"]) for request in requests) == [([2, 3], 3), ([4, 5, 6], 1), ([7], 1)]
    seeds = sorted(request["seed"] for request in requests)
    assert min(later - earlier for earlier, later in itertools.pairwise(seeds)) > 1000
    completions = client(server, tmp_path).generate([[7]] * 20, SAMPLING, seed=0)
    assert len({tuple(one.tokens) for one in completions}) > 5


def test_no_default_of_the_server_cuts_the_distribution(server: FakeVLLM, tmp_path: Path) -> None:
    client(server, tmp_path).generate([[2]], SAMPLING, seed=0)
    asked = server.requests[-1]
    assert (asked["top_p"], asked["top_k"], asked["min_p"]) == (1.0, -1, 0.0)
    penalties = asked["repetition_penalty"], asked["presence_penalty"], asked["frequency_penalty"]
    assert penalties == (1.0, 0.0, 0.0)
    assert (asked["temperature"], asked["max_tokens"], asked["stop_token_ids"]) == (0.7, 6, [END])


def test_only_an_end_of_sequence_finishes_a_completion(server: FakeVLLM, tmp_path: Path) -> None:
    letter = chr(ord("a") + 5)
    sampling = Sampling(max_new_tokens=6, stop=(letter,))
    completions = client(server, tmp_path).generate([[2, 3]] * 60, sampling, seed=1)
    seen = set()
    for one in completions:
        ended, stopped = one.tokens[-1] == END, one.tokens[-1] == 5
        assert one.finished == ended
        assert ended or stopped or len(one.tokens) == 6
        seen.add((ended, stopped))
    assert len(seen) == 3  # all three ends happened


def test_every_end_of_the_model_finishes_and_an_unknown_one_is_refused(server: FakeVLLM, tmp_path: Path) -> None:
    hot = replace(SAMPLING, temperature=3.0)
    completions = client(server, tmp_path, ends=[END, 6]).generate([[2, 3]] * 60, hot, seed=1)
    assert {one.tokens[-1] for one in completions if one.finished} == {END, 6}
    with pytest.raises(ServerError, match=r"ended by itself with token 1, which is not among ends = \[6\]"):
        client(server, tmp_path, ends=[6]).generate([[2, 3]] * 60, hot, seed=1)


def test_no_more_requests_than_allowed_are_under_way_at_once(server: FakeVLLM, tmp_path: Path) -> None:
    server.before_token = lambda: time.sleep(0.005)
    client(server, tmp_path, concurrency=3).generate([[2 + i % 9, i % 5] for i in range(12)], SAMPLING, seed=0)
    assert server.most_active == 3


# What a server must be


@pytest.mark.parametrize("reports", ["raw_logprobs", "processed_logits"])
def test_all_but_log_probabilities_at_the_temperature_are_refused_at_the_start(
    server: FakeVLLM, tmp_path: Path, reports: Literal["raw_logprobs", "processed_logits"]
) -> None:
    server.reports = reports
    with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs"):
        client(server, tmp_path)


@pytest.mark.parametrize("divided_by", [1.0, 2.0])
def test_the_check_looks_at_tokens_that_both_answers_show(server: FakeVLLM, tmp_path: Path, divided_by: float) -> None:
    def shows(top: dict[str, float]) -> object:
        return lambda handler, body: {"choices": [{"token_ids": [9], "logprobs": {"top_logprobs": [top]}}]}

    likeliest = {"token_id:1": -1.0, "token_id:2": -2.0, "token_id:3": -3.0}
    later = {name: value / divided_by - 0.5 for name, value in likeliest.items()}
    drawn = {"token_id:9": -8.0}, {"token_id:8": -7.0}  # which is shown too, however unlikely it is
    server.misbehaviour["/v1/completions"] = [shows(likeliest | drawn[0]), shows(later | drawn[1])]  # type: ignore[list-item]
    if divided_by == 2:
        client(server, tmp_path)
    else:
        with pytest.raises(ServerError, match="processed_logprobs"):
            client(server, tmp_path)


def test_a_model_without_preference_is_checked_once_it_has_one(server: FakeVLLM, tmp_path: Path) -> None:
    trained = {name: tensor.clone() for name, tensor in server.model.state_dict().items()}
    torch.nn.init.zeros_(server.model.lm_head.weight)
    server.reports = "raw_logprobs"
    generator = client(server, tmp_path)
    generator.load(trained, 1)
    with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs"):
        generator.generate([[2]], SAMPLING, seed=0)


def test_a_server_that_gives_no_token_ids_is_refused_at_the_start(server: FakeVLLM, tmp_path: Path) -> None:
    def old(handler: Handler, body: Body) -> Body:
        answer = handler.server.completions(body)
        return {"choices": [{**answer["choices"][0], "token_ids": None}]}

    server.misbehaviour["/v1/completions"] = [old]
    with pytest.raises(ServerError, match="return_token_ids"):
        client(server, tmp_path)


def test_a_server_without_the_paths_for_weights_is_refused_at_the_start(server: FakeVLLM, tmp_path: Path) -> None:
    def missing(handler: Handler, body: Body) -> Body:
        raise Refused(404, "Not Found")

    server.misbehaviour["/is_paused"] = [missing]
    with pytest.raises(ServerError, match="VLLM_SERVER_DEV_MODE=1"):
        client(server, tmp_path)


def test_a_wrong_model_is_an_error_that_names_those_served(server: FakeVLLM, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"model = 'huge': must be one of 'tiny'"):
        client(server, tmp_path, model="huge")


def test_a_server_that_is_coming_up_is_waited_for_but_not_for_ever(server: FakeVLLM, tmp_path: Path) -> None:
    def loading(handler: Handler, body: Body) -> Body:
        raise Refused(503, "")

    server.misbehaviour["/health"] = [loading]
    client(server, tmp_path)
    server.misbehaviour["/health"] = [loading] * 100
    with pytest.raises(ServerUnavailable, match=r"no healthy server within 0.3 s: .*/health.*503"):
        client(server, tmp_path, start=0.3)


def test_requests_that_cannot_be_met_are_refused_before_they_are_sent(server: FakeVLLM, tmp_path: Path) -> None:
    generator = client(server, tmp_path)
    before = len(server.calls)
    with pytest.raises(ValueError, match=rf"prompts\[1\] has 60 tokens.*max_new_tokens = 6.*{CONTEXT}"):
        generator.generate([[2], [3] * 60], SAMPLING, seed=0)
    with pytest.raises(ValueError, match=r"prompts\[0\]: must be token ids from 0 to 11"):
        generator.generate([[VOCABULARY]], SAMPLING, seed=0)
    with pytest.raises(ValueError, match=r"temperature = 0\.001"):
        generator.generate([[2]], Sampling(temperature=0.001), seed=0)
    assert len(server.calls) == before
    with pytest.raises(ValueError, match=r"vocabulary = 12, ends = \[12\]"):
        client(server, tmp_path, ends=[12])
    with pytest.raises(ValueError, match="concurrency = 0"):
        client(server, tmp_path, concurrency=0)
    with pytest.raises(ValueError, match="pause = 'drop'"):
        client(server, tmp_path, pause="drop")
    with pytest.raises(ValueError, match="url = 'localhost:8000'"):
        Server("localhost:8000")


# What may go wrong with a request


def fails(status: int, text: str = "busy", headers: dict[str, str] | None = None):  # type: ignore[no-untyped-def]
    def answer(handler: Handler, body: Body) -> None:
        handler.send(status, text, headers)

    return answer


def hangs_up(handler: Handler, body: Body) -> None:
    handler.connection.close()


def dies_half_way(handler: Handler, body: Body) -> None:
    handler.send(200, '{"choices": [', length=5000)


def aborted(handler: Handler, body: Body) -> Body:
    choices = handler.server.completions(body)["choices"]
    return {"choices": [{**choices[0], "finish_reason": "abort", "token_ids": []}, *choices[1:]]}


@pytest.mark.parametrize("trouble", [fails(500), fails(503), fails(429), hangs_up, dies_half_way, aborted])
def test_a_passing_failure_is_asked_again(server: FakeVLLM, tmp_path: Path, trouble: object) -> None:
    generator = client(server, tmp_path)
    expected = generator.generate([[2, 3]] * 3, SAMPLING, seed=0)
    server.misbehaviour["/v1/completions"] = [trouble, trouble]  # type: ignore[list-item]
    assert generator.generate([[2, 3]] * 3, SAMPLING, seed=0) == expected


@pytest.mark.parametrize(
    ("trouble", "said"),
    [(fails(500), "status 500: 'busy'"), (hangs_up, "RemoteDisconnected"), (dies_half_way, "IncompleteRead")],
)
def test_a_lasting_failure_ends_after_the_attempts_allowed(
    server: FakeVLLM, tmp_path: Path, trouble: object, said: str
) -> None:
    generator = client(server, tmp_path)
    server.misbehaviour["/v1/completions"] = [trouble] * 9  # type: ignore[list-item]
    with pytest.raises(ServerUnavailable, match=f"{server.url}/v1/completions: asked 3 times, at last .*{said}"):
        generator.generate([[2, 3]], SAMPLING, seed=0)
    assert len(server.misbehaviour["/v1/completions"]) == 6


def test_a_server_that_asks_for_patience_gets_it(server: FakeVLLM, tmp_path: Path) -> None:
    generator = client(server, tmp_path)
    server.misbehaviour["/v1/completions"] = [fails(429, headers={"Retry-After": "0.4"})]
    before = time.monotonic()
    generator.generate([[2, 3]], SAMPLING, seed=0)
    assert time.monotonic() - before >= 0.4


def test_a_refusal_is_not_repeated_and_names_url_status_and_reason(server: FakeVLLM, tmp_path: Path) -> None:
    generator = client(server, tmp_path)
    server.misbehaviour["/v1/completions"] = [fails(400, "bad temperature")]
    before = len(server.calls)
    with pytest.raises(ServerError, match=f"{server.url}/v1/completions: status 400: 'bad temperature'") as error:
        generator.generate([[2, 3]], SAMPLING, seed=0)
    assert not isinstance(error.value, ServerUnavailable)
    assert len(server.calls) == before + 1


def test_a_refusal_does_not_wait_for_requests_that_are_still_under_way(server: FakeVLLM, tmp_path: Path) -> None:
    def slow(handler: Handler, body: Body) -> None:
        time.sleep(1.5)
        handler.send(500, "")

    def refuses(handler: Handler, body: Body) -> None:
        time.sleep(0.1)
        handler.send(400, "no")

    generator = client(server, tmp_path)
    server.misbehaviour["/v1/completions"] = [slow, refuses]
    before = time.monotonic()
    with pytest.raises(ServerError, match="status 400"):
        generator.generate([[2, 3], [4]], SAMPLING, seed=0)
    assert time.monotonic() - before < 1


@pytest.mark.parametrize("drips", [False, True])
def test_an_answer_has_to_come_in_time(server: FakeVLLM, tmp_path: Path, drips: bool) -> None:
    def slow(handler: Handler, body: Body) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(40 if drips else 0):
            handler.wfile.write(b" ")
            time.sleep(0.05)
        time.sleep(0 if drips else 2)

    generator = client(server, tmp_path)
    generator.server = replace(generator.server, timeout=0.3)
    server.misbehaviour["/v1/completions"] = [slow]
    before = time.monotonic()
    with pytest.raises(ServerUnavailable, match=r"no whole answer within 0.3 s"):
        generator.generate([[2, 3]], SAMPLING, seed=0)
    assert time.monotonic() - before < 1.5


@pytest.mark.parametrize("announced", [True, False])
def test_an_answer_that_is_too_long_is_not_read_to_its_end(server: FakeVLLM, tmp_path: Path, announced: bool) -> None:
    def long(handler: Handler, body: Body) -> None:
        handler.send_response(200)
        if announced:
            handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        handler.wfile.write(b" " * 20_000)

    generator = client(server, tmp_path)
    generator.server = replace(generator.server, most_bytes=10_000)
    server.misbehaviour["/v1/completions"] = [long]
    with pytest.raises(ServerError, match="longer than 10000 bytes"):
        generator.generate([[2, 3]], SAMPLING, seed=0)


@pytest.mark.parametrize("text", ["<html>gateway</html>", '{"choices": [NaN]}', "[" * 100_000])
def test_what_is_no_json_is_an_error_that_shows_its_start(server: FakeVLLM, tmp_path: Path, text: str) -> None:
    generator = client(server, tmp_path)
    server.misbehaviour["/v1/completions"] = [fails(200, text)]
    with pytest.raises(ServerError, match=rf"is no JSON \(.*\): {re.escape(repr(text[:300])[:-1])}"):
        generator.generate([[2, 3]], SAMPLING, seed=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_ids": [2, VOCABULARY]}, "token_ids must be ids from 0 to 11"),
        ({"token_ids": [2, True]}, "token_ids must be ids"),
        ({"token_ids": [2, -1]}, "token_ids must be ids"),
        ({"token_ids": []}, "0 tokens where 1 to 6"),
        ({"token_ids": [2] * 7}, "7 tokens where 1 to 6"),
        ({"token_ids": [2, 2, 2]}, "2 log-probabilities of 3 tokens"),
        ({"logprobs": None}, "logprobs must be a JSON dict"),
        ({"logprobs": {"token_logprobs": [-1.0, None]}}, "token_logprobs must be finite"),
        ({"logprobs": {"token_logprobs": [-1.0, 0.5]}}, "token_logprobs must be finite"),
        ({"prompt_token_ids": [0, 2, 3]}, "not the prompt that was sent"),
        ({"finish_reason": "repetition"}, "must be 'stop' or 'length', not 'repetition'"),
        ({"index": 1}, "1 completions instead of 1, or not numbered from 0"),
    ],
)
def test_an_answer_against_the_protocol_is_refused(server: FakeVLLM, tmp_path: Path, changes: Body, said: str) -> None:
    right = {
        "index": 0, "token_ids": [2, 3], "prompt_token_ids": [2, 3], "finish_reason": "length", "stop_reason": None,
        "logprobs": {"token_logprobs": [-1.0, -2.0]},
    }  # fmt: skip
    generator = client(server, tmp_path)
    server.misbehaviour["/v1/completions"] = [lambda handler, body: {"choices": [right]}]
    assert generator.generate([[2, 3]], SAMPLING, seed=0) == [Generated([2, 3], [-1.0, -2.0], False)]
    server.misbehaviour["/v1/completions"] = [lambda handler, body: {"choices": [right | changes]}]
    with pytest.raises(ServerError, match=f"{server.url}/v1/completions: .*{said}"):
        generator.generate([[2, 3]], SAMPLING, seed=0)


def test_the_key_is_sent_and_never_shown(server: FakeVLLM, tmp_path: Path) -> None:
    def locked(handler: Handler, body: Body) -> None:
        handler.send(401, "known" if handler.headers["Authorization"] == "Bearer secret" else "unknown")

    server.misbehaviour["/v1/models"] = [locked]
    to = Server(server.url, key="secret")
    with pytest.raises(ServerError, match="status 401: 'known'"):
        VLLMGenerator(to, CheckpointTransfer(tmp_path), vocabulary=VOCABULARY, ends=[END])
    assert "secret" not in repr(to)


# Weights


def test_a_checkpoint_reaches_the_paused_server_and_only_the_newest_stays(server: FakeVLLM, tmp_path: Path) -> None:
    generator = client(server, tmp_path)
    for version, seed in ((7, 1), (8, 2)):
        new, first = tiny_llama(seed), len(server.calls)
        generator.load(new.state_dict(), version)
        assert server.calls[first:] == [
            "/pause?mode=keep", "/collective_rpc",
            "/reset_prefix_cache?reset_running_requests=true&reset_external=true", "/resume",
        ]  # fmt: skip
        (completion,) = generator.generate([[2, 3]], SAMPLING, seed=5)
        check_log_probs(new, [2, 3], completion, 0.7)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "weights-8", "weights-8/model.safetensors",
    ]  # fmt: skip


def test_tied_weights_are_written_once_and_views_on_their_own(tmp_path: Path) -> None:
    model = tiny_llama(0, tied=True)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(model.state_dict())
    table = torch.arange(12.0).reshape(4, 3)
    weights = {**model.state_dict(), "turned": table.T, "part": table[1:3], "table": table}
    CheckpointTransfer(tmp_path).prepare(Server("http://unused"), weights, 0)
    written = load_file(tmp_path / "weights-0" / "model.safetensors")
    assert set(written) == set(weights) - {"lm_head.weight"}
    assert torch.equal(written["turned"], table.T)
    assert torch.equal(written["part"], table[1:3])
    assert separate(weights)["table"].data_ptr() == table.data_ptr()  # no copy without need


@pytest.mark.parametrize("pause", ["keep", "wait", "abort"])
def test_completions_under_way_go_on_end_first_or_start_anew(server: FakeVLLM, tmp_path: Path, pause: str) -> None:
    old, new = tiny_llama(0), tiny_llama(1)
    half, started = threading.Event(), itertools.count(1)

    def before_token() -> None:
        if next(started) == 4:
            half.set()
            while f"/pause?mode={pause}" not in server.calls:
                time.sleep(0.002)
            while pause != "wait" and server.running.is_set() and "/resume" not in server.calls:
                time.sleep(0.002)
            if pause == "keep":
                server.running.wait(10)

    generator = client(server, tmp_path, pause=pause, ends=[])
    server.before_token, server.end = before_token, None
    result: list[Generated] = []
    asking = threading.Thread(
        target=lambda: result.extend(generator.generate([[2, 3]], Sampling(max_new_tokens=8, temperature=2.0), seed=0))
    )
    asking.start()
    assert half.wait(10)
    generator.load(new.state_dict(), 1)
    asking.join(20)
    (completion,) = result
    assert len(completion.tokens) == 8
    before, after = (log_probs_of(model, [2, 3], completion.tokens, 2.0) for model in (old, new))
    switch = {"keep": 3, "wait": 8, "abort": 0}[pause]  # tokens that the old weights wrote
    expected = torch.cat([before[:switch], after[switch:]])
    torch.testing.assert_close(torch.tensor(completion.log_probs), expected, rtol=0, atol=1e-4)


def test_nothing_is_drawn_from_weights_that_did_not_arrive_whole(server: FakeVLLM, tmp_path: Path) -> None:
    generator = client(server, tmp_path)
    server.misbehaviour["/collective_rpc"] = [hangs_up] * 3
    with pytest.raises(ServerUnavailable, match="/collective_rpc: asked 3 times"):
        generator.load(tiny_llama(1).state_dict(), 1)
    assert not server.running.is_set()
    with pytest.raises(ServerUnavailable, match="stays paused: version 1 did not arrive whole"):
        generator.generate([[2, 3]], SAMPLING, seed=0)
    later = client(server, tmp_path)  # a run that goes on after this one ended
    with pytest.raises(ServerUnavailable, match="is paused"):
        later.generate([[2, 3]], SAMPLING, seed=0)
    later.load(tiny_llama(2).state_dict(), 2)
    (completion,) = later.generate([[2, 3]], SAMPLING, seed=0)
    check_log_probs(tiny_llama(2), [2, 3], completion, 0.7)


def test_completions_asked_for_while_weights_arrive_wait_for_them(server: FakeVLLM, tmp_path: Path) -> None:
    generator = client(server, tmp_path)
    arriving, asked = threading.Event(), threading.Event()

    def slow(handler: Handler, body: Body) -> Body:
        arriving.set()
        assert asked.wait(10)
        return server.collective_rpc(body)

    server.misbehaviour["/collective_rpc"] = [slow]
    loading = threading.Thread(target=generator.load, args=(tiny_llama(1).state_dict(), 1))
    loading.start()
    assert arriving.wait(10)
    threading.Timer(0.1, asked.set).start()
    (completion,) = generator.generate([[2, 3]], SAMPLING, seed=0)
    loading.join(10)
    check_log_probs(tiny_llama(1), [2, 3], completion, 0.7)


def test_weights_that_cannot_be_written_leave_the_server_as_it_was(server: FakeVLLM, tmp_path: Path) -> None:
    (tmp_path / "full").write_text("no folder")
    generator = client(server, tmp_path / "full")
    with pytest.raises(OSError, match="full"):
        generator.load(tiny_llama(1).state_dict(), 1)
    (completion,) = generator.generate([[2, 3]], SAMPLING, seed=0)
    check_log_probs(tiny_llama(0), [2, 3], completion, 0.7)


def test_a_server_that_keeps_what_old_weights_computed_is_refused(server: FakeVLLM, tmp_path: Path) -> None:
    generator = client(server, tmp_path)
    server.misbehaviour["/reset_prefix_cache"] = [lambda handler, body: {"success": False}]
    with pytest.raises(ServerError, match="kept what old weights computed"):
        generator.load(tiny_llama(1).state_dict(), 1)


UPDATE = [
    "/pause?mode=keep", "/start_weight_update", "/update_weights", "/finish_weight_update",
    "/reset_prefix_cache?reset_running_requests=true&reset_external=true", "/resume",
]  # fmt: skip


@pytest.mark.parametrize("nccl", [False, True])
def test_a_broadcast_meets_the_servers_side_of_it(
    server: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nccl: bool
) -> None:
    wire = server.wire = Wire()
    if nccl:
        wire.stand_in_for_nccl(monkeypatch)
    transfer = NCCLTransfer((lambda: NCCLGroup("cpu")) if nccl else (lambda: wire))
    generator = client(server, tmp_path, transfer=transfer)
    first = len(server.calls)
    for version, dtype in ((3, torch.float32), (4, torch.bfloat16)):
        weights = {name: tensor.to(dtype) for name, tensor in tiny_llama(version).state_dict().items()}
        generator.load(weights, version)
        assert server.version == str(version)
        (completion,) = generator.generate([[2, 3]], SAMPLING, seed=5)
        expected = tiny_llama(0)
        expected.load_state_dict(weights)
        check_log_probs(expected, [2, 3], completion, 0.7)
    calls = [call for call in server.calls[first:] if call != "/v1/completions"]
    assert calls == ["/get_world_size", "/init_weight_transfer_engine", *UPDATE, *UPDATE]


@pytest.mark.parametrize("step", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_an_update_that_fails_half_way_ends_at_once_and_the_next_opens_a_new_group(
    server: FakeVLLM, tmp_path: Path, step: str
) -> None:
    server.wire = Wire()
    generator = client(server, tmp_path, transfer=NCCLTransfer(lambda: server.wire))  # type: ignore[arg-type,return-value]
    server.misbehaviour[f"/{step}"] = [fails(500, "worker died"), fails(500, "asked again")]
    before = time.monotonic()
    with pytest.raises(ServerUnavailable, match=f"/{step}: asked once, at last status 500: 'worker died'"):
        generator.load(tiny_llama(1).state_dict(), 1)
    assert time.monotonic() - before < 5  # the learner's side of the broadcast would wait for ever
    with pytest.raises(ServerUnavailable, match="version 1 did not arrive whole"):
        generator.generate([[2, 3]], SAMPLING, seed=0)
    server.misbehaviour.clear()
    server.updating, server.wire = False, Wire()  # started again
    generator.load(tiny_llama(2).state_dict(), 2)
    (completion,) = generator.generate([[2, 3]], SAMPLING, seed=0)
    check_log_probs(tiny_llama(2), [2, 3], completion, 0.7)


def test_a_group_that_the_server_refuses_leaves_it_drawing(server: FakeVLLM, tmp_path: Path) -> None:
    server.wire = Wire()
    generator = client(server, tmp_path, transfer=NCCLTransfer(lambda: server.wire))  # type: ignore[arg-type,return-value]
    server.misbehaviour["/init_weight_transfer_engine"] = [fails(400, "no weight transfer configured")]
    with pytest.raises(ServerError, match="status 400: 'no weight transfer configured'"):
        generator.load(tiny_llama(1).state_dict(), 1)
    (completion,) = generator.generate([[2, 3]], SAMPLING, seed=0)
    check_log_probs(tiny_llama(0), [2, 3], completion, 0.7)


@pytest.mark.skipif(hasattr(torch._C, "_nccl_init_rank"), reason="this torch has NCCL")
def test_a_torch_without_nccl_is_told_of_the_other_way() -> None:
    with pytest.raises(RuntimeError, match="CheckpointTransfer"):
        NCCLGroup()
