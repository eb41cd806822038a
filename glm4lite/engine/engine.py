"""Engine: a loaded model with what turns text into ids and back. Sessions and completions are built on one."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glm4lite.base.errors import CheckpointError, ConfigError, NoModel, SamplingError, TemplateError, shown
from glm4lite.base.events import Done, Progress
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.checkpoint.lora.folder import Loras
from glm4lite.checkpoint.quant_choice import AUTO
from glm4lite.engine.constraint import Constraint, Grammars
from glm4lite.engine.decoding import Generation
from glm4lite.engine.draft_model import DraftModel
from glm4lite.engine.kept_prefixes import KeptPrefixes, wanted_size
from glm4lite.engine.prefix_files import PrefixFolder
from glm4lite.engine.prefix_pool import PrefixPool
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.scheduler import PARALLEL, Scheduler
from glm4lite.engine.sequence import TokenLogprobs
from glm4lite.engine.speculation import MOST, Speculation, longest_guess
from glm4lite.engine.stop_ids import stop_ids
from glm4lite.engine.thinking_budget import ThinkingBudget
from glm4lite.model.causal_lm import CausalLM
from glm4lite.model.layers import DecoderLayer
from glm4lite.model.lora import adapters_in
from glm4lite.runtime import cuda_graph
from glm4lite.runtime.kv_pool import serves
from glm4lite.text.grammar import AnswerForm
from glm4lite.text.messages import Message
from glm4lite.text.stop_strings import StopStrings
from glm4lite.text.template import ChatTemplate
from glm4lite.text.tokenization.streaming import StreamingDetokenizer
from glm4lite.text.tokenizer import Tokenizer
from glm4lite_quant import QuantLinear
from glm4lite_quant.kernels import native

if TYPE_CHECKING:
    from glm4lite.checkpoint.formats.format import Quant
    from glm4lite.loading.load_options import LoadOptions
    from glm4lite.pretrained.models import Glm4ForCausalLM

logger = logging.getLogger("glm4lite")

MOST_PARALLEL = 64
LARGE = 4 << 30  # bytes of a checkpoint that is worth quantizing once

# The token between two calls of one output.
SEPARATOR = "<|assistant|>"
_AHEAD = 4  # prompts that are taken for each that is computed


@dataclass(frozen=True)
class Generated:
    """One answer of many."""

    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int


@dataclass(eq=False, repr=False)  # another model is another engine, and one without a model can be told of, too
class Engine:
    """A model, its tokenizer, its chat template (None: a base model) and its generation_config.json.

        engine = Engine.load("nano")
        session, other = ChatSession(engine), ChatSession(engine, system="Answer in one word.")

    What was computed for the last prompts is kept in `prefixes`, whoever asked; `totals` counts all that was generated.
    Up to `parallel` answers are computed together by `scheduler`, whichever threads they are read in.
    """

    model: Glm4ForCausalLM
    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)
    parallel: int = PARALLEL

    def __post_init__(self) -> None:
        if not 1 <= self.parallel <= MOST_PARALLEL:
            raise ConfigError(f"parallel is {self.parallel}; from 1 to {MOST_PARALLEL} answers can be computed at once")
        self.scheduler = Scheduler(self.model, PrefixPool(self.model), self.parallel)
        self.totals = Totals()
        self._grammars: Grammars | None = None

    def speculate(self, how: str | int = "auto") -> None:
        """Whether ids are guessed and verified together (see `glm4lite.engine.speculation`): "off"; the most ids of a
        guess, 1 to 15; "auto": 15 where a row has the same bits in any step, which is where the native kernels compute
        all layers and the head. There answers are what they are without; elsewhere sums are rounded otherwise, and two
        ids that are nearly as likely may change places.

        Raises ConfigError for anything else.
        """
        most = longest_guess(how, MOST if _computed_natively(self.model) else 0)
        self.scheduler.speculation = Speculation(most) if most else None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the LoRA adapters that an answer may be computed with (`SamplingParams.adapter`)."""
        return self.model.model.adapters

    @property
    def prefixes(self) -> PrefixPool:
        """What was computed for the last prompts."""
        if (pool := self.scheduler.prefixes) is None:
            raise NoModel
        return pool

    @prefixes.setter
    def prefixes(self, pool: PrefixPool) -> None:
        self.scheduler.prefixes = pool

    @classmethod
    def load(
        cls,
        source: str | Path = "nano",
        quant: str | Quant | None = "auto",
        device: str = "auto",
        dtype: str = "auto",
        progress: Callable[[Progress], None] | None = None,
        need_template: bool = False,
        kv: str = "auto",
        gpu_memory: int | str | None = None,
        ram: int | str | None = None,
        context: int | str | None = None,
        before_weights: Callable[[], None] | None = None,
        speculate: str | int = "auto",
        parallel: int | None = None,
        draft: str | Path | None = None,
        keep_prefixes: bool | int | str | None = None,
        lora: str | Path | Sequence[str | Path] | None = None,
        lora_modules: Sequence[str] | None = None,
    ) -> Engine:
        """Arguments as `glm4lite.load`; quant "auto" is int4, or as the checkpoint is stored if that is quantized.

        `speculate`: as the method. `parallel`: answers computed at once; None: 4, or 1 where layers lie on a GPU on
        which no graph can be recorded. `draft`: a smaller model with the same vocabulary, which guesses what this
        one will say (`glm4lite.engine.draft_model`); it is loaded first, and a limit on RAM counts it.
        `keep_prefixes`: what was computed for prompts is also written to a folder, of at most so many bytes (True: 4
        GiB; or a text such as "8GiB"), and read from there by the next process.

        `lora`: adapters that are always on. `lora_modules`: "NAME=FOLDER", of which an answer may take one
        (`SamplingParams.adapter`); they are computed beside the weights, whatever those are.

        `before_weights` is called once all that is cheap to check was right: the time to unload another model.

        What is cheap to check (tokenizer, template) is read before the weights. Raises TemplateError where a chat
        template is needed and there is none.
        """
        from glm4lite.loading.load_options import LoadOptions
        from glm4lite.memory.budget import Budget

        budget = Budget.of(gpu_memory, ram, context, kv)
        options = LoadOptions(quant, device, dtype, progress, budget=budget, loras=Loras.of(lora, lora_modules))
        return cls.from_options(
            source, options, need_template, before_weights, speculate, parallel, draft, keep_prefixes
        )

    @classmethod
    def from_options(
        cls,
        source: str | Path,
        options: LoadOptions,
        need_template: bool = False,
        before_weights: Callable[[], None] | None = None,
        speculate: str | int = "auto",
        parallel: int | None = None,
        draft: str | Path | None = None,
        keep_prefixes: bool | int | str | None = None,
    ) -> Engine:
        """`load` for callers that hold all they ask of it as one value, its limits as one `Budget`."""
        from glm4lite.checkpoint.prepare import opened
        from glm4lite.checkpoint.quant_choice import chosen
        from glm4lite.loading.loader import load_checkpoint
        from glm4lite.pretrained.models import Glm4ForCausalLM

        longest_guess(speculate)
        size = wanted_size(keep_prefixes)
        prefixes = None if size is None else PrefixFolder(size=size)
        checkpoint = opened(source, options.progress)
        folder = checkpoint.folder
        tokenizer, template = Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder)
        if need_template:
            _required(template)
        _check_companions(tokenizer, checkpoint)
        if chosen(checkpoint, options.quant) == "int4" and sum(map(checkpoint.nbytes, checkpoint.names())) > LARGE:
            logger.warning("calibrating and quantizing takes minutes at each start; `glm4lite quantize` does it once")
        if before_weights is not None:
            before_weights()
        guesser = None
        if draft is not None:
            small, options = _draft_of(tokenizer, draft, options)
            guesser = DraftModel(small)  # now: what its cache takes of a GPU is no room for the large one
        model, _ = load_checkpoint(Glm4ForCausalLM, checkpoint, options, str(folder))
        engine = cls(model, tokenizer, template, checkpoint.generation_config, parallel or _usual_parallel(model))
        engine.speculate(speculate)
        if prefixes is not None:
            engine.prefixes.disk = KeptPrefixes.of(model, source, checkpoint, prefixes)
        if guesser is not None and draft is not None:
            engine.scheduler.draft = guesser
            engine.scheduler.speculation = engine.scheduler.speculation or Speculation()
            if prefixes is not None:
                guesser.prefixes.disk = KeptPrefixes.of(guesser.model, draft, opened(draft), prefixes)
        return engine

    def unload(self) -> None:
        """Gives the model's memory back; whoever asks this engine for `model` or `prefixes` from now on gets NoModel.

        Tokenizer, template and settings stay, which take little.
        """
        from glm4lite.memory.system import give_back

        if self.loaded:
            for owner in (self.scheduler, self.scheduler.draft):
                if owner is not None and owner.prefixes is not None:
                    owner.prefixes.close()
            self.scheduler.wake = None  # whoever still reads an answer makes the steps himself
            del self.model, self.scheduler
            give_back()

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return "model" in vars(self)

    if not TYPE_CHECKING:  # a checker would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            if name in ("model", "scheduler", "prefixes"):
                raise NoModel
            raise AttributeError(f"an Engine has no {name!r}")

    def chat_template(self) -> ChatTemplate:
        """The template; TemplateError for a base model, which has none."""
        return _required(self.template)

    def params(self, **sampling: Any) -> SamplingParams:
        """The checkpoint's sampling defaults; fields that are given and not None win over them.

        Raises SamplingError for values that cannot be, and for ids that the tokenizer does not know.
        """
        params = SamplingParams.from_generation_config(self.generation_config, **sampling)
        params.check_vocabulary(self.tokenizer.size)
        return params

    def constraint(self, form: AnswerForm) -> Constraint | None:
        """What holds an answer to that form; None where it may be any text. Raises SchemaError where nothing can.

        With a vocabulary that is not byte-level, calls that a model need not make are not held to their schemas.
        """
        strict = form.schema is not None or form.must_call or any(tool.strict for tool in form.tools)
        if not form.bound or not (strict or self.tokenizer.byte_level):
            return None
        if self._grammars is None:
            stops = stop_ids(self.model.config, self.generation_config, self.tokenizer)
            self._grammars = Grammars(self.tokenizer, stops, self.tokenizer.special.get(SEPARATOR))
        return self._grammars.constraint(form)

    def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        cancel: threading.Event | None = None,
    ) -> Generation:
        """A Generation with this model's stop ids and those of `params`, over the kept prefix that suits it.

        A thought that reaches `params.thinking_budget` is ended. Ids the tokenizer does not know are never drawn.
        Raises ContextLengthError, and SamplingError for ids in `params` that the tokenizer does not know.
        """
        params.check_vocabulary(self.tokenizer.size)
        if params.adapter is not None and params.adapter not in self.adapters:
            known = f"it has {' and '.join(self.adapters)}" if self.adapters else "it was loaded with none to choose"
            raise SamplingError(f"adapter: the model has no {shown(params.adapter)}; {known}")
        stops = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stops |= stop_ids(self.model.config, self.generation_config, self.tokenizer)
        generation = Generation(
            self.model,
            prompt,
            params,
            stops,
            self.tokenizer.size,
            cancel=cancel,
            speculation=self.scheduler.speculation,
            scheduler=self.scheduler,
        )
        if params.thinking_budget is not None:
            generation.replacement = ThinkingBudget(self.tokenizer, prompt, params.thinking_budget)
        return generation

    def prefill(self, generation: Generation) -> Generator[Progress]:
        """Computes the prompt; reports progress where it takes more than one chunk.

        What was computed is kept where it ends early, by an error or because nobody waits any more.
        """
        try:
            for done, total in generation.prefill():
                if total > self.model.chunk:
                    yield Progress("prefill", done, total, "tokens")
        except BaseException:
            generation.close()
            self.totals.add(generation)
            raise

    def pieces(self, generation: Generation) -> Iterator[str | None]:
        """The output as text as it comes, cut at stop texts; None where the separator token stood."""
        try:
            yield from self._pieces(generation)
        finally:
            generation.close()
            self.totals.add(generation)

    def score(self, text: str | list[int], top: int = 0) -> list[TokenLogprobs]:
        """The log probability of each token of a text behind those before it, with those of the `top` likeliest ones.

        A text stands behind the model's prefix; of ids the first is not scored. A long text is computed in parts, and
        of no more than 32 tokens all logits are in memory. Raises ContextLengthError.
        """
        prefix = self.tokenizer.prefix_ids if isinstance(text, str) else []
        ids = prefix + (self.tokenizer.ids(text) if isinstance(text, str) else text)
        generation = self.generate(ids, self.params(max_new_tokens=1))
        generation.score_prompt(len(prefix), top)
        for _ in self.prefill(generation):
            pass
        generation.close()
        self.totals.add(generation)
        return generation.prompt_logprobs

    def generate_many(
        self, prompts: Iterable[str | Sequence[Message | Mapping[str, Any]]], **sampling: Any
    ) -> Iterator[Generated]:
        """Answers to many prompts, in their order, `parallel` of them computed at once.

        A prompt is a text to go on from, or the messages of a conversation to answer (`Message`, or its dict).
        `sampling` are fields of SamplingParams, None where the checkpoint decides. Closing the iterator stops what is
        computed.

        Raises ContextLengthError, SamplingError and TemplateError (a conversation, for a base model), when it comes to
        the prompt that is wrong.
        """
        cancel, params = threading.Event(), self.params(**sampling)

        def answer(prompt: str | Sequence[Message | Mapping[str, Any]]) -> Generated:
            if isinstance(prompt, str):
                ids = self.tokenizer.prefix_ids + self.tokenizer.ids(prompt)
            else:
                messages = [one if isinstance(one, Message) else Message.from_dict(one) for one in prompt]
                ids = self.chat_template().encode(self.tokenizer, messages)
            generation = self.generate(ids, params, cancel)
            text = "".join(SEPARATOR if piece is None else piece for piece in self.pieces(generation))
            if not isinstance(prompt, str):
                text = text.removeprefix("\n")  # GLM starts every answer with it
            return Generated(text, generation.finish_reason, len(ids), generation.new_tokens)

        threads = ThreadPoolExecutor(self.parallel, "many")
        ahead: deque[Future[Generated]] = deque()
        try:
            for prompt in prompts:
                ahead.append(threads.submit(answer, prompt))
                if len(ahead) > _AHEAD * self.parallel:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            cancel.set()
            threads.shutdown(cancel_futures=True)

    def _pieces(self, generation: Generation) -> Iterator[str | None]:
        stops, detokenizer = StopStrings(generation.params.stop), StreamingDetokenizer(self.tokenizer)
        separator = self.tokenizer.special.get(SEPARATOR)
        for token in generation:
            if token == separator:
                yield stops.feed(detokenizer.finish()) + stops.finish()
                yield None
                detokenizer = StreamingDetokenizer(self.tokenizer)
                continue
            early = len(generation.ids) <= generation.params.min_new_tokens
            if early or generation.is_replaced:  # what the model did not say holds no stop text, and ends none
                yield stops.finish() + detokenizer.add(token)
                continue
            yield stops.feed(detokenizer.add(token))
            if stops.found is not None:
                generation.finish_reason, generation.stop_text = "stop", stops.found
                return
        yield stops.feed(detokenizer.finish()) + stops.finish()


