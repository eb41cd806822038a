"""Probabilities of a prompt's own tokens, and several answers to a request: what evaluation harnesses ask for."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4lite.base.errors import ModelError
from glm4lite.engine.decoding import Generation
from glm4lite.engine.engine import Engine
from glm4lite.engine.prefix_pool import PrefixPool
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.scheduler import Scheduler
from glm4lite.engine.worker import EngineWorker
from glm4lite.measure.evaluate import Choice, cut_windows, evaluate
from glm4lite.model.causal_lm import SCORED_ROWS
from glm4lite.server.batch.lines import Request
from glm4lite.server.batch.local import LocalModel
from glm4lite.server.batch.running import results
from glm4lite_quant.kernels import native
from tests.glm4lite.served import Served, served

pytestmark = pytest.mark.skipif(native.backend() is None, reason=f"no native library: {native.status()}")

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
ONE = SamplingParams(temperature=0, max_new_tokens=1)
STORY = "The cat sat on the mat. What is 37 * 24? It is 888. How many miles are 12 km? " * 40


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(Engine.load("nano", quant="int8", device="cpu", parallel=3)) as running:
        yield running


@pytest.fixture(scope="module")
def engine(server: Served) -> Engine:
    return server.worker.engine


def expected(engine: Engine, ids: list[int]) -> torch.Tensor:
    """[T - 1]: of each id but the first, by the model's whole forward pass."""
    with torch.inference_mode():
        logprobs = engine.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def scored(engine: Engine, ids: list[int], first: int = 1, top: int = 0, **more: Any) -> Generation:
    made = Generation(engine.model, ids, ONE, vocab_size=engine.tokenizer.size, **more)
    made.score_prompt(first, top)
    for _ in made:
        pass
    return made


def values(generation: Generation) -> torch.Tensor:
    return torch.tensor([score.logprob for score in generation.prompt_logprobs])


# --- in the engine


@pytest.mark.parametrize("length", [2, 17, 33, 700])
def test_a_prompts_tokens_have_the_probabilities_of_a_whole_forward_pass(engine: Engine, length: int) -> None:
    ids = engine.tokenizer.ids(STORY)[:length]
    made = scored(engine, ids, top=3)
    assert [score.id for score in made.prompt_logprobs] == ids[1:]
    torch.testing.assert_close(values(made), expected(engine, ids), rtol=1e-4, atol=1e-4)
    for score in made.prompt_logprobs:
        best, *others = [value for _, value in score.top]
        assert len(others) == 2
        assert best >= max(others)
        assert best >= score.logprob
        assert (score.id, score.logprob) in score.top or score.logprob <= others[-1]


def test_of_a_long_prompt_a_few_rows_logits_exist_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, head = list[int](), engine.model.lm_head.forward

    def counted(states: torch.Tensor) -> torch.Tensor:
        rows.append(states.shape[:-1].numel())
        return head(states)

    monkeypatch.setattr(engine.model.lm_head, "forward", counted)
    ids = engine.tokenizer.ids(STORY)[:700]
    assert len(scored(engine, ids).prompt_logprobs) == 699
    assert max(rows) == SCORED_ROWS
    assert sum(rows) == 700


