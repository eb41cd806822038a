"""Generates the conversations `nano` learns from and is measured on.

A conversation declares tools (or none) and has one to five turns, each of one kind: a request for a declared tool,
several requests at once, a follow-up ("and in Oslo?"), a request no declared tool serves, or small talk; in English or
Chinese. `held_out=True` draws the values that training never saw (nano.values.is_reserved), and outside requests whose
template is reserved.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nano.builtin import builtin_skills
from nano.toolbox import Call, Schema, Skill, Step, made_skill, phrased, pool_skill
from nano.values import Values, is_reserved, table, words

SYSTEM = (
    "You are a helpful assistant.", "You are nano. Answer briefly.", "Use the tools when they fit.", "Be polite.",
    "你是一个有用的助手。", "请简短回答。",
)  # fmt: skip


@dataclass(frozen=True)
class Dialogue:
    """Declared tools (the function objects of their schemas), an optional system message, and the turns."""

    tools: tuple[Schema, ...]
    system: str
    steps: tuple[Step, ...]


def _talk_table() -> dict[str, Any]:
    return table("smalltalk.toml")


def _listing(skills: list[Skill], chinese: bool) -> str:
    return ("、" if chinese else ", ").join(skill.name for skill in skills)


def _talk(values: Values, chinese: bool, skills: list[Skill]) -> Step:
    rng, language = values.rng, "zh" if chinese else "en"
    declared = {skill.key for skill in skills}
    intents = [
        intent for intent in _talk_table()["intent"] if intent.get("needs") is None or intent["needs"] in declared
    ]
    weights = [4 if intent["name"] in ("echo", "what_can_you_do", "name") else 1 for intent in intents]
    intent = rng.choices(intents, weights)[0]
    value = values.draw(intent["kind"], chinese) if "kind" in intent else ""
    text = rng.choice(intent[language]).format(x=value)
    if chinese:
        user = text + rng.choice(("", "", "！", "。", "？"))
    else:
        user = (text[0].upper() + text[1:] if rng.random() < 0.6 else text) + rng.choice(("", "", ".", "!", "?"))
    if intent["name"] == "echo":
        user = user.rstrip("！。？.!?") if rng.random() < 0.8 else text
        if user != text and user[1:] != text[1:]:
            user = text
    key = f"say_{language}" + ("_no_tools" if f"say_{language}_no_tools" in intent and not skills else "")
    said = intent[key] if isinstance(intent[key], list) else [intent[key]]
    answer = said[0].replace("{x}", value).replace("{tools}", _listing(skills, chinese))
    return Step(user, (), answer, (answer,), "small talk")


def _refused(values: Values, user: str, chinese: bool, skills: list[Skill]) -> Step:
    language = "zh" if chinese else "en"
    say = str(_talk_table()["outside"][f"say_{language}" + ("" if skills else "_no_tools")])
    answer = say.replace("{tools}", _listing(skills, chinese))
    return Step(user, (), answer, (answer,), "no tool fits")


def _outside(values: Values, chinese: bool, skills: list[Skill], everything: list[Skill]) -> Step:
    """A request for a tool that exists elsewhere but is not declared, or for something no tool does."""
    rng, data = values.rng, _talk_table()["outside"]
    declared = {skill.key for skill in skills}
    others = [skill for skill in everything if skill.key not in declared]
    if others and rng.random() < 0.55:
        return _refused(values, rng.choice(others).request(values, chinese).user, chinese, skills)
    # Whole templates are held out: an unseen request for something strange must be refused too.
    templates = [text for text in data["zh" if chinese else "en"] if is_reserved(text) == values.held_out]
    fill = {
        "topic": values.listed("topic"), "topic_zh": values.listed("topic_zh"), "city": values.city(False),
        "city_zh": values.city(True), "person": values.person(False), "person_zh": values.person(True),
        "land": rng.choice(data["land"].split()), "land_zh": rng.choice(data["land_zh"].split()),
        "animal": rng.choice(data["animal"].split()),
    }  # fmt: skip
    user = phrased(rng, rng.choice(templates).format(**fill), rng.random() < 0.5, chinese)
    return _refused(values, user, chinese, skills)


def _several(values: Values, chinese: bool, skills: list[Skill]) -> Step | None:
    """Two requests in one message, answered by two calls in one turn."""
    rng = values.rng
    steps = [rng.choice(skills).request(values, chinese) for _ in range(2)]
    calls = tuple(call for step in steps for call in step.calls)
    asked = {(call.name, call.arguments_json()) for call in calls}
    if any(step.category == "tool error" for step in steps) or len(asked) < len(calls):
        return None  # asked twice, a tool would say the same twice
    first, second = (step.user.strip("？?。.！! ") for step in steps)
    if chinese:
        user = first + rng.choice(("，还有", "，另外", "，再", "；")) + second + rng.choice(("？", "。", ""))
    else:
        user = (
            first
            + rng.choice((" and ", ", and ", "; ", ", also ", " and also ", ", then "))
            + second
            + rng.choice(("?", ".", ""))
        )
    answer = ("" if chinese else " ").join(step.answer for step in steps)
    return Step(user, calls, answer, tuple(fact for step in steps for fact in step.facts), "several calls")


def _declare(rng: random.Random) -> tuple[list[Skill], list[Skill]]:
    """The declared tools of one conversation, and every tool there could be."""
    builtin = builtin_skills()
    entries: list[dict[str, Any]] = table("tools.toml")["tool"]  # type: ignore[assignment]
    pool = [pool_skill(rng, entry) for entry in entries]
    roll = rng.random()
    if roll < 0.12:
        return [], builtin + pool
    if roll < 0.40:
        skills = builtin if rng.random() < 0.7 else rng.sample(builtin, 3)
        if rng.random() < 0.25:
            skills = [*skills, rng.choice(pool)]
        return list(skills), builtin + pool
    made = _made(rng)
    count = rng.choices((1, 2, 3, 4, 5), (22, 28, 28, 14, 8))[0]
    candidates = rng.sample(pool, 4) + made + (rng.sample(builtin, rng.randint(1, 3)) if rng.random() < 0.4 else [])
    rng.shuffle(candidates)
    unique: dict[str, Skill] = {}
    for skill in candidates:
        unique.setdefault(skill.name, skill)
    return list(unique.values())[:count], builtin + pool


def _made(rng: random.Random) -> list[Skill]:
    """Two or three made tools; half the time they share their verb or their thing, so that the other word decides."""
    verbs, things = (len(str(_talk_table()["made"][key]).split()) for key in ("verbs", "things"))
    verb, thing = rng.randrange(verbs), rng.randrange(things)
    made = [made_skill(rng, verb, thing)]
    for _ in range(2):
        roll = rng.random()
        if roll < 0.35:
            made.append(made_skill(rng, verb, rng.randrange(things)))
        elif roll < 0.7:
            made.append(made_skill(rng, rng.randrange(verbs), thing))
        else:
            made.append(made_skill(rng, rng.randrange(verbs), rng.randrange(things)))
    return list({skill.key: skill for skill in made}.values())


def _step(
    values: Values, chinese: bool, skills: list[Skill], everything: list[Skill], last: Skill | None
) -> tuple[Step, Skill | None]:
    rng = values.rng
    if not skills:
        step = _talk(values, chinese, skills) if rng.random() < 0.7 else _outside(values, chinese, skills, everything)
        return step, None
    if last is not None and last.more is not None and rng.random() < 0.3:
        return last.more(values, chinese), last
    roll = rng.random()
    if roll < 0.13:
        return _talk(values, chinese, skills), None
    if roll < 0.25:
        return _outside(values, chinese, skills, everything), None
    if roll < 0.35:
        several = _several(values, chinese, skills)
        if several is not None:
            return several, None
    skill = rng.choice(skills)
    return skill.request(values, chinese), skill


def generate(rng: random.Random, held_out: bool = False, most_turns: int = 4, pieces: Sequence[str] = ()) -> Dialogue:
    """One conversation."""
    values = Values(rng, held_out, pieces)
    skills, everything = _declare(rng)
    chinese = rng.random() < 0.42
    system = rng.choice(SYSTEM) if rng.random() < 0.06 else ""
    steps: list[Step] = []
    last: Skill | None = None
    for _ in range(rng.randint(1, most_turns) if skills else rng.randint(1, 5)):
        step, last = _step(values, chinese ^ (rng.random() < 0.04), skills, everything, last)
        steps.append(step)
    return Dialogue(tuple(skill.schema for skill in skills), system, tuple(steps))


def echo(rng: random.Random, pieces: Sequence[str] = ()) -> Dialogue:
    """Nothing but copying, in a short context: much of it early in training."""
    values = Values(rng, False, pieces)
    steps = []
    for _ in range(rng.randint(2, 5)):
        value = " ".join(values.draw("echo", rng.random() < 0.3) for _ in range(rng.randint(1, 2)))
        steps.append(
            Step(rng.choice(("say ", "repeat ", "echo ", "重复：", "说：")) + value, (), value, (value,), "small talk")
        )
    return Dialogue((), "", tuple(steps))


__all__ = ["Call", "Dialogue", "Step", "echo", "generate", "words"]
