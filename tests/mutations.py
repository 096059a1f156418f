"""Forty bugs that the tests must notice: each is put into a copy of the package, and named test files are run there.

    python -m tests.mutations [--tier default|all] [--only NAME ...] [--whole] [--check]

By hand, about ten minutes on two cores. A line a mutation says which test noticed it in which tier, the last line how
many were noticed; it ends with 1 where one was not. `--whole` runs a whole tier where the named files notice nothing;
`--check` runs the named files as they are, without any mutation: they have to pass.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
TIERS = {"default": "not process and not long", "process": "process and not long"}
LIMIT, TIER_LIMIT = 600, 3600  # seconds of the named files, and of a whole tier

# A mutation is its name, a file of the package and the test files that are to notice it; then, as in a diff, what
# stands exactly once in that file, and what takes its place. Where code or tests move, the paths here move with them.
TABLE = r"""
# data
= lanes-mixed-in-a-batch: ssl_vit/data/plan.py, tests/data/test_plan.py
-slots = np.argsort(lane, kind="stable")[rank
+slots = np.arange(count)[rank
= lane-ends-a-sample-early: ssl_vit/data/plan.py, tests/data/test_plan.py
-last = (lane + 1) * base + min(lane + 1, remainder)
+last = (lane + 1) * base + min(lane, remainder)
= seed-without-epoch: ssl_vit/rng.py, tests/test_rng.py
-key(seed, "sample", epoch, sample)
+key(seed, "sample", sample)
= evaluation-mirrors-images: ssl_vit/data/dataset.py, tests/data/test_loader.py
-flip = self.training and self.config.flip
+flip = self.config.flip
= exif-orientation-ignored: ssl_vit/data/decode.py, tests/data/test_decode.py
-image = ImageOps.exif_transpose(image)
+image = image.copy()
= cache-takes-other-bytes: ssl_vit/data/remote.py, tests/data/test_remote.py tests/data/test_cache.py
-if sha256 and digest_of(temp_path) != sha256:
+if sha256 and size is None and digest_of(temp_path) != sha256:
= replaced-samples-not-counted-as-bad: ssl_vit/data/dataset.py, tests/data/test_damage.py
-self.pending += faults
+self.pending += [fault for fault in faults if fault.substitute is None]
= tar-padding-cut-off: ssl_vit/data/tar.py, tests/data/test_tar.py
-offset = data_offset + -(-length // BLOCK) * BLOCK
+offset = data_offset + length // BLOCK * BLOCK
= split-depends-on-other-images: ssl_vit/convert/image_list.py, tests/convert/test_make_shards.py
-key("split", name) < limit
+key("split", names.index(name)) < limit
= held-out-part-is-trained-on: ssl_vit/data/loader.py, tests/data/test_loader.py
-return np.sort(ids[: len(ids) - num_holdout]),
+return np.sort(ids),
= workers-outlive-their-process: ssl_vit/runtime.py, tests/convert/test_scale.py
-    set_parent_death_signal(signal.SIGKILL)
+    pass
= manifest-before-what-stands-beside-it: ssl_vit/convert/make_shards.py, tests/convert/test_scale.py
-    if rejects:
-        job.target.write(REJECTS
+    job.target.write(FILE, manifest.encode(made))
+    if rejects:
+        job.target.write(REJECTS
# train
= resume-one-sample-off: ssl_vit/train/loop.py, tests/train/test_loop.py
-task.stream.batches(first_batch * config.batch,
+task.stream.batches(first_batch * config.batch + (step > 0),
= gradients-not-clipped: ssl_vit/train/engine.py, tests/train/test_optim.py
-math.inf if clip is None else clip
+math.inf
= biases-and-norms-decay: ssl_vit/train/optim.py, tests/train/test_optim.py
-{"params": no_decay, "weight_decay": 0.0,
+{"params": no_decay, "weight_decay": weight_decay,
= rate-acts-a-step-late: ssl_vit/train/optim.py, tests/train/test_optim.py
-group["lr"] = lr * group.get("scale", 1.0)
+group["lr"], group["due"] = group.get("due", group["lr"]), lr * group.get("scale", 1.0)
= checkpoint-digests-not-compared: ssl_vit/train/checkpoint.py, tests/train/test_checkpoint.py
- != entry["bytes"] or sha256(folder / name) != entry["sha256"]:
+ != entry["bytes"]:
= nan-step-skipped-by-one-rank: ssl_vit/train/engine.py, tests/train/test_anomalies.py
-self.optimizer.found_inf = (~norm.isfinite()).float()
+mine = self._copies() == 1 or torch.distributed.get_rank() == 0
+            self.optimizer.found_inf = (~norm.isfinite()).float() * mine
= watchdog-names-another-rank: ssl_vit/train/watchdog.py, tests/train/test_watchdog.py
-names = [f"rank {rank} on {status['host']}"
+names = [f"rank {rank + 1} on {status['host']}"
= allow-change-ignored: ssl_vit/train/run_folder.py, tests/train/test_run_folder.py tests/train/test_anomalies.py
-changed.items() if name not in allowed}
+changed.items()}
= signal-ends-with-another-code: ssl_vit/train/loop.py, tests/train/test_signals.py
-return ExitError(ExitCode.PREEMPTED, text, shared=True)
+return ExitError(DISK, text, shared=True)
= checkpoint-before-its-manifest: ssl_vit/train/checkpoint.py, tests/train/test_kill_points.py
-        write_bytes(draft / MANIFEST, _encode_manifest(content).encode())
-        fault_injection.fault_point("save.written", step)
-        if target.exists():
-            shutil.rmtree(target)
-        os.rename(draft, target)
+        if target.exists():
+            shutil.rmtree(target)
+        os.rename(draft, target)
+        write_bytes(target / MANIFEST, _encode_manifest(content).encode())
+        fault_injection.fault_point("save.written", step)
# heads
= masked-and-kept-exchanged: ssl_vit/heads/corruption.py, tests/heads/test_corruption.py
-fate = ((slot >= masked).long() + (slot >= masked + swapped))
+fate = (2 - (slot >= masked).long() - (slot >= masked + swapped).long())
= colors-by-their-lowest-bits: ssl_vit/heads/mean_color.py, tests/heads/test_masked_prediction.py
-level = ((total << bits) // (255 * patch * patch)).clamp(max=(1 << bits) - 1)
+level = (total // (patch * patch)) & ((1 << bits) - 1)
= loss-over-all-patches: ssl_vit/heads/masked_prediction.py, tests/heads/test_masked_prediction.py
-            select=masking.index + encoder.prefix,
-        )
+        )[:, encoder.prefix :]
+        every = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
+        masking = corruption.Corruption(every, every, every)
= cells-in-the-order-of-the-image: ssl_vit/heads/mean_color.py, tests/heads/test_masked_prediction.py
-return cells.transpose(2, 3).flatten(3).flatten(1, 2)
+return cells.flatten(1).unflatten(1, (rows * columns, CELLS**2))
= padding-in-the-reported-loss: ssl_vit/heads/masked_prediction.py, tests/heads/test_masked_prediction.py
-"loss": (loss * valid).sum()
+"loss": loss.sum()
= unlabeled-images-carry-loss: ssl_vit/heads/classifier.py, tests/heads/test_classifier.py
-batch["valid"] & (batch["label"] >= 0)
+batch["valid"]
# encoders
= positions-resized-transposed: ssl_vit/encoders/layers.py, tests/encoders/test_positions.py
-reshape(1, *old, -1)
+reshape(1, *reversed(old), -1)
= attention-scaled-by-all-heads: ssl_vit/encoders/vit.py, tests/encoders/test_vit.py
-F.scaled_dot_product_attention(*self.qkv(x, select))
+F.scaled_dot_product_attention(*self.qkv(x, select), scale=x.shape[2] ** -0.5)
= class-token-last: ssl_vit/encoders/vit.py, tests/encoders/test_vit.py
-torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
+torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], dim=1)
= names-are-not-timms: ssl_vit/encoders/export.py, tests/encoders/test_export.py
-name.removeprefix(prefix): v.detach()
+name.removeprefix(prefix).replace("norm.", "ln."): v.detach()
= relative-positions-mirrored: ssl_vit/encoders/layers.py, tests/encoders/test_positions.py
-keys = offsets[position[:, None] - position +
+keys = offsets[position - position[:, None] +
= strange-weights-dropped-in-silence: ssl_vit/encoders/weights.py, tests/encoders/test_formats.py
-(report.missing or report.mismatched or unexpected)
+(report.missing or report.mismatched)
# evaluate
= knn-without-temperature: ssl_vit/evaluate/knn.py, tests/evaluate/test_protocols.py
-((similarity - similarity[:, :1]) / temperature).exp()
+(similarity - similarity[:, :1]).exp()
= few-shot-without-intercept: ssl_vit/evaluate/few_shot.py, tests/evaluate/test_protocols.py
-x.new_full((len(x), 1), CONSTANT)
+x.new_zeros((len(x), 1))
= rollout-backwards: ssl_vit/evaluate/attention.py, tests/evaluate/test_attention.py
-else attention @ self.joint
+else self.joint @ attention
= padding-counts-in-evaluation: ssl_vit/evaluate/evaluators.py, tests/evaluate/test_features.py
-{**output.sums, "_weight": output.weight}
+{**output.sums, "_weight": output.weight * 0 + len(batch["valid"])}
= interval-of-90-percent: ssl_vit/evaluate/metrics.py, tests/evaluate/test_metrics.py
-[(1 - level) / 2, (1 + level) / 2]
+[1 - level, level]
= imagenet-counted-from-0: ssl_vit/evaluate/label_sets.py, tests/evaluate/test_classifiers.py
-indices = [int(match[1]) - 1 for
+indices = [int(match[1]) for
"""


@dataclass(frozen=True)
class Mutation:
    """In `file`, `new` in the place of `old`, and the test files that are to notice it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def parse_mutations(table: str) -> list[Mutation]:
    """The mutations of the table."""
    mutations = []
    for block in re.split(r"^= ", table, flags=re.MULTILINE)[1:]:
        head, *lines = block.splitlines()
        name, file, *tests = re.split(r"[:,]? ", head)
        old, new = ("\n".join(line[1:] for line in lines if line.startswith(sign)) for sign in "-+")
        mutations.append(Mutation(name, file, old, new, tuple(tests)))
    return mutations


def copy_checkout(checkout: Path, root: Path) -> None:
    """Copy the working tree as it is, without what git ignores."""
    command = ["git", "-C", str(checkout), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0"):
        if (checkout / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkout / name, root / name)


def apply_mutation(root: Path, mutation: Mutation) -> str:
    """The text of a file with its mutation."""
    text = (root / mutation.file).read_text()
    if text.count(mutation.old) != 1 or mutation.old == mutation.new:
        raise SystemExit(
            f"{mutation.name}: {mutation.old!r} stands {text.count(mutation.old)} times in {mutation.file}"
        )
    return text.replace(mutation.old, mutation.new)


def first_failure(root: Path, tests: tuple[str, ...], marker: str, limit: int, workers: int = 0) -> str | None:
    """The first test that fails in the copy, or None."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", str(workers), "-m", marker, *tests]
    # the copy comes before the installed package, also in processes; no cache hides what changed within a second
    env = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output_file:
        options = {"stdout": output_file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, cwd=root, env=os.environ | env, **options)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"not through after {limit} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output_file.seek(0)
        output = output_file.read()
    if code in (0, 5):  # passed, or there is no such test in this tier
        return None
    match = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, flags=re.MULTILINE)
    if match is None:
        raise SystemExit(f"pytest ended with {code}, and names no test:\n{output[-2000:]}")
    return match[1]


def find_failing_test(root: Path, mutation: Mutation, tiers: list[str], whole_tier: bool) -> tuple[str, str] | None:
    """The tier in which a mutation is noticed and the test that does, or None."""
    path = root / mutation.file
    text = path.read_text()
    path.write_text(apply_mutation(root, mutation))
    try:
        for tier in tiers:
            test = first_failure(root, mutation.tests, TIERS[tier], LIMIT)
            if test is None and whole_tier:
                test = first_failure(root, ("tests",), TIERS[tier], TIER_LIMIT, workers=2)
            if test is not None:
                return tier, test
    finally:
        path.write_text(text)
    return None


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tier", choices=("default", "all"), default="all")
    mutations = parse_mutations(TABLE)
    names = [mutation.name for mutation in mutations]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help="these mutations alone")
    parser.add_argument("--whole", action="store_true", help="where the named files notice nothing, run the whole tier")
    parser.add_argument("--check", action="store_true", help="run the named files without a mutation")
    args = parser.parse_args()
    tiers = [name for name in TIERS if args.tier in (name, "all")]
    selected = [mutation for mutation in mutations if mutation.name in args.only]
    noticed_tiers: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = Path(folder)
        copy_checkout(CHECKOUT, root)
        for mutation in selected:
            apply_mutation(root, mutation)  # all of them, before any takes its time
        if args.check:
            files = sorted({name for mutation in selected for name in mutation.tests})
            failures = [
                (name, tier, first_failure(root, (name,), TIERS[tier], LIMIT)) for name in files for tier in tiers
            ]
            failures = [failure for failure in failures if failure[2]]
            print(*failures or ["the named files pass"], sep="\n")
            return bool(failures)
        for mutation in selected:
            start_time = time.monotonic()
            tier, test = find_failing_test(root, mutation, tiers, args.whole) or ("", "NOT NOTICED")
            noticed_tiers += [tier] if tier else []
            print(f"{mutation.name:<40} {tier:<8} {test}  {time.monotonic() - start_time:.0f} s", flush=True)
    counts = {"default": noticed_tiers.count("default"), "all": len(noticed_tiers)}
    print("; ".join(f"{name}: {counts[name]} of {len(selected)}" for name in counts if args.tier in (name, "all")))
    return len(noticed_tiers) < len(selected)


if __name__ == "__main__":
    sys.exit(main())
