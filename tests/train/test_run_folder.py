"""A run's folder: in use by another start, begun with another or a damaged recipe, by other numbers of processes."""

import itertools
import json
import shutil

import pytest

from ssl_vit.exits import CANNOT_CREATE, MISMATCH, USAGE
from ssl_vit.train import checkpoint
from ssl_vit.train.optim import learning_rate
from tests import runs
from tests.starts import call
from tests.train.scenarios import HOST, KILLED, LIMIT, Scenario, Stage, ranks

# two at once


RANKS = [pytest.param(*both, marks=[pytest.mark.process, pytest.mark.ranks]) for both in ((1, 2), (2, 1), (2, 2))]


@pytest.mark.parametrize(("holder", "world"), [(1, 1), *RANKS])
def test_a_folder_is_one_runs_at_a_time(stage: Stage, holder: int, world: int):
    """C14: the second is refused at once with who has it; killed with -9, the first leaves the folder free."""
    first = stage.start(holder, "hang:point=batch:step=9")
    first.until(lambda: 7 in runs.saved(stage.run))
    held = [stage.run / name for name in ("recipe.yaml", "metrics.jsonl")]
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in held]
    line = f"in use by pid {first.processes[0].pid} since .* on {HOST}"
    for more in ((), ("fresh=true",)):
        stage.play(Scenario((CANNOT_CREATE,) * world, "", line, says=("pretrain",), words=more, held=False))
    assert not (stage.run / "exit.json").exists()  # it is the holder's to write
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in held] == before
    assert all(process.is_alive() for process in first.processes)
    first.kill()
    assert first.wait() == [KILLED] * holder
    stage.finish(world)


@pytest.mark.process
def test_of_many_starts_at_once_one_trains(stage: Stage):
    starts = [stage.start() for _ in range(4)]
    codes = sorted(code for start in starts for code in start.wait(LIMIT))
    assert codes[0] == 0
    assert set(codes[1:]) <= {0, CANNOT_CREATE}  # a late one finds it done
    stage.as_in_peace(stage.tiny_run(1))


# recipes


def test_another_recipe_is_shown_key_by_key(stage: Stage):
    """B6: 78 before any weight is touched; safe keys may be allowed by name, others are no such keys (64).

    What a checkpoint holds never brings old rates back in silence, nor new ones: old -> new is said (D7).
    """
    stage.stop("loss:step=9")
    before = runs.state(stage.run), (stage.run / "recipe.yaml").read_bytes()

    def refused(*more: str, code: int = MISMATCH) -> str:
        played = stage.play(Scenario((code,), "", "pretrain.py: ", words=more, held=code == MISMATCH))
        assert (runs.state(stage.run), (stage.run / "recipe.yaml").read_bytes()) == before
        return played.said

    lr, steps = "optim.lr: 0.001 -> 0.5", "steps: 30 -> 40"
    line = refused("encoder.width=32", "optim.lr=0.5", "optim.kind=sgd", "data.flip=false", "seed=7")
    assert all(part in line for part in ("encoder.width: 16 -> 32", lr, "optim.kind: adamw -> sgd", "seed: 0 -> 7"))
    line = refused("optim.lr=0.5", "steps=40")
    assert all(part in line for part in (lr, steps))
    assert "allow_change=optim.lr" in line or "allow_change=steps" in line  # the way on
    line = refused("optim.lr=0.5", "steps=40", "allow_change=steps")
    assert (lr in line, steps in line) == (True, False)
    for name in ("encoder.width", "seed", "data.train", "optim.kind", "nonsense", "optim"):
        assert name in refused("encoder.width=32", f"allow_change=steps,{name}", code=USAGE)

    changed = ("optim.lr=0.002", "optim.betas=0.8,0.99")
    said = stage.finish(1, *changed, "allow_change=optim.lr,optim.betas")
    assert [said.count(line) for line in ("optim.lr: 0.001 -> 0.002", "optim.betas: ")] == [1, 1]
    rates = {row["step"]: row["lr"] for row in runs.rows(stage.run)}
    for step, rate in ((6, 0.001), (9, 0.002), (30, 0.002)):
        assert rates[step] == learning_rate(step - 1, rate, runs.STEPS, 2)
    assert b"lr: 0.002" in (stage.run / "recipe.yaml").read_bytes()
    assert runs.differing(runs.state(stage.tiny_run(1)), runs.state(stage.run))
    stage.finish(1, *changed)  # it is the run's recipe now
    assert "steps: 30 -> 32" in stage.finish(1, *changed, "steps=32", "allow_change=steps")
    assert runs.rows(stage.run)[-1]["step"] == 32


