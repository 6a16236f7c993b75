"""`./dev bench chaos`: real peers in network namespaces with faults from a tape, and the same run without them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from pathlib import Path

import torch

from .network import NetworkMissing
from .playing import Played
from .quota import QuotaMissing
from .report import CALM, markdown
from .swarm import Setup, SwarmFailed, play
from .tape import Tape, flippers, read, seeded, standard, text


def main() -> None:
    """Run both and print the tables; exit code 1 with the reason if that was not possible."""
    parser = argparse.ArgumentParser(prog="./dev bench chaos", description=__doc__)
    parser.add_argument("tape", nargs="?", default="standard", help="standard | flippers | random | none | a file")
    parser.add_argument("--peers", type=int, default=8, help="the founder is one of them")
    parser.add_argument("--seconds", type=float, default=240.0, help="of each run, after the first merges")
    parser.add_argument("--seed", type=int, default=0, help="of the random tape")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a fact of the manifest")
    parser.add_argument("--lease-seconds", type=float, default=20.0)
    parser.add_argument("--latency-ms", type=float, default=0.0, help="round trip of every link, by relays")
    parser.add_argument("--jitter", type=float, default=0.0, help="of the latency, as a part of it")
    parser.add_argument("--rate-mbit", type=float, default=None, help="of every link, each way")
    parser.add_argument("--cores", type=float, default=None, help="of each peer's own, as 0.2; default: all share")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--no-baseline", action="store_true", help="only the run with faults")
    parser.add_argument("--out", type=Path, default=None, help="folder for chaos.md, chaos.json, the tape and all logs")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that everything is cleaned up then too
    torch.set_num_threads(1)
    setup = Setup(
        composers=[f"c{i}" for i in range(arguments.peers - 1)],
        seconds=arguments.seconds,
        preset=arguments.preset,
        settings=["train.batch_size=2", *arguments.set],
        lease_seconds=arguments.lease_seconds,
        latency_ms=arguments.latency_ms,
        jitter=arguments.jitter,
        rate_mbit=arguments.rate_mbit,
        cores=arguments.cores,
        windows=arguments.windows,
    )
    makers = {"standard": standard, "flippers": flippers, "random": seeded(arguments.seed), "none": lambda *_: ()}
    try:
        maker = makers.get(arguments.tape)
        tape = read(Path(arguments.tape)) if maker is None else maker(setup.composers, setup.seconds)
        runs = compare(setup, tape, arguments)
    except (NetworkMissing, QuotaMissing, SwarmFailed, OSError, ValueError) as error:
        sys.exit(f"chaos: {error}")
    told = markdown(runs, text(tape))
    print(told)
    if arguments.out is not None:
        (arguments.out / "chaos.md").write_text(told + "\n")
        (arguments.out / "tape.jsonl").write_text(text(tape))
        (arguments.out / "chaos.json").write_text(
            json.dumps({name: run.told() for name, run in runs.items()}, indent=1)
        )


def compare(setup: Setup, tape: Tape, arguments: argparse.Namespace) -> dict[str, Played]:
    """The run without faults, then with; flippers also against averages that resist them."""
    plans: dict[str, tuple[Tape, list[str]]] = {} if arguments.no_baseline else {CALM: ((), [])}
    if tape or not plans:
        plans[arguments.tape] = (tape, [])
    if arguments.tape == "flippers":
        plans["flippers, outer.robust"] = (tape, ["outer.robust=true"])
    runs = {}
    for name, (faults, more) in plans.items():
        print(f"{name}: {setup.seconds:.0f} s with {len(setup.composers)} composers", flush=True)
        keep = None if arguments.out is None else arguments.out / name.replace(" ", "-").replace("/", "-")
        this = dataclasses.replace(setup, settings=[*setup.settings, *more], keep=keep)
        runs[name] = play(this, faults, lambda what: print(f"  {what}", flush=True))
        print(f"  {runs[name].committed_tokens:,} tokens committed", flush=True)
    return runs


if __name__ == "__main__":
    main()
