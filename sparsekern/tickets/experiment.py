"""experiment: tickets against their controls, over seeds, in processes of one thread each, and resumable.

Series of rounds, each from the weights that the one before left:

    ticket                   rewound to theta_0
    late rewinding           rewound to theta_k
    learning-rate rewinding  the weights stay, the training starts over
    fine-tuning              the weights stay, and so does the last learning rate

and, at some of the rounds, what the ticket is compared with, at exactly its number of weights:

    random re-initialisation  the ticket's mask, other first weights
    random mask               the ticket's number of weights in each layer and its first weights, chosen by lot
    one-shot                  the mask that the dense network gives in one go, rewound to theta_0
"""

import itertools
import json
import multiprocessing
import queue
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sparsekern.fixed_masks import FixedMasks
from sparsekern.lottery import Masks, Round, State, Ticket, find_ticket, shrink, trained
from sparsekern.lottery_journal import replace_file
from sparsekern.publish import lock
from sparsekern.tickets import TASKS, Problem
from sparsekern.training import Training

# arguments of find_ticket and of the trainer
SERIES: dict[str, Callable[[Problem], tuple[dict[str, Any], bool]]] = {
    "ticket": lambda problem: ({}, False),
    "late rewinding": lambda problem: ({"rewind_step": problem.rewind_step}, False),
    "learning-rate rewinding": lambda problem: ({"rewind_weights": False}, False),
    "fine-tuning": lambda problem: ({"rewind_weights": False}, True),
}
CONTROLS = ("random re-initialisation", "random mask", "one-shot")
OTHER_SEED = 1000  # what re-initialises seed s is seed s + OTHER_SEED
Told = Callable[[str], object]
Progress = Callable[[int, int, str], object]  # trainings done, all of them, what is trained


@dataclass(frozen=True)
class Cell:
    """One training: what was left of the weights, and what came of it."""

    network: str
    seed: int
    series: str
    round: int
    kept: int
    size: int
    layers: dict[str, tuple[int, int]]
    early_step: int
    validation_loss: float
    score: float
    last_score: float

    @property
    def remaining(self) -> float:
        return self.kept / self.size


def run(
    task: str,
    directory: Path,
    seeds: int = 5,
    processes: int = 2,
    steps: int | None = None,
    rounds: int | None = None,
    progress: Progress = lambda *_: None,
) -> list[Cell]:
    """Every training of a task.

    directory       of the results of each network and seed, and of the search that is under way; the same call goes on
    seeds           0, 1, ...; `processes` of one thread each share them, 1: this one
    steps, rounds   fewer than the task has, for a quick look

    Returns the cells, by network and seed. Raises ValueError for another task, or settings that differ from what is
    recorded; RuntimeError when another process writes in `directory`.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if seeds < 1 or processes < 1:
        raise ValueError(f"seeds and processes must be positive, got {seeds} and {processes}")
    problems = TASKS[task](steps, rounds)
    jobs = [(problem, seed) for seed in range(seeds) for problem in problems]
    whole = sum(trainings(problem) for problem, _ in jobs)
    with lock(directory):
        directory.mkdir(parents=True, exist_ok=True)
        open_jobs = [(problem, seed) for problem, seed in jobs if recorded(directory, problem, seed) is None]
        done = whole - sum(trainings(problem) for problem, _ in open_jobs)
        if processes == 1:
            _in_this_process(open_jobs, directory, done, whole, progress)
        else:
            arguments = [(task, problem.name, seed, directory, steps, rounds) for problem, seed in open_jobs]
            _in_processes(arguments, processes, done, whole, progress)
    return [cell for problem, seed in jobs for cell in recorded(directory, problem, seed)]


def trainings(problem: Problem) -> int:
    """How many a seed takes."""
    return len(SERIES) * (problem.rounds + 1) + len(CONTROLS) * len(problem.controlled)


def recorded(directory: Path, problem: Problem, seed: int) -> list[Cell] | None:
    """The cells of one network and seed; None when they are not there. Raises ValueError for other settings."""
    path = directory / f"{problem.name}-seed{seed}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    ours = json.loads(json.dumps({**problem.settings, "rounds": problem.rounds}))
    for name, value in ours.items():
        if (begun := content["settings"].get(name)) != value:
            raise ValueError(
                f"{str(path)!r} was recorded with {name} = {begun!r}, now it is {value!r}; choose another directory"
            )
    return [Cell(**cell) for cell in content["cells"]]


def ticket_file(directory: Path, problem: Problem, seed: int, round: int) -> Path:
    """Where the trained weights of the ticket series are kept: of the dense network and of the product's round."""
    return directory / f"{problem.name}-seed{seed}-round{round:02}.safetensors"