def test_kept_prefixes_serve_a_prompt_that_is_scored_up_to_its_first_score(engine: Engine) -> None:
    ids = engine.tokenizer.ids(STORY)[:90]
    scheduler = Scheduler(engine.model, PrefixPool(engine.model))
    list(Generation(engine.model, ids, ONE, scheduler=scheduler))
    half = scored(engine, ids, first=60, scheduler=scheduler)
    whole = scored(engine, ids, scheduler=scheduler)
    assert (half.prefilled_tokens, whole.prefilled_tokens) == (90 - 59, 90)
    torch.testing.assert_close(values(whole), expected(engine, ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values(half), values(whole)[59:])


def test_scores_are_the_same_beside_others_and_after_giving_way_to_them(engine: Engine) -> None:
    ids = engine.tokenizer.ids(STORY)
    asked = [ids[begin : begin + 150] for begin in (0, 40, 90)]
    wanted = [values(scored(engine, one)) for one in asked]
    room = PrefixPool(engine.model).bytes_of(448)  # two begin, and do not both come to their end
    for memory in (None, room):
        scheduler = Scheduler(engine.model, PrefixPool(engine.model, memory), parallel=3)
        made = [Generation(engine.model, one, SamplingParams(max_new_tokens=70), scheduler=scheduler) for one in asked]
        for one in made:
            one.score_prompt()
            one.begin()
        for one, want in zip(made, wanted, strict=True):
            list(one)
            assert torch.equal(values(one), want)
        assert bool(scheduler.preempted) == (memory is not None)


def test_a_step_that_fails_and_is_made_again_scores_no_token_twice(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, step, failures = engine.tokenizer.ids(STORY)[:120], engine.model.step, [1]
    scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=3)

    def failing(spans: Any) -> Any:
        made = step(spans)
        if len(spans) > 1 and failures:
            failures.pop()
            raise RuntimeError("only together")
        return made

    monkeypatch.setattr(engine.model, "step", failing)
    going_on = SamplingParams(max_new_tokens=30, ignore_eos=True)
    other = Generation(engine.model, ids[:20], going_on, scheduler=scheduler)
    other.begin()
    reading = iter(other)
    assert len([next(reading) for _ in range(3)]) == 3
    made = scored(engine, ids, scheduler=scheduler)
    assert not failures
    torch.testing.assert_close(values(made), expected(engine, ids), rtol=1e-4, atol=1e-4)


def test_scores_that_are_no_numbers_are_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    head = engine.model.lm_head.forward
    monkeypatch.setattr(engine.model.lm_head, "forward", lambda states: head(states) * float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        scored(engine, engine.tokenizer.ids(STORY)[:40])


def test_a_text_is_scored_from_python(engine: Engine) -> None:
    prefix, ids = engine.tokenizer.prefix_ids, engine.tokenizer.ids("The cat sat on the mat.")
    assert prefix
    got = engine.score("The cat sat on the mat.", top=2)
    assert [score.id for score in got] == ids
    want = expected(engine, prefix + ids)[len(prefix) - 1 :]
    torch.testing.assert_close(torch.tensor([score.logprob for score in got]), want, rtol=1e-4, atol=1e-4)
    assert [score.id for score in engine.score(prefix + ids)] == [*prefix, *ids][1:]


# --- lm-eval's local-completions


def loglikelihoods(server: Served, prompts: Any, context_lengths: list[int]) -> list[tuple[float, bool]]:
    """What lm-eval's LocalCompletionsAPI sends, and how it reads the answer."""
    asked = {"model": "nano", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    answer = server.post(TEXT, {**asked, "echo": True})
    assert answer.status_code == 200, answer.text
    found = []
    for choice, length in zip(sorted(answer.json()["choices"], key=itemgetter("index")), context_lengths, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        greedy = all(one == max(top.values()) for one, top in zip(logprobs, tops, strict=True))
        found.append((sum(logprobs), greedy))
    return found


def test_loglikelihoods_are_those_of_eval_on_the_same_text(server: Served, engine: Engine, tmp_path: Path) -> None:
    windows = cut_windows(engine, STORY)
    scored_tokens = [len(ids) - len(ids) // 2 for ids in windows]
    got = loglikelihoods(server, windows, [len(ids) // 2 for ids in windows])
    perplexity = math.exp(-sum(value for value, _ in got) / sum(scored_tokens))
    evaluation = evaluate(Choice("nano", "int8"), STORY)
    assert (evaluation.windows, evaluation.scored_tokens) == (len(windows), sum(scored_tokens))
    assert perplexity == pytest.approx(evaluation.perplexity, rel=1e-4)


@pytest.mark.parametrize("tokenized", [True, False])
def test_loglikelihoods_of_continuations_are_those_of_the_text_from_python(
    server: Served, engine: Engine, tokenized: bool
) -> None:
    context, right, wrong = "The cat sat on the", " mat", " 888"
    texts = [context + right, context + wrong]
    prompts: Any = [engine.tokenizer.prefix_ids + engine.tokenizer.ids(text) for text in texts] if tokenized else texts
    begin = len(engine.tokenizer.prefix_ids) * tokenized + len(engine.tokenizer.ids(context))
    for (value, _), text in zip(loglikelihoods(server, prompts, [begin, begin]), texts, strict=True):
        of_text = [score.logprob for score in engine.score(text)]
        assert value == pytest.approx(sum(of_text[len(engine.tokenizer.ids(context)) :]), rel=1e-5)


def test_what_the_model_would_say_itself_is_greedy(server: Served, engine: Engine) -> None:
    prompt = engine.tokenizer.prefix_ids + engine.tokenizer.ids("The cat sat on the mat. The")
    said = list(engine.generate(prompt, SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)))
    other = [*said[:-1], (said[-1] + 1) % engine.tokenizer.size]
    lengths = [len(prompt)] * 2
    assert [greedy for _, greedy in loglikelihoods(server, [prompt + said, prompt + other], lengths)] == [True, False]


# --- echo


def completion(server: Served, **fields: Any) -> Any:
    answer = server.post(TEXT, {"model": "nano", "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_echo_is_the_prompt_before_the_text_with_and_without_probabilities(server: Served, engine: Engine) -> None:
    plain = completion(server, prompt="The cat", max_tokens=5, logprobs=2)["choices"][0]
    for logprobs in (None, 0, 2):
        answer = completion(server, prompt="The cat", max_tokens=5, echo=True, logprobs=logprobs)
        choice = answer["choices"][0]
        assert choice["text"] == "The cat" + plain["text"]
        assert answer["usage"]["completion_tokens"] == 5
        if logprobs is None:
            assert choice["logprobs"] is None
            continue
        found, prompt = choice["logprobs"], engine.tokenizer.ids("The cat")
        assert "".join(found["tokens"]) == choice["text"]
        assert found["tokens"][len(prompt) :] == plain["logprobs"]["tokens"]
        assert [len(choice["text"][:offset]) for offset in found["text_offset"]] == found["text_offset"]
        assert all(value is not None for value in found["token_logprobs"])  # behind the model's own prefix
        assert {len(top) for top in found["top_logprobs"]} == {logprobs}


def test_the_first_id_of_a_prompt_of_ids_has_no_probability(server: Served, engine: Engine) -> None:
    ids = engine.tokenizer.prefix_ids + engine.tokenizer.ids("The cat")
    choice = completion(server, prompt=ids, max_tokens=0, echo=True, logprobs=1)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == engine.tokenizer.text(ids, keep_special=True) == "".join(found["tokens"])
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    assert len(found["token_logprobs"]) == len(ids)
    assert all(value <= 0 for value in found["token_logprobs"][1:])


def test_no_tokens_beside_an_echo_are_none(server: Served) -> None:
    answer = completion(server, prompt="The cat", max_tokens=0, echo=True)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("The cat", "length")
    assert answer["usage"]["completion_tokens"] == 0


def test_a_streamed_echo_comes_first(server: Served) -> None:
    whole = completion(server, prompt="The cat", max_tokens=4, echo=True, logprobs=1)["choices"][0]
    create = server.client.completions.create
    chunks = list(
        create(model="nano", prompt="The cat", max_tokens=4, temperature=0, echo=True, logprobs=1, stream=True)
    )
    assert chunks[0].choices[0].text == "The cat"
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole["text"]
    streamed = [v for c in chunks if c.choices[0].logprobs for v in c.choices[0].logprobs.token_logprobs or []]
    assert streamed == whole["logprobs"]["token_logprobs"]


# --- several prompts, several answers


def test_prompts_of_one_request_are_answered_as_alone_and_in_order(server: Served, engine: Engine) -> None:
    texts = ["The cat", "What is 37 * 24", "One two three four", "miles", "The cat sat on the mat. The cat"]
    ids = [engine.tokenizer.prefix_ids + engine.tokenizer.ids(text) for text in texts]
    alone = [completion(server, prompt=text, max_tokens=7) for text in texts]
    for prompts in (texts, ids):
        together = completion(server, prompt=prompts, max_tokens=7)
        assert [choice["index"] for choice in together["choices"]] == list(range(5))
        assert [choice["text"] for choice in together["choices"]] == [one["choices"][0]["text"] for one in alone]
        for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert together["usage"][count] == sum(one["usage"][count] for one in alone)


def test_n_answers_share_the_prompt_and_draw_by_seeds_of_their_own(server: Served) -> None:
    more: dict[str, Any] = {"temperature": 1.5, "top_p": 1.0, "max_tokens": 6}
    prompt = STORY[:900]
    single = [completion(server, prompt=prompt, seed=seed, **more) for seed in (5, 6, 7, 8)]
    assert len({one["choices"][0]["text"] for one in single}) > 1
    again = completion(server, prompt=prompt, seed=5, n=4, **more)
    assert [choice["text"] for choice in again["choices"]] == [one["choices"][0]["text"] for one in single]
    assert again["usage"]["prompt_tokens"] == single[0]["usage"]["prompt_tokens"]
    assert again["usage"]["completion_tokens"] == sum(one["usage"]["completion_tokens"] for one in single)


def test_a_prompt_that_several_answers_share_is_computed_once(engine: Engine) -> None:
    ids = engine.tokenizer.ids(STORY)[:640]
    scheduler = Scheduler(engine.model, PrefixPool(engine.model), parallel=4)
    made = [Generation(engine.model, ids, SamplingParams(max_new_tokens=4), scheduler=scheduler) for _ in range(4)]
    for one in made:
        one.begin()
    for one in made:
        list(one)
    assert sorted(one.prefilled_tokens for one in made) == [1, 1, 1, 640]


def test_a_chat_gives_n_answers_whole_and_streamed(server: Served) -> None:
    options: Any = {"n": 3, "temperature": 2.0, "top_p": 1.0, "seed": 11, "max_tokens": 8}
    whole = server.chat("sdlkfj woeirj", **options)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    alone = [server.chat("sdlkfj woeirj", **{**options, "n": 1, "seed": 11 + number}) for number in range(3)]
    assert texts == [one.choices[0].message.content for one in alone]
    streamed, roles, reasons = ["", "", ""], ["", "", ""], ["", "", ""]
    chunks = list(server.chat("sdlkfj woeirj", **options, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role or ""
        reasons[choice.index] += choice.finish_reason or ""
    assert (streamed, roles) == (texts, ["assistant"] * 3)
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_best_of_several_are_given_best_first(server: Served) -> None:
    options: dict[str, Any] = {"prompt": ["The cat", "One two"], "temperature": 1.6, "top_p": 1.0, "seed": 3}
    options |= {"max_tokens": 6}

    def mean(choice: Any) -> float:
        values = choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
        return sum(values) / len(values) if values else -math.inf

    all_of_them = completion(server, **options, n=5, logprobs=0)["choices"]
    best = completion(server, **options, n=2, best_of=5)
    for prompt in (0, 1):
        likeliest = sorted(all_of_them[5 * prompt : 5 * prompt + 5], key=mean, reverse=True)[:2]
        given = best["choices"][2 * prompt : 2 * prompt + 2]
        assert [one["text"] for one in given] == [one["text"] for one in likeliest]
        assert [one["logprobs"] for one in given] == [None, None]
    assert [one["index"] for one in best["choices"]] == [0, 1, 2, 3]
    counted = completion(server, **options, n=5)["usage"]
    assert best["usage"]["completion_tokens"] == counted["completion_tokens"]  # all that were computed


def test_a_batch_file_gives_several_answers_too(engine: Engine) -> None:
    body = {"model": "nano", "prompt": ["The cat", "One two"], "n": 2, "max_tokens": 3, "seed": 1}
    line = {"custom_id": "a", "method": "POST", "url": TEXT, "body": body}
    worker = EngineWorker(engine)
    try:
        [result] = results(LocalModel(worker, "nano", 2), [Request("a", line)])
    finally:
        worker.close()
    assert [choice["index"] for choice in result.line["response"]["body"]["choices"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (TEXT, {"best_of": 1, "n": 2}, "best_of"),
        (TEXT, {"best_of": 3, "stream": True}, "best_of"),
        (TEXT, {"n": 129}, "n"),
        (TEXT, {"prompt": ["a"] * 2049}, "prompt"),
        (TEXT, {"prompt": ["a"] * 1000, "n": 5}, "prompt"),
        (TEXT, {"prompt": [[5, 6], [10**7]]}, "prompt[1]"),
        (TEXT, {"prompt": [[5, 6], []]}, "prompt[1]"),
        (TEXT, {"prompt": ["a", [5]]}, "prompt"),
        (TEXT, {"max_tokens": 0}, "max_tokens"),
        (TEXT, {"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        (TEXT, {"logprobs": 21}, "logprobs"),
        (CHAT, {"best_of": 2}, "best_of"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"prompt": "a"}, "prompt"),
        (TEXT, {"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools"),
        (TEXT, {"reasoning_effort": "low"}, "reasoning_effort"),
        (TEXT, {"top_logprobs": 2}, "top_logprobs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_answered_is_refused_by_name(
    server: Served, path: str, fields: dict[str, Any], param: str
) -> None:
    own = {"prompt": "a"} if path == TEXT else {"messages": [{"role": "user", "content": "a"}]}
    answer = server.post(path, {"model": "nano", **own, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


def test_a_client_that_leaves_stops_all_its_answers(server: Served) -> None:
    before = server.worker.state()
    body = {"model": "nano", "prompt": ["The cat", "One two"], "n": 8, "max_tokens": 2000, "ignore_eos": True}
    with server.http.stream("POST", TEXT, json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
    ended = threading.Event()
    for _ in range(200):
        state = server.worker.state()
        if not state.running and state.cancelled > before.cancelled:
            ended.set()
            break
        threading.Event().wait(0.05)
    assert ended.is_set()
    assert not server.worker.engine.scheduler.busy
