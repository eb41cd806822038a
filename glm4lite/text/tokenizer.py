"""Tokenizer: as scripts written for Transformers' AutoTokenizer use it, and the safe way that glm4lite itself takes.

>>> tokenizer.encode("<|user|>"), tokenizer.ids("<|user|>")  # a special string; what somebody typed
([151336], [27, 91, 872, 91, 29])
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

import tokenizers

from glm4lite.base.errors import TokenizerError, one_line, shown, unknown_name
from glm4lite.base.files import TOKENIZER
from glm4lite.base.whole_file import write_whole
from glm4lite.gguf.companions import folder_with
from glm4lite.hub.options import HubOptions
from glm4lite.hub.sources import resolve
from glm4lite.text.template import ChatTemplate, read_sources
from glm4lite.text.tokenization import chat, refusals
from glm4lite.text.tokenization.encoder import Encoder
from glm4lite.text.tokenization.encoding import BatchEncoding
from glm4lite.text.tokenization.special_tokens import PARTS, in_vocabulary

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_COPIED = ("special_tokens_map.json", "added_tokens.json")
_SETTINGS = (
    *("padding_side", "truncation_side", "model_max_length", "model_input_names", "extra_special_tokens"),
    *("clean_up_tokenization_spaces", "split_special_tokens"),
)
_CHAT_OPTIONS = ("padding_side", "pad_to_multiple_of", "return_attention_mask")
_MOST_TEMPLATES = 4  # each is a process


class Tokenizer(Encoder):
    """The tokenizer of one checkpoint. A script changes its import from AutoTokenizer, and nothing else.

    Source: Transformers' PreTrainedTokenizerFast. What that has and this has not is refused by name.

    `ids` and `text` are the safe way: special strings (`<|user|>`) in a text stay text there, while `encode` and a call
    make special tokens of them, as in Transformers. A conversation belongs into `apply_chat_template`.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None, origin: str = TOKENIZER
    ) -> None:
        super().__init__(backend, config, origin)
        self._chat_templates: dict[str, str] | None = None  # None: not read yet
        self._processes: dict[str, ChatTemplate] = {}
        self._stored = self._settings()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **settings: Any) -> Self:
        """The tokenizer of a folder, "nano", a GGUF file, or a Hub repo, of which only the small files are downloaded
        (of one that holds GGUF alone, that file).

        settings: huggingface_hub's revision, cache_dir, token, local_files_only, force_download and subfolder; and
        attributes that are set at once, such as pad_token, padding_side, model_max_length or chat_template. None is as
        not given.

        Raises:
            HubError: there is no such folder or repo, or it cannot be downloaded.
            CheckpointError: its files cannot be used.
            TokenizerError: a setting cannot be used, or is not supported, by name.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        hub = HubOptions.taken_from(given)
        attributes = (*PARTS, *_SETTINGS, "chat_template")
        own = {name: value for name, value in given.items() if name in attributes or name.endswith("_token")}
        own = {name: value for name, value in own.items() if name not in refusals.LOADING}
        rest = {name: value for name, value in given.items() if name not in own}
        refusals.check("from_pretrained", rest, refusals.LOADING, (*attributes, *vars(hub)))
        folder = folder_with(TOKENIZER, resolve(pretrained_model_name_or_path, options=hub, weights=False))
        tokenizer = cls.from_folder(folder)
        tokenizer._check_declared()
        tokenizer.name_or_path = str(pretrained_model_name_or_path)
        for name, value in own.items():
            if name.endswith("_token"):
                tokenizer.special_tokens.parts[name] = in_vocabulary(tokenizer, name, value)
            else:
                setattr(tokenizer, name, value)
        return tokenizer

    def save_pretrained(self, save_directory: str | Path, **others: Any) -> tuple[str, ...]:
        """Writes the files as they were, changed where attributes were; AutoTokenizer reads them too.

        Returns the files' paths. Raises TokenizerError: an argument is not supported, or the folder cannot be written.
        """
        refusals.check("save_pretrained", others, refusals.SAVING, ("save_directory",))
        folder, files = Path(save_directory), self._files()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (*_COPIED, _TEMPLATE):  # an older tokenizer's, which would be read with this one
                if name not in files:
                    (folder / name).unlink(missing_ok=True)
            for name, content in files.items():
                write_whole(folder / name, content)
        except OSError as error:
            raise TokenizerError(f"{folder} cannot be written: {error.strerror or one_line(error)}") from None
        return tuple(str(folder / name) for name in files)

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The Jinja source of the chat template, or several by name; None for a base model's tokenizer."""
        sources = self._sources()
        return sources["default"] if sources.keys() == {"default"} else sources or None

    @chat_template.setter
    def chat_template(self, value: str | Mapping[str, str] | None) -> None:
        sources = {} if value is None else {"default": value} if isinstance(value, str) else value
        if not isinstance(sources, Mapping) or not all(isinstance(text, str) for text in sources.values()):
            raise TokenizerError(f"chat_template must be a Jinja template's text, found {shown(value)}")
        self._chat_templates = dict(sources)

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The source that a conversation is written with: the one given, by name or as text, else the tokenizer's.

        Raises TokenizerError where there is none.
        """
        sources = self._sources()
        if chat_template is not None:
            return sources.get(chat_template, chat_template)
        name = "tool_use" if tools is not None and "tool_use" in sources else "default"
        if name in sources:
            return sources[name]
        if sources:
            raise TokenizerError(f"there is no default chat template; name one of {', '.join(sorted(sources))}")
        raise TokenizerError(
            "this tokenizer has no chat template (that of a base model has none); give one as chat_template="
        )

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool | None = None,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """A conversation, or a list of them, as the prompt a checkpoint was trained on: ids, or (tokenize=False) text.

        One difference to Transformers: in the ids, special tokens come from the template alone. `<|user|>` in a
        message is text, and what a template looks for (`</think>`) is not found in what users and tools say. This is
        Transformers' sanitize_control_tokens=True, which is off there by default. The text is the same as there; it
        cannot tell who wrote what, so do not tokenize it.

        Args:
            conversation: messages as the template reads them (GLM: role, content, and a call's name as metadata).
            tools: functions with type hints and a docstring, or their JSON schemas.
            documents: for the template.
            chat_template: another one, by its name or as Jinja text. It runs in a process of its own, with limits.
            add_generation_prompt: the prompt ends where the assistant begins.
            continue_final_message: the prompt ends behind the last message's content (or the field named).
            padding, truncation, max_length, return_tensors: as in a call.
            return_dict: False: only the ids.
            tokenizer_kwargs: padding_side, pad_to_multiple_of and return_attention_mask.
            variables: what else the template reads, such as enable_thinking.

        Raises TokenizerError: an argument is not supported or cannot be used; TemplateError: the template fails.
        """
        if return_assistant_tokens_mask:
            raise TokenizerError("return_assistant_tokens_mask is not supported: templates do not tell who says what")
        if sanitize_control_tokens is (not tokenize):
            why = "what a message says stays text" if tokenize else "only ids tell text from control tokens"
            raise TokenizerError(f"sanitize_control_tokens={sanitize_control_tokens} is not supported: {why}")
        if continue_final_message and add_generation_prompt:
            raise TokenizerError("continue_final_message and add_generation_prompt exclude each other")
        messages, batched = chat.conversations(conversation)
        source = self.get_chat_template(chat_template, tools)
        self._check_variables(variables, source)
        given = chat.plain(variables) | {
            "tools": chat.tool_schemas(tools),
            "documents": chat.plain(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        field = "content" if continue_final_message is True else continue_final_message or None
        names = {name: text for name, text in self.special_tokens_map.items() if name not in given}
        specials = {*self.special, *names.values()} if tokenize else None
        template = self._process(source)
        prompts = [chat.rendered(template, one, given, names, field, specials) for one in messages]
        if not tokenize:
            return [text for text, _ in prompts] if batched else prompts[0][0]
        options = dict(tokenizer_kwargs or {})
        refusals.check(
            "tokenizer_kwargs", {k: v for k, v in options.items() if k not in _CHAT_OPTIONS}, {}, _CHAT_OPTIONS
        )
        multiple, side = options.get("pad_to_multiple_of"), options.get("padding_side")
        lengths = self._lengths(padding, truncation, max_length, multiple, side)
        ids = [lengths.shortened(self.ids_between(text, restore)) for text, restore in prompts]
        mask = self._by_default("attention_mask", options.get("return_attention_mask"))
        rows = lengths.filled({"input_ids": ids}, "input_ids", mask)
        values = rows if batched or return_tensors is not None else {name: row[0] for name, row in rows.items()}
        encoding = BatchEncoding(values, tensor_type=return_tensors)
        return encoding if return_dict else encoding["input_ids"]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_processes": {}}

    def _sources(self) -> dict[str, str]:
        if self._chat_templates is None:
            self._chat_templates = self._stored_templates()
        return self._chat_templates

    def _process(self, source: str) -> ChatTemplate:
        """The process that renders a source, started where there is none yet."""
        if source not in self._processes:
            while len(self._processes) >= _MOST_TEMPLATES:
                del self._processes[next(iter(self._processes))]
            self._processes[source] = ChatTemplate(source, f"chat template of {self.name_or_path or self._origin}")
        return self._processes[source]

    def _check_variables(self, variables: Mapping[str, Any], source: str) -> None:
        """A variable that no template reads is said, and one that is a misspelt argument refused."""
        known = list(inspect.signature(Tokenizer.apply_chat_template).parameters) if variables else []
        for name in variables:
            if name == "messages":
                raise TokenizerError("the messages are apply_chat_template's first argument, conversation")
            if re.search(rf"\b{re.escape(name)}\b", source):
                continue
            if get_close_matches(name, known, 1, cutoff=0.85):
                raise TokenizerError(unknown_name("apply_chat_template", name, known))
            self._say_once(f"{name} changes nothing: the chat template does not read it")

    def _check_declared(self) -> None:
        """Special tokens that tokenizer.json lacks would get ids that the model has no rows for."""
        for token in self.special_tokens.all:
            if token and self.token_id(token) is None:
                raise TokenizerError(
                    f"{self.folder}/{_CONFIG} names {shown(token)}, which tokenizer.json does not hold; "
                    "the two come from different tokenizers"
                )

    def _settings(self) -> dict[str, Any]:
        """What tokenizer_config.json says and a script can change."""
        lists = {name: list(value) for name in _SETTINGS if isinstance(value := getattr(self, name), list)}
        return {name: getattr(self, name) for name in _SETTINGS} | lists | dict(self.special_tokens.parts)

    def _files(self) -> dict[str, bytes]:
        """Name -> content of what `save_pretrained` writes."""
        names = (TOKENIZER, _CONFIG, *_COPIED, _TEMPLATE)
        files = {}
        if self.folder is not None:
            files = {name: (self.folder / name).read_bytes() for name in names if (self.folder / name).exists()}
        files.setdefault(TOKENIZER, self._backend.to_str(pretty=True).encode())
        changed = {name: value for name, value in self._settings().items() if value != self._stored.get(name)}
        config = {**self._config, **changed}
        if self._chat_templates is not None and self._chat_templates != self._stored_templates():
            files.pop(_TEMPLATE, None)
            config.pop("chat_template", None)
            changed["chat_template"] = self._chat_templates
            if self._chat_templates.keys() == {"default"}:
                files[_TEMPLATE] = self._chat_templates["default"].encode()
            elif self._chat_templates:
                found = self._chat_templates.items()
                config["chat_template"] = [{"name": name, "template": text} for name, text in found]
        if changed or _CONFIG not in files:
            files.pop(_COPIED[0], None)  # its names are in the config by now
            config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
            config = {name: value for name, value in config.items() if value is not None}
            files[_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        return files

    def _stored_templates(self) -> dict[str, str]:
        return read_sources(self.folder, self._config)[0]
