"""`python -m chaos`: inject faults into three instances on real servers, then check exactness.

It prints the injected faults and what was compared. Its exit status is 1 on any difference, and 2
when the servers cannot be started.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence

from cerberus import stack
from chaos import cluster, runs, stage


def main() -> int:
    """Run once and return the exit status."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument(
        "--events", type=int, default=200_000, help="records during the faults (200000)"
    )
    parser.add_argument("--kills", type=int, default=15, help="instances killed by SIGKILL (15)")
    parser.add_argument("--seed", type=int, default=7, help="seed of all random choices (7)")
    chosen = parser.parse_args()
    if chosen.events < 1_000 or chosen.kills < 3:
        parser.error("--events must be at least 1000, --kills at least 3")
    plan = runs.default(chosen.events, chosen.kills, chosen.seed)

    async def run(
        servers: stack.Stack, environ: Mapping[str, str], directory: pathlib.Path
    ) -> Sequence[str]:
        setup = cluster.Setup(runs.USERS)
        async with cluster.opened(servers, environ, directory, setup) as target:
            told = await runs.run(target, plan, functools.partial(print, flush=True))
        print(runs.table(told), flush=True)
        return told.differences

    return stage.on_servers("chaos", run)


if __name__ == "__main__":
    sys.exit(main())