def _draft_of(tokenizer: Tokenizer, source: str | Path, options: LoadOptions) -> tuple[CausalLM, LoadOptions]:
    """The small model, and what is left for the large one."""
    from glm4lite.checkpoint.prepare import opened
    from glm4lite.loading.loader import load_checkpoint
    from glm4lite.pretrained.models import Glm4ForCausalLM

    checkpoint = opened(source, options.progress)
    if Tokenizer.from_folder(checkpoint.folder).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"the draft model {source} has another vocabulary; use a smaller model of the same family")
    model, _ = load_checkpoint(
        Glm4ForCausalLM, checkpoint, replace(options, quant=AUTO, loras=Loras(), aim=None), str(checkpoint.folder)
    )
    budget, aim = options.budget, options.aim
    taken = model.get_memory_footprint() + model.model.cache_bytes * model.context
    if budget.ram is not None:
        budget = replace(budget, ram=max(0, budget.ram - taken))
    if aim is not None and aim.fit is not None:
        aim = replace(aim, fit=max(1, aim.fit - taken))
    return model, replace(options, budget=budget, aim=aim)


def _computed_natively(model: CausalLM) -> bool:
    """Whether native kernels compute all layers and the head."""
    trunk, head = model.model, model.lm_head
    return (
        all(layer.store.fused(layer) for layer in trunk.layers if isinstance(layer, DecoderLayer))
        and trunk.dtype == torch.float32
        and isinstance(head, QuantLinear)
        and not any(adapters_in(module) for module in (head, trunk.embed_tokens))  # those are torch's sums
        and native.backend() is not None
    )


