"""Trains `nano`: `python -m nano.train --minutes 60` on a CPU, fewer minutes with `--device cuda`.

Seeded, resumable (`--resume`), logged to nano/train_log.jsonl. The schedule follows the clock: a short warm-up, a
plateau, and a linear decay to zero over the last 65 % of the minutes. In the last 35 % every second step sees its
weights rounded to int4 (gradients pass through), so that the quantized model is trained for, too.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

import glm4lite.model.layers
from glm4lite.model.config import Glm4Config
from glm4lite.pretrained.models import Glm4ForCausalLM
from nano import batches, dialogues, probe
from nano import tokenizer as bpe
from nano.export import export, model_config
from nano.parallel import Team, exchange, meet, owners
from nano.render import IGNORED, text_of

HERE = Path(__file__).parent
PACKAGE_DATA = HERE.parent / "glm4lite" / "nano"
MERGES, VOCABULARY = 500, 1250
WARM_UP, DECAY, ROUNDED = 0.02, 0.65, 0.35  # shares of the planned minutes; the last two count from the end
GROUP = 32  # of the int4 rounding


@dataclass
class Clock:
    """Seconds trained, over all runs, and the share of the planned minutes."""

    minutes: float
    before: float = 0.0
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def share(self) -> float:
        return min(1.0, self.seconds / (60 * self.minutes))

    def rate(self) -> float:
        """The factor of the learning rate now."""
        return min(1.0, self.share / WARM_UP, (1.0 - self.share) / DECAY)


def make_tokenizer(seed: int) -> Tokenizer:
    """The tokenizer, trained on 8000 dialogues of the training side."""
    rng = random.Random(seed)
    return bpe.train((text_of(dialogues.generate(rng)) for _ in range(8000)), MERGES, VOCABULARY)


def optimizers(model: Glm4ForCausalLM, rate: float, mine: set[str]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else; `mine` are the parameters to update."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if name in mine]
    matrices = [p for name, p in named if p.dim() == 2 and name.startswith("model.layers.")]
    others = [p for name, p in named if p.dim() != 2 or not name.startswith("model.layers.")]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def round_to_int4(weight: Tensor) -> Tensor:
    """The weight after a round trip through 4 bits, one scale and minimum per 32 inputs."""
    groups = weight.float().view(weight.shape[0], -1, GROUP)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / 15).clamp(min=1e-8)
    codes = ((groups - low) / step).round().clamp(0, 15)
    return (codes * step + low).view_as(weight).to(weight.dtype)


@contextmanager
def rounded(model: Glm4ForCausalLM, active: bool) -> Iterator[None]:
    """Inside, the layers' int4 weights are rounded; outside, the exact ones are back."""
    names = ("q_proj", "o_proj", "gate_up_proj", "down_proj")
    linears = [m for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear) and n.endswith(names)]
    exact = [linear.weight.data for linear in linears] if active else []
    for linear in linears[: len(exact)]:
        linear.weight.data = round_to_int4(linear.weight.data)
    try:
        yield
    finally:
        for linear, weight in zip(linears, exact, strict=False):
            linear.weight.data = weight


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """model.attention.attend for training on a CPU: the backward pass of torch's own is five times slower there."""
    batch, heads, length, size = q.shape
    rows = heads // k.shape[1] * length  # the query heads of a key head become its rows
    later = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1).repeat(heads // k.shape[1], 1)
    queries = (q * scale).reshape(-1, rows, size)
    weights = torch.baddbmm(later, queries, k.reshape(-1, length, size).transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v.reshape(-1, length, size)).view(batch, heads, length, size)


def loss_of(model: Glm4ForCausalLM, batch: batches.Batch) -> Tensor:
    """Mean cross-entropy of the taught tokens; the head runs on their positions only."""
    device = model.lm_head.weight.device
    ids, labels = batch.ids.to(device), batch.labels.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        hidden = model.model(ids, use_cache=False).last_hidden_state
        taught = labels != IGNORED
        logits = model.lm_head(hidden[taught])
    return F.cross_entropy(logits.float(), labels[taught])


@dataclass
class Run:
    """One process's part of the training."""

    model: Glm4ForCausalLM
    tokenizer: Tokenizer
    optimizers: list[torch.optim.Optimizer]
    clock: Clock
    team: Team
    owner: dict[str, int]
    rank: int = 0
    step: int = 0
    chunk: int = 0

    def save(self, folder: Path) -> None:
        """Writes this process's state beside the old one, then swaps it in; process 0 writes the model, too."""
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, object] = {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        if self.rank == 0:
            state |= {"model": self.model.state_dict(), "step": self.step, "chunk": self.chunk}
            state |= {"seconds": self.clock.seconds, "tokenizer": self.tokenizer.to_str()}
        part, final = folder / f"state-{self.rank}.tmp", folder / f"state-{self.rank}.pt"
        torch.save(state, part)
        part.rename(final)


@dataclass(frozen=True)
class Given:
    """What a process starts with: the shared model, the tokenizer as JSON, and the counters of the saved run."""

    model: Glm4ForCausalLM
    tokenizer: str
    counters: dict[str, float]


def prepare(arguments: argparse.Namespace) -> Given:
    """Model, tokenizer and counters: fresh, or the saved ones with `--resume`."""
    torch.manual_seed(arguments.seed)
    saved = torch.load(arguments.out / "state-0.pt", weights_only=True) if arguments.resume else {}
    tokenizer = Tokenizer.from_str(saved["tokenizer"]) if saved else make_tokenizer(arguments.seed)
    model = Glm4ForCausalLM(Glm4Config.from_dict(model_config(tokenizer))).to(arguments.device)
    if saved:
        model.load_state_dict(saved["model"])
    counters = {"step": saved["step"], "chunk": saved["chunk"], "seconds": saved["seconds"]} if saved else {}
    return Given(model, tokenizer.to_str(), counters)


def train_step(run: Run, batch: batches.Batch, rate: float) -> float:
    """One update; returns the loss."""
    factor = run.clock.rate()
    with rounded(run.model, active=run.clock.share > 1 - ROUNDED and run.step % 2 == 0):
        loss = loss_of(run.model, batch)
        loss.backward()
    exchange(run.model, run.team, run.rank, run.owner)
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        for settings in optimizer.param_groups:
            settings["lr"] = rate * factor
        optimizer.step()
    run.model.zero_grad(set_to_none=True)
    run.step += 1
    return float(loss.detach())


def _log(run: Run, arguments: argparse.Namespace, losses: list[float], tokens: int, seconds: float) -> None:
    entry: dict[str, object] = {"step": run.step, "minutes": round(run.clock.seconds / 60, 2)}
    entry |= {"loss": round(sum(losses) / len(losses), 4), "rate": round(run.clock.rate() * arguments.rate, 6)}
    entry |= {"tokens_per_s": round(tokens * run.team.workers / seconds), "chunk": run.chunk}
    _append(arguments.log, entry)


def _append(log: Path, entry: dict[str, object]) -> None:
    with log.open("a", encoding="utf-8") as file:
        print(json.dumps(entry), file=file)


def _probe(run: Run, arguments: argparse.Namespace, held_out: list[probe.Probe]) -> None:
    _append(arguments.log, {"step": run.step, "exact": probe.exact(run.model, held_out)})


def work(rank: int, given: Given, team: Team, arguments: argparse.Namespace) -> None:
    """One process: trains until the planned minutes are over."""
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu":
        glm4lite.model.layers.attend = attend  # type: ignore[attr-defined]
    run = _run(rank, given, team, arguments)
    held_out = probe.held_out(run.tokenizer, arguments.probes) if rank == 0 else []
    losses: list[float] = []
    tokens, since, saved_at = 0, time.monotonic(), run.step
    source = batches.stream(run.tokenizer, arguments.seed, run.chunk + rank, team.workers, arguments.tokens)
    for run.chunk, batch in source:
        losses.append(train_step(run, batch, arguments.rate))
        tokens += batch.ids.numel()
        if rank == 0 and (run.clock.share >= 1 or (arguments.steps and run.step >= arguments.steps)):
            team.stop[0] = 1
        going = meet(team)
        if rank == 0 and run.step % 50 == 0:
            _log(run, arguments, losses, tokens, time.monotonic() - since)
            losses, tokens, since = [], 0, time.monotonic()
        if rank == 0 and run.step % arguments.probe_every == 0:
            _probe(run, arguments, held_out)
        if not going or run.step - saved_at >= arguments.save_every:
            run.save(arguments.out)
            saved_at = run.step
        if not going:
            break
    if rank == 0:
        _probe(run, arguments, held_out)
        export(run.model.state_dict(), model_config(run.tokenizer), run.tokenizer, arguments.export)


def _run(rank: int, given: Given, team: Team, arguments: argparse.Namespace) -> Run:
    model, tokenizer, counters = given.model, Tokenizer.from_str(given.tokenizer), given.counters
    owner = owners(model, team.workers)
    mine = {name for name, process in owner.items() if process == rank}
    clock = Clock(arguments.minutes, counters.get("seconds", 0.0))
    run = Run(model, tokenizer, optimizers(model, arguments.rate, mine), clock, team, owner, rank)
    state = arguments.out / f"state-{rank}.pt"
    if counters:
        run.step, run.chunk = int(counters["step"]), int(counters["chunk"]) + team.workers
        for optimizer, saved in zip(run.optimizers, torch.load(state, weights_only=True)["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    return run


def snapshot(arguments: argparse.Namespace) -> None:
    """Exports the saved state of a run that may still be going on."""
    given = prepare(arguments)
    tokenizer = Tokenizer.from_str(given.tokenizer)
    export(given.model.state_dict(), model_config(tokenizer), tokenizer, arguments.export)


def train(arguments: argparse.Namespace) -> None:
    """Starts the processes and waits for them."""
    given = prepare(arguments)
    if not arguments.resume:
        arguments.log.unlink(missing_ok=True)
    context = torch.multiprocessing.get_context("spawn")
    team = Team.create(given.model, arguments.workers, context)
    if arguments.workers == 1:
        work(0, given, team, arguments)
        return
    processes = [context.Process(target=work, args=(rank, given, team, arguments)) for rank in range(arguments.workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--steps", type=int, default=0, help="stop after this many steps (0: when the minutes are over)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--tokens", type=int, default=3072, help="tokens of one process's batch")
    parser.add_argument("--probes", type=int, default=120, help="held-out dialogues checked while training")
    parser.add_argument("--probe-every", type=int, default=500, help="steps between the checks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--save-every", type=int, default=500, help="steps between resumable states")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--snapshot", action="store_true", help="do not train: export the saved state")
    parser.add_argument("--out", type=Path, default=HERE / "run", help="folder of the resumable state")
    parser.add_argument("--log", type=Path, default=HERE / "train_log.jsonl")
    parser.add_argument("--export", type=Path, default=PACKAGE_DATA, help="where the checkpoint is written")
    arguments = parser.parse_args()
    if arguments.snapshot:
        arguments.resume = True
        snapshot(arguments)
    else:
        train(arguments)


if __name__ == "__main__":
    main()
