"""The start that pretraining and fine-tuning share: processes meet, lock the run, train, and record how it ended."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_vit import fault_injection
from ssl_vit.commands.dry_run import preview
from ssl_vit.commands.setup import Session
from ssl_vit.data import workers
from ssl_vit.distributed import Distributed
from ssl_vit.errors import ExitCode, ExitError, exit_now, is_out_of_memory, to_exit_error
from ssl_vit.estimate.run_estimate import explain_out_of_memory
from ssl_vit.recipes import Recipe, resolve_recipe
from ssl_vit.runtime import die_with_launcher, world_size
from ssl_vit.train.launch import start_accelerator
from ssl_vit.train.preflight import check_processes_match, check_shared_folder, wait_for_rendezvous
from ssl_vit.train.run_folder import Run
from ssl_vit.train.watchdog import Watchdog

RENDEZVOUS_TIMEOUT = 120.0  # seconds that a process waits for the master to be there


def run_training(recipe: Recipe, train_fn: Callable[[Session, Any, Run], object]) -> int:
    """Start, call `train_fn(session, recipe, run folder)`, and leave its end in exit.json; returns the exit code."""
    die_with_launcher()
    enable_requested_faults()
    fault_injection.fault_point("start")
    recipe, tensors, source = resolve_recipe(recipe)
    settings = recipe.launch_settings(recipe.optim.clip, world_size())
    if recipe.dry_run:
        return preview(recipe, tensors, source)
    folder = Run(Path(recipe.run))
    wait_for_rendezvous(min(recipe.timeout, RENDEZVOUS_TIMEOUT))
    accelerator = start_accelerator(settings, recipe.tracker, folder.folder)
    processes = Distributed.from_accelerator(accelerator)
    watchdog = Watchdog(
        processes, recipe.timeout, lambda exit_error: folder.write_exit(exit_error.code, exit_error.message)
    )
    try:
        check_processes_match(processes, recipe)
        processes.run_on_main(lambda: folder.acquire(recipe, recipe.restart, recipe.allow_recipe_change))
        fault_injection.fault_point("claimed")
        check_shared_folder(processes, folder.folder)
        folder.acquired = True  # by one process for all
        session = Session(accelerator, processes, tensors, source)
        train_fn(session, recipe, folder)
        if processes.is_main:
            folder.write_exit(0, "done")
    except BaseException as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            error.filename = str(folder.folder)  # TensorBoard's thread and torch name no file
        if peer_failure := watchdog.diagnose(error):
            folder.write_exit(peer_failure.code, peer_failure.message)
            exit_now(peer_failure)
        diagnosis = workers.diagnose_worker_failure(error) or (
            ExitError(ExitCode.INTERNAL, explain_out_of_memory(recipe)) if is_out_of_memory(error) else None
        )
        exit_error = diagnosis or to_exit_error(error)
        if processes.is_main or not exit_error.shared:
            folder.write_exit(exit_error.code, exit_error.message)
        if not exit_error.shared:
            watchdog.fail(exit_error)
        if diagnosis:
            raise diagnosis from error
        raise
    finally:
        watchdog.close()
        folder.release()
        accelerator.end_training()
    return 0


def enable_requested_faults() -> None:
    """Where a drill asks for faults, say so first."""
    if spec := os.environ.get(fault_injection.ENV_VARIABLE, ""):
        print(f"{fault_injection.ENV_VARIABLE}={spec}: faults will be injected", flush=True)
    fault_injection.enable_faults(spec)
