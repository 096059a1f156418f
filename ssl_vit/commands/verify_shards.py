"""Compare shards with their manifest: tools/verify_shards.py shards=FOLDER|URL [full=true]

Names every missing, short, grown or altered shard and says how many of its samples can be read; exit code 65 where
there is one.
"""

from ssl_vit.convert.index_shards import VerifyShards as Config
from ssl_vit.convert.index_shards import verify_all_shards
from ssl_vit.errors import ExitCode, ExitError


def run(options: Config) -> int:
    """Print one line per bad shard; returns the exit code, or raises ExitError(DATA) if there is one."""
    states = verify_all_shards(options)
    bad = [state for state in states if state.fault]
    for state in bad:
        print(f"{state.shard}: {state.fault}: {state.readable} of {state.samples} samples readable")
    samples, readable = (sum(getattr(state, name) for state in states) for name in ("samples", "readable"))
    method = "by sha256" if options.full else "by size (full=true compares every byte)"
    summary = (
        f"{len(states) - len(bad)} of {len(states)} shards are whole {method}, {readable} of {samples} samples readable"
    )
    if bad:
        raise ExitError(ExitCode.DATA, f"{summary}; make or fetch the {len(bad)} others again")
    print(summary)
    return 0
