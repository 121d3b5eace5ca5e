"""What a schedule may ask of the prune stage, and what it hears.

A schedule is a generator: `schedule(problem, *, its parameters)` yields requests and is sent their answers. Answers are
plain data: numbers, strings, lists and mappings; after `Shrink`, a `Problem`. What a run resumes from is the journal of
the answers: the generator is started afresh and fed with them. So it must be deterministic: random numbers only from
`problem.generator(name)`; no clock, no files, no global state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Kept = Mapping[str, int]
"""Name of a group -> how many of its units stay. Groups that are absent keep all that they have."""


@dataclass(frozen=True)
class Mask:
    """Choose by the criterion, from the present weights, what goes, and zero it; what `Project` keeps ends with it.

    Answer: `{"units", "removed", "kept", "macs", "params"}`: units in all and those that go, per group how many stay,
    and the multiply-adds and parameters that are left.

    Attributes:
        fraction: how much of the granularity's ratio or budget to apply to the network as it is, in [0, 1].
        kept: units that stay in each group, instead of a fraction; met exactly.
        monotone: what is masked already stays masked.
        random: choose at random instead of by the criterion, as for a control.
        soft: what is masked may grow back in soft training: of filters only the rows that produce them are zeroed. The
            whole mask holds as soon as training is not soft, and at the end.
        hides: what is masked keeps its values behind the mask, is zero in training, and has them again when a later mask
            brings it back. Of filters only the rows that produce them are masked, so that gradients reach them.
        rescale: what stays of every output row is multiplied by sqrt(weights / weights that stay), so that what it sums up
            is as large as before, of weights that are drawn independently.
        threshold: only units that score below it go, at most as many as `fraction` says; None = as many as it says.
    """

    fraction: float = 1.0
    kept: Kept | None = None
    monotone: bool = True
    soft: bool = False
    random: bool = False
    hides: bool = False
    rescale: bool = False
    threshold: float | None = None


@dataclass(frozen=True)
class Train:
    """Train on.

    Answer: `{"epoch", "loss", "acc1"}`: epochs of this training so far, mean loss of the last, accuracy in percent on
    the validation split; None where there was no epoch, or there is no such split.

    Attributes:
        epochs: how many; None = to the end of `total`, where `steps` does not say otherwise.
        steps: optimizer steps instead of epochs.
        total: epochs of the training that these are a part of, to which the learning-rate schedule refers: parts of one
            training give the same number. None: a training of its own, with fresh moments.
        soft: what is masked may grow again; else it is held at zero.
        final: what is masked will not come back: what it leaves useless, as the norm behind a filter of which nothing is
            left, is held at zero too.
        penalty: add rho / 2 * ||W - Z + U||^2 of the last `Project`.
        fresh: moments start afresh, at the same place of the training.
        shrinkage: lambda of the penalty lambda * sum of sigmoid(S) on scores S that are learned in training.
    """

    epochs: int | None = None
    total: int | None = None
    steps: int | None = None
    soft: bool = False
    final: bool = True
    penalty: bool = False
    fresh: bool = False
    shrinkage: float = 0.0


@dataclass(frozen=True)
class Regrow:
    """Move units inside their groups: some that stay are dropped, and as many that are masked grow; from zero, with
    fresh moments.

    What is dropped ranks lowest by the criterion. What grows ranks highest among all that is masked then; a unit that was
    dropped a moment ago may be among it, and stays as it is. What an earlier stage masked never grows.

    Answer: `{name of the group: how many units moved}`.

    Attributes:
        fraction: of the units that stay in each group, in [0, 1]; rounded down, at most as many as there are to grow.
        grow_by: `gradient`, the size of the loss's gradient on the images that training comes to next; or `random`.
    """

    fraction: float
    grow_by: Literal["gradient", "random"]


@dataclass(frozen=True)
class Evaluate:
    """Try candidates out: each one's masks on, norm statistics estimated again, or a short training; then a look.

    The network is bit for bit as before afterwards, unless the best candidate is adopted.

    Answer: a list with a score per candidate: accuracy in percent on held-out images, never of the test split; None for
    those that cost more than `within`, which are not run.

    Attributes:
        candidates: units that stay in each group, chosen by the criterion from the present weights; what is masked
            already stays masked.
        train: epochs of a training of its own for each candidate, all with the same batches; 0 = none.
        adopt: the best candidate's masks stay, and the weights that it was trained to; of equal ones the first.
        within: what a candidate may cost, in `problem.quantity`; None = anything.
    """

    candidates: Sequence[Kept]
    train: int = 0
    adopt: bool = False
    within: float | None = None


@dataclass(frozen=True)
class Remember:
    """Keep a snapshot of weights, masks and clock under a tag. Answer: None.

    Attributes:
        tag: a name.
        leave: also leave the weights in the stage's folder when it is done, as `remembered_TAG.safetensors`: later stages
            can go back to them.
    """

    tag: str
    leave: bool = False


@dataclass(frozen=True)
class Restore:
    """Go back to a snapshot. Answer: None.

    `init` is the network's initial weights, `fresh` other initial weights, and the tags of an earlier train stage
    (`train.remember`) are there too. A snapshot goes along when the network shrinks.

    Attributes:
        tag: one of `problem.tags` or of an earlier `Remember`.
        weights: take the weights and norm statistics back; moments start afresh. What is masked stays zero.
        masks: take the masks back too, instead of keeping the present ones.
        clock: go on at the snapshot's place in the training, for its learning rate and batches, with fresh moments.
    """

    tag: str
    weights: bool = True
    masks: bool = False
    clock: bool = False


@dataclass(frozen=True)
class Shrink:
    """Take out of the network what the masks remove; moments and snapshots go along. Answer: the new `Problem`."""


@dataclass(frozen=True)
class Project:
    """Renew, for every constraint set of the granularity, the projection Z of W + U and the scaled dual U += W - Z.

    The first one begins with U = 0 and makes Z alone. See `prune_cli/training/admm.py`.

    Answer: `{name of the set: {"primal", "dual"}}`: residuals over all weights; None where there is none.

    Attributes:
        rho: weight of the penalty in the training that follows.
        kept: units that stay in each group, instead of what the granularity asks for.
    """

    rho: float
    kept: Kept | None = None


ACCEPTED = "accepted"


@dataclass(frozen=True)
class Judge:
    """Say what became of the candidates of the last `Evaluate`, for the search's table. Answer: None.

    Attributes:
        verdicts: one per candidate: `accepted`, or the reason why not. Where a search says nothing, the table has what can
            be seen: whether it was adopted, or cost too much.
    """

    verdicts: Sequence[str]


@dataclass(frozen=True)
class Leave:
    """Leave a file in the stage's folder when it is done. Answer: None.

    Attributes:
        name: of the file.
        content: what is in it.
    """

    name: str
    content: bytes


Request = Mask | Train | Regrow | Evaluate | Remember | Restore | Shrink | Project | Judge | Leave

LOOKING = (Evaluate, Judge, Leave)
"""Requests that are about candidates and files."""


def changes(request: Request) -> bool:
    """Whether the network, its masks or what belongs to them may be others after a request."""
    return request.adopt if isinstance(request, Evaluate) else not isinstance(request, LOOKING)


def fingerprint(request: Request) -> str:
    """16 hex digits that are equal for equal requests; a schedule whose code changed asks something else."""
    text = json.dumps([type(request).__name__, asdict(request)], sort_keys=True, default=bytes.hex)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
