"""Generation over a kept prefix: what is computed, what stops it, what is refused before any work."""

import threading

import pytest
import torch

from glm4lite.base.errors import ContextLengthError
from glm4lite.engine.decoding import Generation
from glm4lite.engine.prefix_pool import PrefixCache
from glm4lite.engine.sampling import SamplingParams
from glm4lite.model.config import Glm4Config
from glm4lite.pretrained.models import Glm4ForCausalLM

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=20)


@pytest.fixture(scope="module")
def model() -> Glm4ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Glm4Config(
        **sizes, head_dim=8, vocab_size=64, max_position_embeddings=1500, pad_token_id=0, initializer_range=0.5
    )
    return Glm4ForCausalLM(config).eval()


def prompt(length: int = 10, seed: int = 1) -> list[int]:
    return torch.randint(1, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def uncached(model: Glm4ForCausalLM, ids: list[int], count: int, vocab_size: int = 64) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1, :vocab_size].argmax()))
    return ids[-count:]


def test_greedy_ids_equal_a_forward_without_cache(model: Glm4ForCausalLM) -> None:
    assert list(Generation(model, prompt(), GREEDY)) == uncached(model, prompt(), 20)


def test_a_long_prompt_is_computed_in_chunks_with_the_same_result(model: Glm4ForCausalLM) -> None:
    generation = Generation(model, prompt(1200), GREEDY)
    assert list(generation.prefill()) == [(512, 1200), (1024, 1200), (1200, 1200)]
    assert list(generation) == uncached(model, prompt(1200), 20)


def test_only_what_the_kept_prefix_lacks_is_prefilled(model: Glm4ForCausalLM) -> None:
    cache = PrefixCache(model.new_cache())
    first = Generation(model, prompt(50), GREEDY, cache=cache)
    answer = list(first)
    longer = [*prompt(50), *answer, 7, 8, 9]
    second = Generation(model, longer, GREEDY, cache=cache)
    assert list(second) == uncached(model, longer, 20)
    assert first.prefilled_tokens == 50
    assert second.prefilled_tokens == 4  # the answer's last id, drawn but never computed, and three new ones


def test_a_changed_history_is_computed_again_from_the_change_on(model: Glm4ForCausalLM) -> None:
    cache = PrefixCache(model.new_cache())
    list(Generation(model, prompt(50), GREEDY, cache=cache))
    changed = [*prompt(50)[:30], 1, 2, 3]
    generation = Generation(model, changed, GREEDY, cache=cache)
    assert list(generation) == uncached(model, changed, 20)
    assert generation.prefilled_tokens == 3


def test_the_same_prompt_again_computes_one_token(model: Glm4ForCausalLM) -> None:
    cache = PrefixCache(model.new_cache())
    answer = list(Generation(model, prompt(), GREEDY, cache=cache))
    again = Generation(model, prompt(), GREEDY, cache=cache)
    assert list(again) == answer
    assert again.prefilled_tokens == 1


def test_any_stop_id_ends_the_answer_and_is_not_part_of_it(model: Glm4ForCausalLM) -> None:
    ids = uncached(model, prompt(), 20)
    stop = next(token for place, token in enumerate(ids) if place > 2 and token not in ids[:place])
    generation = Generation(model, prompt(), GREEDY, stop_ids={stop, 0})
    assert list(generation) == ids[: ids.index(stop)]
    assert (generation.finish_reason, generation.stop_id) == ("stop", stop)
    assert generation.new_tokens == len(generation.ids) + 1


def test_an_answer_is_cut_at_max_new_tokens_and_says_so(model: Glm4ForCausalLM) -> None:
    generation = Generation(model, prompt(), SamplingParams(temperature=0, max_new_tokens=3))
    assert len(list(generation)) == 3
    assert generation.finish_reason == "length"


def test_ids_the_tokenizer_does_not_know_are_never_drawn(model: Glm4ForCausalLM) -> None:
    assert max(Generation(model, prompt(), GREEDY, vocab_size=20)) < 20
    assert list(Generation(model, prompt(), GREEDY, vocab_size=20)) == uncached(model, prompt(), 20, 20)


def test_cancel_ends_within_one_token(model: Glm4ForCausalLM) -> None:
    cancel = threading.Event()
    generation = Generation(model, prompt(), GREEDY, cancel=cancel)
    produced = []
    for token in generation:
        produced.append(token)
        if len(produced) == 4:
            cancel.set()
    assert len(produced) == 4
    assert generation.finish_reason == "cancelled"


def test_cancel_inside_a_prefill_chunk_leaves_a_cache_that_can_be_used(model: Glm4ForCausalLM) -> None:
    cache, cancel = PrefixCache(model.new_cache()), threading.Event()
    hook = model.model.layers[0].register_forward_hook(lambda *_: cancel.set())
    stopped = Generation(model, prompt(40), GREEDY, cache=cache, cancel=cancel)
    assert list(stopped) == []
    hook.remove()
    assert stopped.finish_reason == "cancelled"
    assert list(Generation(model, prompt(40), GREEDY, cache=cache)) == uncached(model, prompt(40), 20)


def test_an_over_long_prompt_is_refused_before_any_work(model: Glm4ForCausalLM) -> None:
    with pytest.raises(ContextLengthError, match="1500 tokens and the model's context is 1500"):
        Generation(model, prompt(1500), GREEDY)
    with pytest.raises(ContextLengthError, match="empty"):
        Generation(model, [], GREEDY)


def test_an_answer_ends_where_the_context_does(model: Glm4ForCausalLM) -> None:
    generation = Generation(model, prompt(1495), GREEDY)
    assert len(list(generation)) == 5
    assert generation.finish_reason == "length"


def test_the_same_seed_gives_the_same_ids(model: Glm4ForCausalLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_new_tokens=30)
    assert list(Generation(model, prompt(), params)) == list(Generation(model, prompt(), params))
    other = SamplingParams(temperature=1.0, seed=4, max_new_tokens=30)
    assert list(Generation(model, prompt(), params)) != list(Generation(model, prompt(), other))
