"""tools/slurm.sbatch and tools/launch_ssh.sh, with stubs in place of Slurm, ssh and the launcher.

What the real ones do was seen first (docs/scaling.md); the stubs copy it: srun gives a signal to every process of a
step, a launcher ends with 1 whatever its ranks end with, and a start that is refused early writes no exit.json.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import living_pids

ROOT = Path(__file__).parent.parent
TIMEOUT = 60  # seconds
STUBS = {
    "srun": """#!/bin/bash
        until [[ $1 == bash ]]; do shift; done
        trap 'kill -USR2 $first $second' USR2
        SLURM_NODEID=0 "$@" & first=$!
        SLURM_NODEID=1 "$@" & second=$!
        for each in $first $second; do while wait $each; status=$?; kill -0 $each 2>/dev/null; do :; done; done
        exit $status""",
    "scontrol": """#!/bin/bash
        case $1.$2 in
        show.hostnames) printf 'n0\\nn1\\n' ;;
        show.job) echo "JobId=7 JobState=$(cat "$STUBS/state") Reason=None" ;;
        *) echo "$*" >>"$STUBS/requeued" ;;
        esac""",
    "ssh": """#!/bin/sh
        while [ "$1" = -o ]; do shift 2; done
        echo "$1" >>"$STUBS/hosts"
        [ "$1" != down ] || exit 255
        exec sh -c "$2" """,
    "nvidia-smi": "#!/bin/sh\nprintf '1\\n2\\n3\\n4\\n'",
    "sleep": "#!/bin/sh\nexec /bin/sleep 0.01",
    "python": """#!/bin/sh
        echo "$WORLD_SIZE $*" >"$STUBS/dry_run"
        exit "$(cat "$STUBS/refused")" """,
    "accelerate": f"""#!{sys.executable} -IS
import json, os, signal, sys, time
from pathlib import Path
stubs, words = Path(os.environ["STUBS"]), sys.argv[1:]
rank = words[words.index("--machine_rank") + 1]
def end(code):
    if code is not None and rank == "0":
        run = next(Path(word[4:]) for word in words if word.startswith("run="))
        ended = {{"code": code, "step": 3, "reason": f'it "said" {{code}}'}}
        (run / "exit.json").write_text(json.dumps(ended, indent=1))
    os._exit(code != 0)
before = {{number.name: signal.signal(number, lambda *_: end(75)) for number in (signal.SIGTERM, signal.SIGUSR2)}}
ignored = [name for name, old in before.items() if old is signal.SIG_IGN]
(stubs / f"launch-{{rank}}.tmp").write_text(json.dumps([ignored, words]))
(stubs / f"launch-{{rank}}.tmp").rename(stubs / f"launch-{{rank}}.json")
plan = json.loads((stubs / "plan").read_text())
if plan == "wait":
    time.sleep(60)
end(plan)
""",
}


@pytest.fixture
def stubs(tmp_path: Path) -> Iterator[Path]:
    """A folder of stubs, beside `the place`, from where the scripts are started; afterwards no process may be left."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, text in (STUBS | {"state": "RUNNING", "refused": "0"}).items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "the place").mkdir()
    (tmp_path / "the place" / "tools").symlink_to(ROOT / "tools")
    yield folder
    groups = {int(path.name.removeprefix("group-")) for path in folder.glob("group-*")}
    wait_until(lambda: not living_pids(groups), "a process was left behind")


def wait_until(condition: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.01)


def start_script(stubs: Path, plan: object, *args: str) -> subprocess.Popen[str]:
    """Start a script; `plan` is the code that rank 0 writes and ends with, null for a crash, or "wait" for a signal."""
    (stubs / "plan").write_text(json.dumps(plan))
    slurm_env = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_NODELIST": "n[0-1]",
    }
    env = {"PATH": f"{stubs}:/usr/bin:/bin", "STUBS": str(stubs), **slurm_env}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    command = ["env", "--default-signal", "bash", *args]
    process = subprocess.Popen(command, cwd=stubs.parent / "the place", env=env, **pipes)
    (stubs / f"group-{process.pid}").touch()
    return process


