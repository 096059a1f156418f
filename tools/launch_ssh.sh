#!/bin/bash
# shellcheck disable=SC2016  # what stands in single quotes is expanded on the host
# Trains on a list of hosts over ssh. From the repository's folder:
#
#   tools/launch_ssh.sh HOSTS [tools/finetune.py] recipe=NAME key=value ...
#
# HOSTS is a file with a host a line, or host,host,... as ssh takes them without a password; rank 0 is on the first. All
# have this folder, its environment and the run folder at the same paths. SSL_VIT_LAUNCH is the launch file
# (accelerate_config.yaml), SSL_VIT_PROCESSES the processes a host (the GPUs of the first), SSL_VIT_ADDRESS the first
# host as the others reach it (its name here), SSL_VIT_PORT a free port there.
#
# Ctrl-C, TERM and HUP stop all hosts, which save first; a second one leaves them to themselves. Where one fails, the
# others are stopped. The exit code is the one in exit.json (0 done, 75 stopped and saved: the same command goes on).
set -u
GRACE=60 # half seconds that the others have to end by themselves after the first one failed

end() { # CODE TEXT: the closing line
    echo "launch_ssh.sh: $2"
    exit "$1"
}

on() { # HOST SCRIPT NAME WORDS...: run a script in this folder there; stdin is the caller's
    local host=$1 script="cd ${PWD@Q} && ${settings}$2"
    shift 2
    set -- "$script" "$@"
    ssh -o BatchMode=yes -o ServerAliveInterval=15 "$host" "bash -c ${*@Q}"
}

said() { # KEY: its value in exit.json, or nothing
    sed -n "s/^ *\"$1\": \"\{0,1\}\(.*[^\",]\)\"\{0,1\},\{0,1\}$/\1/p" <<<"$ended"
}

[[ $# -gt 0 ]] || end 64 "usage: tools/launch_ssh.sh HOSTS [tools/finetune.py] recipe=NAME key=value ..."
if [[ -f $1 ]]; then
    mapfile -t hosts < <(awk '{ sub(/#.*/, "") } NF { print $1 }' "$1")
else
    IFS=, read -ra hosts <<<"$1"
fi
shift
tool=tools/pretrain.py
if [[ $# -gt 0 && $1 != *=* ]]; then
    tool=$1
    shift
fi
[[ ${#hosts[@]} -gt 0 && -f $tool ]] || end 64 "no hosts, or no $tool in $PWD: run it from the repository's folder"
recipe=run run=
for word; do
    case $word in
    recipe=*) recipe=${word#*=} ;;
    run=*) run=${word#*=} ;;
    esac
done
recipe=${recipe##*/}
run=${run:-runs/${recipe%.*}}

command -v accelerate >/dev/null || PATH=$PWD/.venv/bin:$PATH
settings=
for name in PATH ${!PYTHONPATH@} ${!ACCELERATE_@} ${!GLOO_@} ${!NCCL_@} ${!OMP_@} ${!PET_@}; do
    settings+="export $name=${!name@Q}; "
done
first=${hosts[0]}
on "$first" 'mkdir -p "$1" && rm -f "$1/exit.json"' _ "$run" </dev/null || end 70 "$first: not reached, or no $run there"
processes=${SSL_VIT_PROCESSES:-$(on "$first" 'nvidia-smi --list-gpus | wc -l' </dev/null)}
[[ $processes -gt 0 ]] || end 64 "$first: has no GPU; SSL_VIT_PROCESSES=N starts N processes a host all the same"
world=$((${#hosts[@]} * processes))
launch=(--config_file "${SSL_VIT_LAUNCH:-accelerate_config.yaml}"
    --num_machines "${#hosts[@]}" --num_processes "$world"
    --main_process_ip "${SSL_VIT_ADDRESS:-${first#*@}}" --main_process_port "${SSL_VIT_PORT:-$((10000 + $$ % 20000))}")
echo "launch_ssh.sh: $tool on ${#hosts[@]} x $processes processes, $run"

# ssh forwards no signal, so a host's launcher is stopped by the end of its input, which this process's death brings too.
# It then gives its ranks the time to save (torchrun's is 30 s).
coproc HOLD { exec cat; }
hold=$HOLD_PID
exec {input}<&"${HOLD[0]}"
remote='export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-120}; exec 3<&0
    accelerate launch "$@" & launcher=$!; { cat; kill -TERM $launcher; } <&3 >/dev/null 2>&1 & watcher=$!
    wait $launcher; code=$?; kill $watcher 2>/dev/null; exit $code'
children=() stopped=''
trap '[[ -z $stopped ]] || kill "${children[@]}" 2>/dev/null; stopped=1; kill "$hold" 2>/dev/null' INT TERM HUP
for rank in "${!hosts[@]}"; do
    (trap '' HUP INT && on "${hosts[rank]}" "${remote//$'\n'/;}" _ --machine_rank "$rank" "${launch[@]}" "$tool" "$@") <&"$input" &
    children+=($!)
done

failed='' waited=0
while running=0; for rank in "${!children[@]}"; do
    if kill -0 "${children[rank]}" 2>/dev/null; then
        running=1
    elif ! wait "${children[rank]}" && [[ -z $failed ]]; then
        failed=${hosts[rank]}
    fi
done; ((running)); do
    if [[ -n $failed ]] && ((++waited == GRACE)); then
        echo "launch_ssh.sh: $failed failed; stopping the others"
        kill "$hold" 2>/dev/null
    fi
    sleep 0.5
done
kill "$hold" 2>/dev/null

for ((second = 0; second < 10; second++)); do # another host wrote it: a network file system shows it later
    ended=$(on "$first" 'cat "$1/exit.json" 2>/dev/null' _ "$run" </dev/null)
    [[ -n $failed && -z $ended ]] || break
    sleep 1
done
code=$(said code)
if [[ -z $code && -n $failed && -z $stopped ]]; then # was the command itself refused, before the folder was held?
    on "$first" 'WORLD_SIZE=$1 RANK=0 python "${@:2}" dry_run=true >/dev/null' _ "$world" "$tool" "$@" </dev/null
    code=$?
    [[ $code == 0 || $code == 255 ]] || end $code "refused with code $code, see above"
    end 70 "$failed failed, see above; the same command goes on from the last checkpoint"
fi
[[ -n $code || -n $stopped ]] || code=0 # no host failed
case $code in
0) end 0 "done" ;;
"") end 75 "stopped before training began; the same command goes on" ;;
*) end "$code" "ended with code $code: $(said reason)" ;;
esac