def _in_this_process(
    jobs: list[tuple[Problem, int]], directory: Path, done: int, whole: int, progress: Progress
) -> None:
    trained_so_far, threads = itertools.count(done + 1), torch.get_num_threads()
    # as in a process of its own: the number of threads decides the last bits
    torch.set_num_threads(1)
    try:
        for problem, seed in jobs:
            name = f"{problem.name}, seed {seed}"
            run_seed(
                problem,
                seed,
                directory,
                lambda what, name=name: progress(next(trained_so_far), whole, f"{name}, {what}"),
            )
    finally:
        torch.set_num_threads(threads)


def _in_processes(arguments: list[tuple], processes: int, done: int, whole: int, progress: Progress) -> None:
    # spawned: a forked child would inherit the threads' locks
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(told,)) as pool:
        running = {pool.submit(_job, *job) for job in arguments}
        try:
            while running:
                finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                done = _drain(told, done, whole, progress)
        finally:
            # of an error or an interrupt; otherwise none is left
            pool.shutdown(cancel_futures=True)


_told: Any = None  # the queue of a worker


def _begin(told: Any) -> None:
    global _told
    _told = told
    # the networks are too small for two threads, which would only wait for each other
    torch.set_num_threads(1)


def _job(task: str, name: str, seed: int, directory: Path, steps: int | None, rounds: int | None) -> None:
    problem = next(problem for problem in TASKS[task](steps, rounds) if problem.name == name)
    run_seed(problem, seed, directory, lambda series: _told.put(f"{name}, seed {seed}, {series}"))


def _drain(told: Any, done: int, whole: int, progress: Progress) -> int:
    while True:
        try:
            what = told.get_nowait()
        except queue.Empty:
            return done
        done += 1
        progress(done, whole, what)


def run_seed(problem: Problem, seed: int, directory: Path, told: Told = lambda _: None) -> None:
    """All trainings of one network and seed; their cells are recorded in `directory`."""
    cells, searches = [], directory / f"{problem.name}-seed{seed}-searches"
    for series, arguments in SERIES.items():
        found, at_last_rate = arguments(problem)
        ticket = find_ticket(
            problem.fresh(seed),
            problem.trainer(seed, at_last_rate),
            problem.rate,
            problem.rounds,
            seed=seed,
            directory=searches / series.replace(" ", "-"),
            settings={**problem.settings, "series": series},
            after_round=lambda _, series=series: told(series),
            **found,
        )
        cells += [_cell(problem, seed, series, one) for one in ticket.rounds]
        if series == "ticket":
            theta_0_ticket = ticket
    dense = trained(searches / "ticket", 0)
    for round in problem.controlled:
        for control in CONTROLS:
            theta, masks = _control(control, problem, seed, theta_0_ticket, dense, round)
            cells.append(_cell(problem, seed, control, train_once(problem, seed, theta, masks, round)))
            told(control)
    for round in (0, problem.product_round):
        replace_file(ticket_file(directory, problem, seed, round), save(trained(searches / "ticket", round)))
    content = {
        "settings": {**problem.settings, "rounds": problem.rounds},
        "cells": [asdict(cell) for cell in cells],
    }
    replace_file(directory / f"{problem.name}-seed{seed}.json", json.dumps(content).encode())
    shutil.rmtree(searches)


def train_once(problem: Problem, seed: int, theta: State, masks: Masks, round: int) -> Round:
    """Train theta * masks from the first step to the last."""
    model = problem.fresh(seed)
    model.load_state_dict(theta)
    held = FixedMasks(model, masks)
    held.apply()
    torch.manual_seed(seed)
    training = Training(model, held, round, 0, None)
    metrics = training.run(problem.trainer(seed))
    layers = {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    kept, size = (sum(column) for column in zip(*layers.values(), strict=True))
    return Round(round, kept, size, layers, training.steps, metrics)


def _control(
    control: str, problem: Problem, seed: int, ticket: Ticket, dense: Mapping[str, Tensor], round: int
) -> tuple[State, Masks]:
    """What a control begins with, and its masks."""
    masks = ticket.masks(round)
    if control == "random re-initialisation":
        return _state(problem.fresh(seed + OTHER_SEED)), masks
    if control == "random mask":
        return ticket.theta, by_lot(masks, seed)
    whole = {name: torch.ones_like(mask) for name, mask in masks.items()}
    weights = {name: dense[name] for name in masks}
    return ticket.theta, shrink(weights, whole, ticket.rounds[round].sparsity, "model")


def by_lot(masks: Masks, seed: int) -> Masks:
    """Masks with as many kept in each layer, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)
        for name, mask in masks.items()
    }


def _state(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _cell(problem: Problem, seed: int, series: str, one: Round) -> Cell:
    return Cell(problem.name, seed, series, one.round, one.kept, one.size, one.layers, **one.metrics)
