"""What each curvature of the implicit term brings: the same seeds with every one, and their alignment in one common run."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..envs import make_env
from ..envs.vector import make_environments
from ..errors import RunFolderError
from ..files import write_atomically
from ..pictures import pyplot, save_picture
from ..preference.teachers import TEACHERS, ScriptedTeacher
from ..results.tables import Table, to_markdown, to_text
from ..training.config import TrainConfig
from ..training.run_folder import read_metrics
from ..training.train import train
from ..training.trainer import Trainer, env_seeds, seeds
from ..workers import Failed, Report, Task, run_tasks
from .alignment import Alignment, AlignmentProbe

VARIANTS = {"direct-only": "none", "identity": "identity", "Fisher": "fisher", "full-score": "score"}
"""Names of the table, and the curvatures that they stand for."""
SNAPSHOTS = 5
"""Query sessions of the common run in which alignments are measured."""
REFERENCE_STEPS = 20_000
"""Fresh environment steps of the reference in each of them."""
RESULTS = (
    "env", "variant", "seeds", "last_return", "last_return_se", "mean_return", "mean_return_se", "seconds_per_run",
    "snapshots", "cosine_fisher", "cosine_fisher_se", "cosine_score", "cosine_score_se", "signal", "to_direct",
    "seconds_per_refresh",
)  # fmt: skip
"""Columns of results.csv; a cell is empty where there is no implicit term."""
NOTE = (
    "Means over seeds or over {snapshots} query sessions of one common run, ± their standard errors. Cosines are between "
    "the implicit term of a session's own data and that of {steps} fresh environment steps at the same policy and reward, "
    "by the curvature that the column says: Fisher's, which is definite everywhere and right at the lower level's optimum, "
    "or the full Hessian, which is that of the policy as it is. Two halves of a reference agree by a cosine of {fisher} "
    "(Fisher) and {score} (full): where that is near 0, the reference is noise too. Weight is what the agreement of two "
    "halves of a session's data would give the term by itself, while training takes its running mean over sessions, which "
    "may be negative; length is the median, relative to the direct term's."
)


def ablate(
    configs: Mapping[str, TrainConfig], num_seeds: int, path: Path, *, jobs: int, command: str, console: Console
) -> Path:
    """Do all runs into the new or empty folder `path`; writes results.csv, runs.csv, alignments.csv, table.md, ablation.png.

    Args:
        configs: a-parl's configuration on each environment, by the environment's name.
        num_seeds: every variant is run with the seeds 0, …, `num_seeds` − 1.
        jobs: runs at once, a process each.
        command: what the user typed, for the record.

    Raises:
        RunFolderError: the folder is not empty, or cannot be written.
        TaskError: a run failed.
    """
    if path.exists() and any(path.iterdir()):
        raise RunFolderError(f"{path} is not empty: give --output a new folder")
    path.mkdir(parents=True, exist_ok=True)
    tasks: list[Task] = [{"env": env, "variant": "common run"} for env in configs]
    tasks += [{"env": e, "variant": v, "seed": s} for s in range(num_seeds) for e in configs for v in VARIANTS]
    runs, alignments = list[dict[str, Any]](), list[dict[str, Any]]()
    with closing(run_tasks(partial(work, configs, path), tasks, jobs, lambda *_: None)) as done:
        for number, outcome in enumerate(done, 1):
            if isinstance(outcome, Failed):
                raise outcome.error
            task = dict(outcome.task)
            if "seed" in task:
                runs.append({**task, **outcome.result, "seconds": round(outcome.seconds, 2)})
            else:
                alignments += [{"env": task["env"], **asdict(found)} for found in outcome.result]
            words = " ".join(str(value) for value in task.values())
            console.print(f"{number}/{len(tasks)} {words}: {outcome.seconds:.0f} s", highlight=False, markup=False)
    runs.sort(key=lambda run: (run["env"], list(VARIANTS).index(run["variant"]), run["seed"]))
    rows = summarise(runs, alignments)
    _write_csv(path / "results.csv", RESULTS, rows)
    _write_csv(path / "runs.csv", ("env", "variant", "seed", "last_return", "mean_return", "seconds"), runs)
    _write_csv(path / "alignments.csv", ("env", *(field.name for field in fields(Alignment))), alignments)
    tables = [table(env, rows, alignments) for env in configs]
    parts = [f"    {command}", *map(to_markdown, tables)]
    write_atomically(path / "table.md", ("\n\n".join(parts) + "\n").encode())
    for made in tables:
        console.print("\n" + to_text(made), highlight=False, markup=False, soft_wrap=True)
    picture = _draw(list(configs), rows, path)
    console.print(f"\nAblation: {path}   picture: {picture}", highlight=False, markup=False, soft_wrap=True)
    return path


def work(configs: Mapping[str, TrainConfig], path: Path, task: Task, report: Report) -> Any:
    """One run: of a variant, its last and its mean return; of the common one, the alignments found in it."""
    config = configs[task["env"]]
    if "seed" not in task:
        return measure_alignments(config, SNAPSHOTS, REFERENCE_STEPS)
    variant = task["variant"]
    implicit = replace(config.implicit, curvature=VARIANTS[variant])
    config = replace(config, seed=task["seed"], implicit=implicit)
    folder = train(config, run_path(path, task["env"], variant, config.seed), Console(quiet=True))
    returns = [float(row["true_return"] or 0.0) for row in folder.rows]
    return {"last_return": returns[-1], "mean_return": statistics.fmean(returns)}


def run_path(path: Path, env: str, variant: str, seed: int) -> Path:
    """The folder of a run."""
    return path / "runs" / f"{env.replace('/', '-')}_{variant}_seed{seed}"


def measure_alignments(config: TrainConfig, snapshots: int, reference_steps: int) -> list[Alignment]:
    """Train without an implicit term and measure, in a few query sessions, where each curvature's would have pointed.

    The first session, of a reward that has not learned anything, is left out if there are others.
    """
    config = replace(config, implicit=replace(config.implicit, curvature="none"), eval_interval=config.steps)
    seed = seeds(config.seed)
    env_seed, action_seed = np.random.SeedSequence((config.seed, 1)).generate_state(2).tolist()  # of no run's own
    envs = make_environments(config.env, env_seeds(config.seed, config.num_envs))
    eval_env, fresh_env = make_env(config.env, seed["eval_env"]), make_env(config.env, env_seed)
    try:
        trainer = Trainer(config, envs, eval_env)
        teacher = ScriptedTeacher(
            TEACHERS["oracle"],
            segment_length=config.reward.segment_length,
            horizon=envs.horizon,
            generator=torch.Generator(),
        )
        number = num_sessions(config)
        probe = AlignmentProbe(
            config.implicit,
            config.sac.discount,
            curvatures=[name for name in VARIANTS.values() if name != "none"],
            sessions=evenly(min(1, number - 1), number - 1, snapshots),
            env=fresh_env,
            label=teacher.label,
            episodes=trainer.upper.episodes,
            reference_steps=reference_steps,
            generator=torch.Generator().manual_seed(action_seed),
        )
        trainer.upper.implicit = probe
        for _ in trainer.run():
            pass
        return probe.found
    finally:
        envs.close()
        for one in (eval_env, fresh_env):
            one.close()


def num_sessions(config: TrainConfig) -> int:
    """Query sessions of a run, if each is held when it is due."""
    by_labels = -(-config.reward.label_budget // config.reward.labels_per_session)
    return max(1, min(by_labels, 1 + (config.steps - config.first_session) // config.reward.session_interval))


def evenly(first: int, last: int, number: int) -> list[int]:
    """At most `number` whole numbers from `first` to `last`, both included, as evenly as they can lie."""
    return sorted({round(first + (last - first) * i / max(number - 1, 1)) for i in range(number)})


def summarise(runs: Sequence[Mapping[str, Any]], alignments: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of results.csv for each environment and variant."""
    rows = []
    for env in dict.fromkeys(run["env"] for run in runs):
        for variant, curvature in VARIANTS.items():
            mine = [run for run in runs if run["env"] == env and run["variant"] == variant]
            found = [one for one in alignments if one["env"] == env and one["curvature"] == curvature]
            row: dict[str, Any] = {"env": env, "variant": variant, "seeds": len(mine), "snapshots": len(found)}
            row["last_return"], row["last_return_se"] = _mean_and_error(mine, "last_return")
            row["mean_return"], row["mean_return_se"] = _mean_and_error(mine, "mean_return")
            row["seconds_per_run"] = _mean_and_error(mine, "seconds")[0]
            for name in ("cosine_fisher", "cosine_score"):
                row[name], row[f"{name}_se"] = _mean_and_error(found, name)
            for column, name in (("signal", "signal"), ("seconds_per_refresh", "seconds")):
                row[column] = _mean_and_error(found, name)[0]
            row["to_direct"] = statistics.median(one["to_direct"] for one in found) if found else None
            rows.append(row)
    return rows


