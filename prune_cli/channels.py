"""The structural engine from Python: `analyse(model, example_inputs)` gives the plan of a network.

The plan says which channels belong together and what any choice of them costs, by arithmetic alone; `structure/` is
the engine itself.
"""

from prune_cli.structure.follow import analyse
from prune_cli.structure.plan import Plan

__all__ = ["Plan", "analyse"]