def finish_script(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and closing line."""
    out, errors = process.communicate(timeout=TIMEOUT)
    assert errors in ("", "Hangup\n")  # bash says so of its sleep, where a terminal closes
    return process.returncode, out.splitlines()[-1]


def launcher_calls(stubs: Path) -> list[list]:
    """What the two launchers were given, once both run: the signals they ignore, and their words."""
    files = [stubs / "launch-0.json", stubs / "launch-1.json"]
    wait_until(lambda: all(file.exists() for file in files), "they do not run")
    return [json.loads(file.read_text()) for file in files]


SLURM_COMMAND = ("tools/slurm.sbatch", "recipe=mpp", "run=my run", "data.train=it's $HOME")
SSH_COMMAND = ("tools/launch_ssh.sh", "a,me@b", *SLURM_COMMAND[1:])
STOPPED_LINE = 'launch_ssh.sh: ended with code 75: it \\"said\\" 75'


def launcher_args(rank: int, address: str, port: str) -> list[str]:
    cluster_args = f"--num_machines 2 --num_processes 8 --main_process_ip {address} --main_process_port {port}".split()
    machine_args = ["launch", "--machine_rank", str(rank), "--config_file", "accelerate_config.yaml", *cluster_args]
    return [*machine_args, "tools/pretrain.py", *SLURM_COMMAND[1:]]


def test_a_job_that_is_done_ends_with_0(stubs: Path):
    assert finish_script(start_script(stubs, 0, *SLURM_COMMAND)) == (0, "slurm.sbatch: job 7: done")
    # a step's signal reaches launchers and ranks alike: the former must leave it to the latter
    assert launcher_calls(stubs) == [[["SIGTERM", "SIGUSR2"], launcher_args(rank, "n0", "10007")] for rank in (0, 1)]
    assert not (stubs / "requeued").exists()


@pytest.mark.process
@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_warned_job_saves_and_is_requeued_unless_it_was_canceled(stubs: Path, state: str, requeued: bool):
    process = start_script(stubs, "wait", *SLURM_COMMAND)
    launcher_calls(stubs)
    (stubs / "state").write_text(state)
    process.send_signal(signal.SIGUSR2)
    code, line = finish_script(process)
    assert line.startswith('slurm.sbatch: job 7: it \\"said\\" 75; ' + ("requeued" if requeued else "not requeued"))
    assert (code, (stubs / "requeued").exists()) == ((0, True) if requeued else (75, False))


@pytest.mark.process
def test_a_refusal_is_not_requeued(stubs: Path):
    last_line = 'slurm.sbatch: job 7: ended with code 78: it \\"said\\" 78; not requeued'
    assert finish_script(start_script(stubs, 78, *SLURM_COMMAND)) == (78, last_line)
    # one that came before the folder was held leaves the exit.json of an earlier start
    (stubs.parent / "the place" / "my run" / "exit.json").write_text('{\n "code": 75,\n')
    (stubs / "refused").write_text("64")
    last_line = "slurm.sbatch: job 7: refused with code 64, see above; not requeued"
    assert finish_script(start_script(stubs, None, *SLURM_COMMAND)) == (64, last_line)
    assert (stubs / "dry_run").read_text() == f"8 tools/pretrain.py {' '.join(SLURM_COMMAND[1:])} dry_run=true\n"
    assert not (stubs / "requeued").exists()


@pytest.mark.process
@pytest.mark.parametrize("crash", [None, 70])
def test_a_crash_is_requeued_a_few_times_without_progress(stubs: Path, crash: int | None):
    def exit_codes(starts: int) -> list[int]:
        return [finish_script(start_script(stubs, crash, *SLURM_COMMAND))[0] for _ in range(starts)]

    assert exit_codes(3) == [0, 0, 70]
    (stubs.parent / "the place" / "my run" / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert exit_codes(3) == [0, 0, 70]
    assert (stubs / "requeued").read_text() == "requeue 7\n" * 4


@pytest.mark.process
def test_the_run_folder_is_the_recipes_and_the_tool_is_the_first_word(stubs: Path):
    args = ["tools/finetune.py", "recipe=../other/mpp_v1.yaml", "steps=2"]
    _, errors = start_script(stubs, 0, "tools/slurm.sbatch", *args).communicate(timeout=TIMEOUT)
    assert "StopIteration" in errors  # the stub of rank 0 has no run= to write to
    assert (stubs.parent / "the place" / "runs" / "mpp_v1").is_dir()
    assert launcher_calls(stubs)[1][1][-3:] == args


def test_hosts_that_are_done_end_with_0(stubs: Path):
    (stubs / "list").write_text("# the lab\na slots=4\n\nme@b # new\n")
    process = start_script(stubs, 0, SSH_COMMAND[0], str(stubs / "list"), *SSH_COMMAND[2:])
    assert finish_script(process) == (0, "launch_ssh.sh: done")
    port = str(10000 + process.pid % 20000)
    assert [args for _, args in launcher_calls(stubs)] == [launcher_args(rank, "a", port) for rank in (0, 1)]
    assert set((stubs / "hosts").read_text().split()) == {"a", "me@b"}


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_stopped_script_stops_its_hosts(stubs: Path, number: signal.Signals):
    process = start_script(stubs, "wait", *SSH_COMMAND)
    launcher_calls(stubs)
    from_terminal = number in (signal.SIGINT, signal.SIGHUP)  # which signals the whole group
    (os.killpg if from_terminal else os.kill)(process.pid, number)
    if number == signal.SIGKILL:  # the fixture sees that the launchers end
        process.communicate(timeout=TIMEOUT)
    else:
        assert finish_script(process) == (75, STOPPED_LINE)


@pytest.mark.process
def test_where_a_host_fails_the_others_are_stopped(stubs: Path):
    process = start_script(stubs, "wait", SSH_COMMAND[0], "a,down,b", *SSH_COMMAND[2:])
    out, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, errors) == (75, "")
    assert out.splitlines()[1:] == ["launch_ssh.sh: down failed; stopping the others", STOPPED_LINE]


@pytest.mark.process
def test_hosts_refusals_and_crashes(stubs: Path):
    assert finish_script(start_script(stubs, 78, *SSH_COMMAND)) == (
        78,
        'launch_ssh.sh: ended with code 78: it \\"said\\" 78',
    )
    code, line = finish_script(start_script(stubs, None, *SSH_COMMAND))
    assert code == 70
    assert line.endswith(" failed, see above; the same command goes on from the last checkpoint")
    (stubs / "refused").write_text("64")
    assert finish_script(start_script(stubs, None, *SSH_COMMAND)) == (
        64,
        "launch_ssh.sh: refused with code 64, see above",
    )
    assert finish_script(start_script(stubs, 0, SSH_COMMAND[0], "down", *SSH_COMMAND[2:]))[0] == 70