def table(env: str, rows: Sequence[Mapping[str, Any]], alignments: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of one environment."""
    mine = [row for row in rows if row["env"] == env]
    found = {one["session"]: one for one in alignments if one["env"] == env}.values()
    columns = (
        "variant", "last return", "mean return", "cosine (Fisher)", "cosine (full)", "weight", "length", "s / refresh",
        "s / run",
    )  # fmt: skip
    cells = tuple(
        (
            row["variant"],
            *(_with_error(row, name) for name in ("last_return", "mean_return", "cosine_fisher", "cosine_score")),
            *(_number(row[name]) for name in ("signal", "to_direct", "seconds_per_refresh", "seconds_per_run")),
        )
        for row in mine
    )
    reliable = {
        name: _with_error(dict(zip(("x", "x_se"), _mean_and_error(found, f"reliability_{name}"), strict=True)), "x")
        for name in ("fisher", "score")
    }
    note = NOTE.format(snapshots=len(found), steps=REFERENCE_STEPS, **reliable)
    return Table(f"{env}, {mine[0]['seeds']} seeds", columns, cells, note)


def _mean_and_error(rows: Any, name: str) -> tuple[float | None, float | None]:
    """Mean and its standard error; None where there are too few."""
    values = [row[name] for row in rows]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return (statistics.fmean(values) if values else None), error


def _with_error(row: Mapping[str, Any], name: str) -> str:
    error = row[f"{name}_se"]
    return _number(row[name]) + ("" if error is None else f" ± {_number(error)}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def _draw(envs: Sequence[str], rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """For each environment, the true return of every run and each variant's mean, and the cosines."""
    figure, axes = pyplot().subplots(len(envs), 2, figsize=(11, 3.8 * len(envs)), squeeze=False)
    for (left, right), env in zip(axes, envs, strict=True):
        mine = [row for row in rows if row["env"] == env]
        for number, row in enumerate(mine):
            curves = [read_metrics(run_path(path, env, row["variant"], seed)) for seed in range(row["seeds"])]
            for curve in curves:
                left.plot(*_columns(curve), color=f"C{number}", alpha=0.3, linewidth=1)
            steps = _columns(curves[0])[0]
            means = [statistics.fmean(values) for values in zip(*(_columns(curve)[1] for curve in curves), strict=True)]
            left.plot(steps, means, color=f"C{number}", linewidth=2.2, label=row["variant"])
            for offset, name, hatch in ((-0.2, "cosine_fisher", ""), (0.2, "cosine_score", "//")):
                if row[name] is not None:
                    right.bar(
                        number + offset,
                        row[name],
                        0.38,
                        yerr=row[f"{name}_se"],
                        color=f"C{number}",
                        alpha=0.7,
                        hatch=hatch,
                    )
        left.set(title=env, xlabel="environment steps", ylabel="true return")
        left.legend(fontsize=8)
        left.grid(alpha=0.3)
        right.axhline(0, color="black", linewidth=0.8)
        right.set_xticks(range(len(mine)), [row["variant"] for row in mine])
        right.set(title="cosine with the reference by Fisher's curvature (plain) and the full Hessian (hatched)")
        right.title.set_fontsize(9)
    return save_picture(figure, path / "ablation.png")


def _columns(curve: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    return [row["step"] for row in curve], [row["true_return"] for row in curve]
