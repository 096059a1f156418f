"""Compare shards with their manifest: tools/verify_shards.py shards=FOLDER|URL [full=true]

Names every missing, short, grown or altered shard and says how many of its samples can be read; exit code 65 where
there is one.
"""

import sys
from pathlib import Path

from ssl_vit import config, errors
from ssl_vit.convert.index_shards import VerifyShards, verify
from ssl_vit.errors import DATA, Refusal


def main(arguments: list[str]) -> int:
    if config.usage(arguments):
        print(f"{__doc__}\n\n{config.describe(VerifyShards)}")
        return 0
    options = config.parse(VerifyShards, arguments, Path("recipes"))
    found = verify(options)
    bad = [state for state in found if state.fault]
    for state in bad:
        print(f"{state.shard}: {state.fault}: {state.readable} of {state.samples} samples readable")
    samples, readable = (sum(getattr(state, name) for state in found) for name in ("samples", "readable"))
    how = "by sha256" if options.full else "by size (full=true compares every byte)"
    summary = (
        f"{len(found) - len(bad)} of {len(found)} shards are whole {how}, {readable} of {samples} samples readable"
    )
    if bad:
        raise Refusal(DATA, f"{summary}; make or fetch the {len(bad)} others again")
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