@ranks(2)
def test_another_recipe_is_refused_by_all_ranks(stage: Stage, world: int):
    stage.stop("loss:step=9")
    line = r"encoder\.width: 16 -> 32.*optim\.lr: 0\.001 -> 0\.5"
    stage.play(Scenario((MISMATCH,) * world, "", line, words=("encoder.width=32", "optim.lr=0.5"), saved=7))


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n"  # a billion of them
ALIASES += "".join(
    f"{name}: &{name} [{','.join([f'*{last}'] * 9)}]\n" for last, name in itertools.pairwise("abcdefghij")
)
DAMAGED = [b"", bytes(range(256)), None, b"- a\n- b\n", b"hello", b"encoder: &a\n  width: *a\n", ALIASES.encode()]
DAMAGED += [b"!!python/object/apply:os.system ['touch canary']\n"]  # and None is a half


def test_a_damaged_recipe_does_not_pass_for_the_runs(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    """78 and its path, never a start anew, never a traceback; brought back, the run goes on."""
    monkeypatch.chdir(stage.folder)
    stage.stop("loss:step=9")
    path = stage.run / "recipe.yaml"
    text = path.read_bytes()
    for content in DAMAGED:
        path.write_bytes(text[: len(text) // 2] if content is None else content)
        played = stage.play(Scenario((MISMATCH,), "", "recipe.yaml|->", saved=7))
        assert len(played.said) < 5000
    assert not list(stage.folder.rglob("canary"))
    path.write_bytes(text)
    stage.finish()
    stage.as_in_peace(stage.tiny_run(1))


def test_a_fresh_start_puts_the_old_aside(stage: Stage):
    """fresh=true: nothing is deleted, all begins anew; a launcher's restart of it goes on."""
    stage.stop("loss:step=9", "fresh=true")
    old = runs.state(stage.run)
    stage.stop("loss:step=5", "fresh=true", "seed=3", "encoder.width=32")  # nor is the recipe bound
    (first,) = stage.run.glob("before-*")
    assert runs.state(first) == old
    assert [row["step"] for row in runs.rows(first)] == [3, 6]
    stage.stop("loss:step=9", "fresh=true")
    assert len([*stage.run.glob("before-*")]) == 2
    end = call("pretrain", stage.words("fresh=true"), TORCHELASTIC_RESTART_COUNT="1")
    assert end.code == 0, end.said
    assert len([*stage.run.glob("before-*")]) == 2
    stage.as_in_peace(stage.tiny_run(1))


# ranks, workers


@pytest.mark.process
@pytest.mark.ranks
def test_another_number_of_processes_goes_on(stage: Stage):
    """B7: 2, 1, 3, 2 ranks, one after the other: the same global batches, losses equal to rounding."""
    more = ("batch=12", "log_every=1", "encoder.dropout=0", "save_every=2", "steps=20")
    stage.at("straight").finish(1, *more)
    for world, step in ((2, 5), (1, 9), (3, 15)):
        stage.play(Scenario((KILLED,) * world, f"kill:point=update:step={step}", cut=True, words=more))
        if step == 5:
            assert_same_weights(stage, more)
        assert json.loads((runs.last(stage.run) / "MANIFEST.json").read_text())["world"] == world
    stage.finish(2, *more)
    for found, wanted in zip(runs.rows(stage.run), runs.rows(stage.at("straight").run), strict=True):
        for name in ("step", "samples_seen", "samples_digest", "bad_samples", "lr"):
            assert found[name] == wanted[name]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    refused = stage.begin(Scenario((USAGE,) * 5, words=more))
    assert refused.codes == [USAGE] * 5, refused.said


def assert_same_weights(stage: Stage, more: tuple[str, ...]) -> None:
    """Loaded by another number of processes, the weights are the same bits: at a rate of 0 they stay so."""
    for world in (1, 3):
        one = stage.at(f"on-{world}")
        shutil.copytree(stage.run, one.run)
        still = (*more, "optim.lr=0", "allow_change=optim.lr", "keep=9")
        one.play(Scenario((KILLED,) * world, "kill:point=update:step=9", cut=True, words=still))
        before, after = (checkpoint.weights(one.run / "checkpoints" / f"step-{step:08d}") for step in (4, 8))
        assert before.keys() == after.keys()
        assert all(before[name].equal(after[name]) for name in before)


@pytest.mark.process
def test_another_number_of_workers_changes_nothing(stage: Stage):
    """B8: 1, 2, 0 loader workers; killed with them, there are no orphans."""
    for workers, step in ((1, 9), (2, 16)):
        stage.play(Scenario((KILLED,), f"kill:point=update:step={step}", words=(f"data.workers={workers}",)))
    stage.finish(1, "data.workers=0")
    stage.as_in_peace(stage.tiny_run(1))
