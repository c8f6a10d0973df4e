"""The server, by the official client, over real sockets."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import torch
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_sd import HeteroSpeculativeDecoder
from hetero_sd.serving import Engine, create_app
from hetero_sd.serving.engine import Job, Penalty, Settings
from hetero_sd.serving.transcript import Transcript

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}on "


@contextmanager
def running(decoder, *, api_key=None, origins=(), **options):
    """A server on a free port; yields its address and its engine."""
    engine = Engine(decoder, **options)
    app = create_app(engine, name="tiny", api_key=api_key, origins=origins)
    config = uvicorn.Config(app, port=0, log_level="warning")
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.01)


def build(tokenizers, models, **options):
    options = {"method": "tli", "lookahead": 3, "backend": "eager"} | options
    target, drafter = "byte-level", "sentencepiece"
    return HeteroSpeculativeDecoder(
        models[target], models[drafter], tokenizers[target], tokenizers[drafter], **options
    )


@pytest.fixture(scope="module")
def decoder(tokenizers, models):
    tokenizers["byte-level"].chat_template = TEMPLATE
    yield build(tokenizers, models)
    tokenizers["byte-level"].chat_template = None


@pytest.fixture(scope="module")
def server(decoder):
    with running(decoder, rows=4) as (address, engine):
        yield address, engine


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0) as made:
        yield made


def alone(decoder, prompt, tokens, **options):
    """Text and number of tokens of the target by itself, greedy."""
    ids = decoder.target_tokenizer(prompt, return_tensors="pt").input_ids
    made = decoder.target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )[0, ids.shape[1] :]
    return decoder.target_tokenizer.decode(made, skip_special_tokens=True), len(made)


PROMPTS = ["the cat sat on", "café über 42", "a dog", "over the hill and on a mat"]


def test_completions_are_the_targets_own(client, decoder):
    for prompt in PROMPTS[:2]:
        made = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=20)
        text, count = alone(decoder, prompt, 20)
        assert made.choices[0].text == text
        assert made.usage.completion_tokens == count
        assert made.usage.prompt_tokens == len(decoder.target_tokenizer(prompt).input_ids)
        assert made.choices[0].finish_reason == ("length" if count == 20 else "stop")


def test_several_prompts_and_ids(client, decoder):
    ids = [decoder.target_tokenizer(prompt).input_ids for prompt in PROMPTS]
    for prompts in (PROMPTS, ids):
        made = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=9)
        assert [choice.text for choice in made.choices] == [
            alone(decoder, prompt, 9)[0] for prompt in PROMPTS
        ]


def test_a_stream_says_the_same(client, decoder):
    asked = {"model": "tiny", "prompt": PROMPTS[1], "max_tokens": 30}
    wanted, count = alone(decoder, PROMPTS[1], 30)
    options = {"include_usage": True}
    events = list(
        client.completions.create(**asked, temperature=0, stream=True, stream_options=options)
    )
    assert "".join(e.choices[0].text for e in events if e.choices) == wanted
    assert events[-1].usage.completion_tokens == count
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] in ("stop", "length")
    assert len({e.id for e in events}) == 1
    assert len(events) > 4
    # Sampled, by one seed, with and without streaming.
    whole = client.completions.create(**asked, seed=7).choices[0].text
    pieces = client.completions.create(**asked, seed=7, stream=True)
    assert "".join(e.choices[0].text for e in pieces) == whole
    others = {client.completions.create(**asked, seed=i).choices[0].text for i in range(4)}
    assert len(others) > 1


def test_chat(client, decoder):
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "the cat"}]},
    ]
    wanted, count = alone(decoder, "system be kind\nuser the cat\non ", 16)
    asked = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 16}
    made = client.chat.completions.create(**asked)
    assert made.choices[0].message.content == wanted
    assert made.choices[0].message.role == "assistant"
    assert made.usage.completion_tokens == count
    events = list(client.chat.completions.create(**asked, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in events) == wanted
    two = client.chat.completions.create(**asked, n=2)
    assert [choice.message.content for choice in two.choices] == [wanted, wanted]


def test_a_stop_string_ends_the_text_and_is_no_part_of_it(client, decoder):
    text, count = alone(decoder, PROMPTS[0], 40)
    stop = text[7:10]
    wanted = text[: text.index(stop)]
    asked = {"model": "tiny", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 40}
    made = client.completions.create(**asked, stop=[stop, "never said"])
    assert (made.choices[0].text, made.choices[0].finish_reason) == (wanted, "stop")
    assert made.usage.completion_tokens < count
    events = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(e.choices[0].text for e in events) == wanted


def test_concurrent_clients_get_each_their_own(client, decoder, server):
    def ask(i):
        prompt, tokens = PROMPTS[i % 4], 8 + 5 * (i % 3)
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": tokens}
        if i % 5 == 4:  # other settings, in between: those take turns with the rest
            asked |= {"temperature": 1.0, "seed": 3}
            wanted = decoder_sampled[prompt, tokens]
        else:
            asked |= {"temperature": 0}
            wanted = alone(decoder, prompt, tokens)[0]
        if i % 2:
            found = "".join(
                e.choices[0].text for e in client.completions.create(**asked, stream=True)
            )
        else:
            found = client.completions.create(**asked).choices[0].text
        return found, wanted

    # What the seed gives to one who asks alone.
    decoder_sampled = {
        (p, t): client.completions.create(model="tiny", prompt=p, max_tokens=t, seed=3)
        .choices[0]
        .text
        for p in PROMPTS
        for t in (8, 13, 18)
    }
    with ThreadPoolExecutor(12) as pool:
        for found, wanted in pool.map(ask, range(24)):
            assert found == wanted
    assert server[1].state()["rows"] == 0


def test_penalties_and_biases_change_the_law(client, decoder):
    asked = {"model": "tiny", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 30}
    plain = client.completions.create(**asked).choices[0].text
    allowed = decoder.target_tokenizer(" cat").input_ids[:1]
    forced = client.completions.create(**asked, logit_bias={str(allowed[0]): 100})
    assert forced.choices[0].text == decoder.target_tokenizer.decode(allowed * 30)
    penalised = client.completions.create(**asked, frequency_penalty=2, presence_penalty=2)
    by_hand = alone(decoder, PROMPTS[0], 30, logits_processor=[_penalty(decoder)])[0]
    assert penalised.choices[0].text == by_hand != plain
    # Additions to OpenAI's names.
    repeated = client.completions.create(**asked, extra_body={"repetition_penalty": 1.8})
    assert repeated.choices[0].text == alone(decoder, PROMPTS[0], 30, repetition_penalty=1.8)[0]


def _penalty(decoder):
    prompt = len(decoder.target_tokenizer(PROMPTS[0]).input_ids)

    def penalise(input_ids, scores):
        scores = scores.clone()
        for token in set(input_ids[0, prompt:].tolist()):
            scores[0, token] -= 2 + 2 * input_ids[0, prompt:].tolist().count(token)
        return scores

    return penalise


def test_the_penalty_leaves_out_prompt_and_padding():
    scores = Penalty(0.5, 0.25, 2)(torch.tensor([[0, 1, 1, 1, 2]]), torch.zeros(1, 4))
    assert scores.tolist() == [[0.0, -1.0, -0.75, 0.0]]


def test_a_client_that_leaves_frees_its_rows(decoder, tokenizers, models):
    slow = build(tokenizers, models)
    extend = slow.start

    def start(**options):
        rounds = extend(**options)
        run = rounds.run

        def crawl():
            for new in run():
                time.sleep(0.05)
                yield new

        rounds.run = crawl
        return rounds

    slow.start = start
    with (
        running(slow, rows=2) as (address, engine),
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client,
    ):
        asked = {"model": "tiny", "prompt": "the cat", "max_tokens": 200, "temperature": 0}
        asked["logit_bias"] = {str(i): -100 for i in slow.target_eos}
        with client.completions.create(**asked, stream=True) as stream:
            next(iter(stream))
            assert engine.state()["rows"] == 1
        until(lambda: engine.state()["rows"] == 0)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(**asked)
        until(lambda: engine.state()["rows"] == 0)
        # One that waits for its turn, too.
        streams = [client.completions.create(**asked, stream=True) for _ in range(2)]
        until(lambda: engine.state()["rows"] == 2)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(**asked)
        until(lambda: engine.state()["waiting"] == 0)
        for stream in streams:
            stream.close()
        until(lambda: engine.state()["rows"] == 0)
        until(lambda: engine.state()["cancelled"] == 5)
        # And it still works.
        text = client.completions.create(**asked | {"max_tokens": 3}).choices[0].text
        assert text == alone(slow, "the cat", 3)[0]


def post(address, data, path="/v1/completions", headers=()):
    """Status and body of the answer to raw bytes."""
    request = urllib.request.Request(address + path, data, dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


BAD = [
    (b"", 400, "the body is no JSON"),
    (b"{", 400, "the body is no JSON"),
    (b"\xff\xfe", 400, "the body is no JSON"),
    (b"[]", 400, "the body must be a JSON object; got list"),
    ({}, 400, "`prompt`: Field required"),
    ({"model": "tiny"}, 400, "`prompt`: Field required"),
    ({"model": "big", "prompt": "a"}, 404, "the model 'big' does not exist; this server has"),
    ({"model": "tiny", "prompt": ""}, 400, "`prompt` must hold at least one token"),
    ({"model": "tiny", "prompt": []}, 400, "`prompt` must hold at least one token"),
    ({"model": "tiny", "prompt": [99999]}, 400, r"`prompt`: tokens must be in \[0, \d+\); got 999"),
    ({"model": "tiny", "prompt": "\ud800"}, 400, "half of a surrogate pair"),
    ({"model": "tiny", "prompt": 3}, 400, "`prompt`: Input should be a valid"),
    ({"model": "tiny", "prompt": "a", "max_tokens": 0}, 400, "`max_tokens`: Input should be gr"),
    ({"model": "tiny", "prompt": "a", "temperature": -1}, 400, "`temperature`: Input should be"),
    (b'{"model": "tiny", "prompt": "a", "top_p": NaN}', 400, "`top_p`: Input should be"),
    ({"model": "tiny", "prompt": "a", "stop": ""}, 400, "`stop"),
    ({"model": "tiny", "prompt": "a", "stop": [""]}, 400, "`stop`: Value should have at least 1"),
    ({"model": "tiny", "prompt": "a", "logit_bias": {"99999": 1}}, 400, "`logit_bias`: tokens mu"),
    ({"model": "tiny", "prompt": "a", "logprobs": 3}, 400, "`logprobs` is not supported; leave it"),
    ({"model": "tiny", "prompt": "a", "temprature": 1}, 400, "`temprature`: Extra inputs"),
    ({"model": "tiny", "prompt": "a " * 300}, 400, "the model has 256 positions; `prompt` takes"),
    ({"model": "tiny", "prompt": "a", "max_tokens": 256}, 400, "and `max_tokens` is 256"),
    (b"[" * 100_000, 400, "the body is no JSON"),
    (b" " * (17 << 20), 413, "the body must be at most 16 MiB"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD, ids=range(len(BAD)))
def test_bad_requests_are_told_why(server, body, status, message):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    found, answer = post(server[0], data)
    assert found == status
    assert re.search(message, answer["error"]["message"])
    assert answer["error"]["type"] == "invalid_request_error"


def test_bad_chats_are_told_why(client, server, decoder):
    def refused(messages, message, **options):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="tiny", messages=messages, **options)

    user = {"role": "user", "content": "hello"}
    refused([], "`messages`: List should have at least 1 item")
    refused([{"role": "system", "content": "x"}], "a chat needs a message of the user")
    refused([{"role": "robot", "content": "x"}], r"`messages.0.role`: Input should be 'system'")
    refused([user], "`tools` is not supported", tools=[{"type": "function", "function": {}}])
    refused([user], "`response_format` is not", response_format={"type": "json_object"})
    picture = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    refused([{"role": "user", "content": picture}], "`messages.0.content")
    refused([user | {"content": "a " * 300}], "the model has 256 positions; `messages` takes")
    tokenizer = decoder.target_tokenizer
    try:
        tokenizer.chat_template = "{{ raise_exception('no such role') }}"
        refused([user], "chat template refuses `messages`: no such role")
        tokenizer.chat_template = None
        refused([user], "the model has no chat template; use /v1/completions")
    finally:
        tokenizer.chat_template = TEMPLATE


def test_other_routes(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "hetero-sd"
    with pytest.raises(openai.NotFoundError, match="'huge' does not exist"):
        client.models.retrieve("huge")
    assert post(server[0], None, "/health") == (200, {"status": "ok"})
    status, stats = post(server[0], None, "/stats")
    assert status == 200
    assert stats["requests"] >= 0
    status, answer = post(server[0], None, "/v1/nothing")
    assert (status, answer["error"]["message"]) == (404, "GET /v1/nothing: Not Found")
    assert post(server[0], b"{}", "/health")[0] == 405
    status, made = post(server[0], json.dumps({"prompt": "a", "max_tokens": 2}).encode())
    assert (status, made["model"]) == (200, "tiny")  # The only one need not be named.


def test_figures_for_prometheus(server):
    with urllib.request.urlopen(f"{server[0]}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    kinds = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    assert kinds["hetero_sd_requests_total"] == kinds["hetero_sd_rounds_total"] == "counter"
    assert kinds["hetero_sd_acceptance"] == "gauge"
    figures = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    assert {name.split("{")[0] for name, _ in figures} <= set(kinds)
    assert all(float(figure) >= 0 for _, figure in figures)


@pytest.mark.parametrize(("origins", "allowed"), [((), None), (("http://page",), "http://page")])
def test_pages_of_named_origins_may_call(decoder, origins, allowed):
    with running(decoder, origins=origins) as (address, _):
        asked = urllib.request.Request(f"{address}/health", headers={"Origin": "http://page"})
        with urllib.request.urlopen(asked) as answer:
            assert answer.headers.get("Access-Control-Allow-Origin") == allowed


def test_a_key_is_asked_for(decoder):
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 2}).encode()
    with running(decoder, api_key="sesame") as (address, _):
        for path in ("/v1/models", "/stats"):
            assert post(address, None, path)[0] == 401
        assert post(address, body)[0] == 401
        assert post(address, body, headers={"Authorization": "Bearer sesam"})[0] == 401
        assert post(address, body, headers={"Authorization": "Bearer sesame"})[0] == 200
        assert post(address, None, "/health")[0] == 200


def test_a_batch_that_fails_harms_no_other(tokenizers, models):
    broken = build(tokenizers, models)
    extend = broken.start

    def start(**options):
        rounds = extend(**options)
        if options["temperature" if options["do_sample"] else "do_sample"]:
            run = rounds.run

            def fail():
                yield next(run())
                raise ValueError("`target` gave logits that are no numbers.")

            rounds.run = fail
        return rounds

    broken.start = start
    with (
        running(broken) as (address, engine),
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError, match="logits that are no numbers"):
            client.completions.create(model="tiny", prompt="a dog", max_tokens=40)
        with pytest.raises(openai.APIError, match="logits that are no numbers"):
            list(client.completions.create(model="tiny", prompt="a", max_tokens=40, stream=True))
        made = client.completions.create(model="tiny", prompt="a", max_tokens=4, temperature=0)
        assert made.choices[0].text == alone(broken, "a", 4)[0]
        assert engine.state()["failed"] == 2


def test_a_full_queue_refuses(decoder):
    engine = Engine(decoder, queue=1, window=0.5)
    try:
        job = Job([[1]], None, 1, Settings(), lambda event: None)
        other = Job([[1]], None, 1, Settings(), lambda event: None)
        assert engine.submit(job)
        assert not engine.submit(other)
    finally:
        engine.close()
    with pytest.raises(RuntimeError, match="the engine has been closed"):
        engine.submit(job)


def test_requests_that_arrive_together_share_a_batch(decoder):
    """As far as the longest prompt leaves room for the longest text."""
    begun, texts = [], {}
    start = decoder.start

    def note(**options):
        begun.append(len(options["input_ids"]))
        return start(**options)

    decoder.start = note
    engine = Engine(decoder, rows=8, window=0.3)
    try:
        done = threading.Semaphore(0)

        def ask(key, prompt, limit, greedy=0.0):
            def deliver(piece):
                texts[key] = texts.get(key, "") + piece.text
                if piece.finish:
                    done.release()

            rows = [decoder.target_tokenizer(prompt).input_ids]
            engine.submit(Job(rows, None, limit, Settings(temperature=greedy), deliver))

        ask("short", "a dog", 250)
        ask("long", "a mat " * 40, 5)
        ask("too", "the cat", 9)
        ask("sampled", "the cat", 4, 1.0)
        for _ in range(4):
            assert done.acquire(timeout=60)
    finally:
        engine.close()
        del decoder.start
    assert sorted(begun) == [1, 1, 2]
    for key, prompt, limit in (("short", "a dog", 250), ("long", "a mat " * 40, 5)):
        assert texts[key] == alone(decoder, prompt, limit)[0]
    assert texts["too"] == alone(decoder, "the cat", 9)[0]


def test_closing_tells_those_who_wait(decoder):
    events = []
    engine = Engine(decoder, window=0.2)
    engine.submit(Job([[5]], None, 9, Settings(), events.append))
    engine.close()
    assert events[-1].message == "the server is shutting down"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "`rows` must be 1 or more; got 0"),
        ({"queue": 0}, "`queue` must be 1 or more; got 0"),
        ({"window": -1.0}, "`window` must be 0 or more seconds; got -1.0"),
    ],
)
def test_an_engine_checks_its_settings(decoder, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(decoder, **options)


@settings(max_examples=60, deadline=None)
@given(
    st.text("abc", max_size=14),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(1, 4), min_size=14, max_size=14),
    st.integers(1, 14),
)
def test_a_transcript_is_cut_where_the_whole_text_is(text, stops, steps, limit):
    """Against the whole text cut at once; each character is a token, however they arrive."""
    made = Transcript(lambda ids, ended: "".join(map(chr, ids)), frozenset(), limit, stops)
    pieces, count = [], 0
    for step in steps:
        count = min(count + step, len(text))
        ended = count == len(text)
        pieces.append(made.update([ord(c) for c in text[:count]], ended))
        if ended:
            break
    taken = text[:limit]
    cuts = [taken.index(stop) for stop in stops if stop in taken]
    assert "".join(pieces) == (taken[: min(cuts)] if cuts else taken)
    assert made.finish == ("stop" if cuts else "length")
    if cuts:  # no token is counted behind the one that completes a stop string first
        first = min(i for i in range(1, limit + 1) if any(s in taken[:i] for s in stops))
        assert made.count == first


def test_the_command_serves(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hetero_sd", "serve", "--small-target", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if "running on" in line:
                    break
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-") as client:
                (model,) = client.models.list()
                asked = {"model": model.id, "temperature": 0, "max_tokens": 5}
                made = client.chat.completions.create(
                    **asked, messages=[{"role": "user", "content": "What is bread?"}]
                )
                assert made.usage.completion_tokens <= 5
        finally:
            process.terminate()
            process.communicate(timeout=60)


def test_async_clients(server, decoder):
    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="-") as client:
            asked = {"model": "tiny", "temperature": 0, "max_tokens": 6}
            return await asyncio.gather(
                *(client.completions.create(prompt=prompt, **asked) for prompt in PROMPTS)
            )

    made = asyncio.run(all_at_once())
    assert [m.choices[0].text for m in made] == [alone(decoder, p, 6)[0] for p in PROMPTS]
