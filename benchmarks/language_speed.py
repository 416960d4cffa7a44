"""How fast a language model samples and learns, beside TRL's GRPO trainer: from the same weights and prompts, with the
same numbers of completions, in turns on the same cores.

    python benchmarks/language_speed.py                       # small Llamas with random weights; minutes
    python benchmarks/language_speed.py --model FOLDER        # yours, with train.jsonl and test.jsonl

Weights stand still (a learning rate of 1e-20), so that lengths have the same distribution in every turn.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from contenders.language import LanguageTask
from contest import OURS, Runtime, Worker
from headwater.language.warm_start import new_model, train_tokenizer
from headwater.language.word_problems import PROMPT_TEMPLATE, generate_word_problems, write_gsm8k
from language_speed_report import write_report
from peers import PEERS, install
from provenance import load, provenance

HERE = Path(__file__).resolve().parent
STILL = 1e-20  # moves no float32 weight
WIDTHS = {"1 M parameters": 128, "4 M parameters": 256}


def make_model(folder: Path, width: int) -> Path:
    """A Llama of 4 layers with random weights, its tokenizer, and word problems, in `folder`; kept if it is there."""
    if not (folder / "test.jsonl").exists():
        problems, generator = generate_word_problems(1200, 0), random.Random(0)
        train, test = problems[200:], problems[:200]
        tokenizer = train_tokenizer([one.question for one in train] + [one.solution(generator) for one in train])
        tokenizer.save_pretrained(folder)
        new_model(tokenizer, width, 4, 4, 0).save_pretrained(folder)
        for name, part in (("train", train), ("test", test)):
            write_gsm8k(folder / f"{name}.jsonl", part, [one.solution(generator) for one in part])
    return folder


def compare(task: LanguageTask, runtimes: dict[str, Runtime], rounds: int, iterations: int) -> dict[str, object]:
    """What each contender took, turn by turn, and what it says of itself."""
    with ExitStack() as living:
        workers = {}
        for name, runtime in runtimes.items():
            mine = replace(task, settings={}) if name == OURS else task
            workers[name] = living.enter_context(Worker(runtime, mine, task.threads, HERE / ".work"))
            workers[name].ask(iterations=2)  # warms up
        turns: dict[str, list[dict[str, object]]] = {name: [] for name in workers}
        for number in range(rounds):
            order = list(workers) if number % 2 == 0 else list(workers)[::-1]
            for name in order:
                turns[name].append(workers[name].ask(iterations=iterations))
        return {"about": {name: worker.about for name, worker in workers.items()}, "turns": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of yours, with train.jsonl and test.jsonl")
    parser.add_argument("--completions", type=int, default=20, help="of a prompt")
    parser.add_argument("--prompts", type=int, default=4, help="an iteration")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--iterations", type=int, default=2, help="in a turn")
    parser.add_argument("--trl", type=json.loads, default={}, help="JSON, more settings of GRPOConfig")
    parser.add_argument("--name", default="language-speed", help="of the files in results")
    options = parser.parse_args()
    facts, began = provenance(["python", "benchmarks/language_speed.py", *sys.argv[1:]]), load()
    trl = install("trl", HERE / ".peers")
    runtimes = {
        "trl": Runtime(trl.python, "trl_grpo.py", trl.checkout),
        OURS: Runtime(Path(sys.executable), "headwater_language.py"),
    }
    work = HERE / ".work"
    if options.model:
        models = {options.model.resolve().name: options.model.resolve()}
    else:
        models = {name: make_model(work / f"llama-{width}", width) for name, width in WIDTHS.items()}
    groups = []
    for name, folder in models.items():
        for threads in options.threads:
            task = LanguageTask(
                str(folder), str(folder / "train.jsonl"), str(folder / "test.jsonl"), PROMPT_TEMPLATE,
                options.completions, options.prompts, options.max_new_tokens, learning_rate=STILL, threads=threads,
                settings=options.trl,
            )  # fmt: skip
            print(f"{name}, {threads} threads", file=sys.stderr)
            found = compare(task, runtimes, options.rounds, options.iterations)
            groups.append({"model": name, "threads": threads, "random_weights": options.model is None, **found})
    results = {
        "provenance": facts, "load": [began, load()], "peer": PEERS["trl"].commit, "rounds": options.rounds,
        "iterations": options.iterations, "completions": options.completions, "prompts": options.prompts,
        "max_new_tokens": options.max_new_tokens, "groups": groups,
    }  # fmt: skip
    path = HERE / "results" / f"{options.name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(write_report(path))


if __name__ == "__main__":
    main()
