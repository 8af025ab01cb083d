"""The tiny runs that a fault run kills and damages, and an uninterrupted one of each as oracle."""

import json
from pathlib import Path
from typing import NamedTuple

from faults.runner import Runner
from programs.conftest import CONFIG, MAKE, PGRPO, SFT

from tw_jax.cli import main
from tw_jax.forkjoin.threadweaver import grammar

STEPS = {"sft": 60, "pgrpo": 24}
SAVE_EVERY = 3
# It is no integer, so that a worker of the grader is needed.
TRUTH = "1+x"
ANSWERS = ("x+1", "x+2")
PROBLEMS = 12


class Scene(NamedTuple):
    """A folder with configs and data, and a runner and an uninterrupted run of each verb."""

    folder: Path
    runners: dict[str, Runner]

    def whole(self, verb: str) -> Path:
        """The folder of the uninterrupted run."""
        return self.folder / f"whole_{verb}"


def make(folder: Path, *, verbs: tuple[str, ...] = ("sft", "pgrpo")) -> Scene:
    """Makes data and runs each verb without interruption. P-GRPO begins with the model of SFT."""
    for name, text in (("make", MAKE), ("sft", CONFIG + SFT), ("pgrpo", CONFIG + PGRPO)):
        (folder / f"{name}.gin").write_text(text.format(folder=folder), encoding="utf-8")
    if main(["make", str(folder / "make.gin")]):
        raise RuntimeError(f"tw make failed in {folder}.")
    _write_problems(folder / "problems.jsonl")
    scene = Scene(folder, {verb: _runner(folder, verb) for verb in verbs})
    for verb in verbs:
        scene.runners[verb].finish(scene.whole(verb))
    return scene


def _runner(folder: Path, verb: str) -> Runner:
    name = verb.capitalize()
    sets = [f"{name}.steps={STEPS[verb]}", f"{name}.save_every={SAVE_EVERY}", "Mesh.data=1"]
    if verb == "sft":
        sets += [
            f"Data.path='{folder}/problems.jsonl'",
            "Sft.batch_rows=4",
            "Packing.row_tokens=256",
        ]
        sets += ["Optim.peak_lr=2e-2"]
    else:
        sets += [f"Pgrpo.init='{folder}/whole_sft/checkpoints'", "Pgrpo.microbatch_rows=4"]
        sets += [f"Pgrpo.problems='{folder}/problems.jsonl'", "Evaluation.every=8"]
        # One group at a time, so that a batch is written in parts.
        sets += ["Sampler.rows=4", "Pgrpo.rollouts=4", "Pgrpo.prompts=2", "Grader.workers=1"]
        sets += ["ForkJoin.max_new=120", "ForkJoin.max_thread=20", "Grader.mode='mathematics'"]
        sets += ["Optim.peak_lr=3e-4"]
    return Runner(verb, folder / f"{verb}.gin", sets, folder / "programs")


def _write_problems(file: Path) -> None:
    """Examples that a tiny model learns by heart: a fork, and one of two answers."""
    with file.open("w", encoding="utf-8") as out:
        for index in range(PROBLEMS):
            numbers = ("1", "2")
            block = grammar.ParallelBlock(
                outlines=tuple(grammar.Outline(n, "a") for n in numbers),
                threads=tuple(grammar.ThreadText(n, "a") for n in numbers),
            )
            answer = ANSWERS[index % len(ANSWERS)]
            response = f"{grammar.render_block(block)}\n</think>\n\n\\boxed{{{answer}}}"
            row = {"id": str(index), "question": f"What is {index}?", "response": response}
            out.write(json.dumps(row | {"answer": TRUTH, "task": "faults"}) + "\n")
