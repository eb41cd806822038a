"""`glm4lite chat`."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from glm4lite.base.errors import ConfigError, Glm4liteError
from glm4lite.cli import options
from glm4lite.cli.output import nano_remark, rendering
from glm4lite.cli.streams import InputError, is_interactive, prompt_text, streams

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from glm4lite.cli.chat.conversation import Conversation
    from glm4lite.cli.chat.keyboard import Keyboard
    from glm4lite.cli.terminal import Renderer


def chat(
    model: options.Model = "nano",
    prompt: options.Prompt = None,
    lines: options.Lines = False,
    quant: options.Quant = None,
    bits: options.Bits = None,
    fit: options.Fit = None,
    lora: options.Lora = None,
    as_json: options.Json = False,
    raw: options.Raw = False,
    no_history: options.NoHistory = False,
    system: options.System = None,
    tools: options.Tools = None,
    no_tools: options.NoTools = False,
    mcp: options.Mcp = None,
    approve: options.Approve = "ask",
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    max_new_tokens: options.MaxNewTokens = None,
    think: options.Think = None,
    repetition_penalty: options.RepetitionPenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    stop: options.Stop = None,
    schema: options.SchemaFile = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv: options.KV = "auto",
    gpu_memory: options.GpuMemory = None,
    ram: options.Ram = None,
    context: options.Context = None,
    speculate: options.Speculate = "auto",
    draft: options.Draft = None,
    keep_prefixes: options.KeepPrefixes = None,
    threads: options.Threads = None,
) -> None:
    """Chat with a model: at a terminal, or one answer to -p, to what is piped, or to both."""
    from glm4lite.checkpoint.codec_choice import Aim
    from glm4lite.cli.chat.conversation import Conversation, Source
    from glm4lite.cli.chat.loop import converse
    from glm4lite.engine.sampling import SamplingParams
    from glm4lite.loading.load_options import LoadOptions
    from glm4lite.memory.budget import Budget
    from glm4lite.tools.toolbox import Toolbox

    if lines and prompt is not None:
        raise ConfigError("--lines and -p contradict each other: each line is a turn, or all is one message")
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop": tuple(stop or ())}
    sampling |= {"max_new_tokens": max_new_tokens, "thinking_budget": options.thinking_budget(think)}
    sampling |= {"repetition_penalty": repetition_penalty, "frequency_penalty": frequency_penalty}
    sampling |= {"presence_penalty": presence_penalty}
    SamplingParams.check(**sampling)
    wanted = options.schema_of(schema)
    options.use_threads(threads)
    budget = Budget.of(gpu_memory, ram, context, kv)
    aim = Aim.of(bits, fit, budget, loads=True)
    with rendering(as_json, raw or schema is not None) as renderer, ExitStack() as open_tools:
        asked = LoadOptions(quant or "auto", device, dtype, budget=budget, loras=options.loras(lora), aim=aim)
        source = Source(model, asked, speculate, draft, keep_prefixes)
        by_hand = prompt is None and is_interactive()
        message = None if lines or by_hand else _question(prompt, renderer)
        box = open_tools.enter_context(Toolbox(tools or (), mcp or (), not no_tools, approve))
        if model == "nano":
            renderer.remark(nano_remark("chat"))
        conversation = Conversation.begin(source, renderer, box.tools, sampling, system, by_hand, wanted)
        if message is None and not as_json and is_interactive() and streams().err.isatty():
            conversation.ask_before_tools()
        if message is None:
            converse(conversation, _keyboard(conversation, no_history))
        else:
            conversation.ask(message)


def _question(prompt: str | None, renderer: Renderer) -> str:
    """The message of one answer: files that -p names are put in; what stdin holds is text."""
    from glm4lite.cli.chat.mentions import with_files

    if prompt is not None and prompt != "-":
        prompt = with_files(prompt, remark=renderer.remark)
    message = prompt_text(prompt, renderer.remark)
    if not message.strip():
        raise InputError("-p is empty: there is nothing to answer")
    return message


def _keyboard(conversation: Conversation, no_history: bool) -> Keyboard:
    from glm4lite.cli.chat import keyboard, slash_commands

    remark = conversation.renderer.remark
    history = None if no_history or not conversation.by_hand else _history_file(remark)
    return keyboard.opened(partial(slash_commands.offers, conversation), history, remark)


def _history_file(remark: Callable[[str], None]) -> Path | None:
    from glm4lite.base.user_folder import user_folder

    try:
        return user_folder() / "history"
    except Glm4liteError as error:
        remark(f"(what you type is not kept: {error})")
        return None
