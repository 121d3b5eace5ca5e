"""`python -m tests.faulty ARGUMENTS`: the command line, hit by a signal at one moment of one stage.

FAULT="STAGE STEP SIGNAL [RANK]" in the environment says when: after so many optimizer steps of that stage. Seconds would
hit one machine in the middle and another when all is done. Step -1 is in the middle of writing the first checkpoint.
A process that torchrun restarted is spared.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from prune_cli.cli import main
from prune_cli.pipeline import store
from prune_cli.pipeline.state import State


def arm(fault: str) -> None:
    """Prepares the signal to this process."""
    stage, step, name, *rank = fault.split()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or (rank and rank != [os.environ.get("RANK")]):
        return
    running, steps, evolve, write = "", 0, State.evolve, store.write_manifest

    def follow(state: State, **changes: Any) -> State:
        nonlocal running
        running = changes.get("stage", running)
        return evolve(state, **changes)

    def count(*_: object) -> None:
        nonlocal steps
        steps += running == stage
        if steps == int(step):
            signal.raise_signal(getattr(signal, name))

    def write_manifest(folder: Path, extra: dict) -> None:
        if running == stage and int(step) < 0 and (folder / "numbers.json").is_file():
            signal.raise_signal(getattr(signal, name))
        write(folder, extra)

    State.evolve = follow
    register_optimizer_step_post_hook(count)
    store.write_manifest = write_manifest


if __name__ == "__main__":
    if fault := os.environ.get("FAULT"):
        arm(fault)
    main()