def _usual_parallel(model: CausalLM) -> int:
    """One, where layers lie on a GPU that no graph can be recorded on: each sequence would be computed by itself."""
    return PARALLEL if serves(model) or not any(cuda_graph.records(layer.device) for layer in model.model.layers) else 1


def _required(template: ChatTemplate | None) -> ChatTemplate:
    if template is None:
        raise TemplateError("no chat template: this is a base model; `glm4lite generate` continues a text with it")
    return template


def _check_companions(tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    """The files beside the weights: a wrong generation_config.json, or a tokenizer of another model, is said now."""
    from glm4lite.checkpoint.load_plan import read_config

    config = read_config(checkpoint)
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.folder / 'tokenizer.json'} has {tokenizer.size} tokens, more than the vocab_size "
            f"{config.vocab_size} of config.json; they belong to different models"
        )
    SamplingParams.from_generation_config(checkpoint.generation_config)
    stop_ids(config, checkpoint.generation_config, tokenizer)


class Totals:
    """Counts over the generations of one turn, or of an engine's life."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.prefilled_tokens = 0
        self.seconds = 0.0
        self.drafted_tokens = self.accepted_tokens = 0
        self._lock = threading.Lock()  # answers end in threads of their own

    def add(self, generation: Generation) -> None:
        with self._lock:
            self.new_tokens += generation.new_tokens
            self.prefilled_tokens += generation.prefilled_tokens
            self.seconds += generation.seconds
            self.prompt_tokens += generation.known_tokens
            if generation.drafts is not None:
                self.drafted_tokens += generation.drafts.drafted
                self.accepted_tokens += generation.drafts.accepted

    def done(self, last: Generation, finish_reason: str | None = None) -> Done:
        """The turn's last event; prompt_tokens is the length of the last prompt."""
        return self._done(len(last.prompt), finish_reason or last.finish_reason)

    def cancelled(self, prompt_tokens: int) -> Done:
        """The last event of a turn whose last generation never began."""
        return self._done(prompt_tokens, "cancelled")

    def _done(self, prompt_tokens: int, finish_reason: str) -> Done:
        speed = round(self.new_tokens / self.seconds, 2) if self.seconds else 0.0
        return Done(prompt_tokens, self.new_tokens, finish_reason, speed, self.prefilled_tokens)
