"""A start of a training tool: processes meet, hold the run, train what its recipe says, and tell how it ended."""

import errno
import os
from pathlib import Path

from ssl_vit import fault_injection
from ssl_vit.commands.dry_run import preview
from ssl_vit.commands.finetune import member, ready, tasks, tuned
from ssl_vit.commands.results import write_suite
from ssl_vit.commands.setup import Session
from ssl_vit.commands.training_run import train
from ssl_vit.data import workers
from ssl_vit.distributed import from_main
from ssl_vit.errors import INTERNAL, Refusal, leave, out_of_memory, verdict
from ssl_vit.estimate.run_estimate import relieved
from ssl_vit.recipes import Finetune, Recipe, resolve
from ssl_vit.runtime import follow_launcher, world
from ssl_vit.train.launch import start
from ssl_vit.train.preflight import check_alike, check_shared, meet
from ssl_vit.train.run_folder import Run
from ssl_vit.train.watchdog import Watchdog

MEETING = 120.0  # seconds that a process waits for the master to be there


def run(recipe: Recipe) -> int:
    """Do what the recipe says, from the checkpoint where there is one; returns the exit code."""
    follow_launcher()
    arm_faults()
    fault_injection.point("start")
    recipe, tensors, source = resolve(recipe)
    asked = recipe.asked(recipe.optim.clip, world())
    if recipe.dry_run:
        return preview(recipe, tensors, source)
    folder = Run(Path(recipe.run))
    meet(min(recipe.timeout, MEETING))
    accelerator = start(asked, recipe.tracker, folder.folder)
    watchdog = Watchdog(accelerator, recipe.timeout, lambda end: folder.write_exit(end.code, end.message))
    try:
        check_alike(accelerator, recipe)
        from_main(accelerator, lambda: folder.claim(recipe, recipe.fresh, recipe.allow_change))
        fault_injection.point("claimed")
        check_shared(accelerator, folder.folder)
        folder.held = True  # by one process for all
        session = Session(accelerator, watchdog, tensors, source)
        everything(session, recipe, folder)
        if accelerator.is_main_process:
            folder.write_exit(0, "done")
    except BaseException as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            error.filename = str(folder.folder)  # TensorBoard's thread and torch name no file
        if lost := watchdog.explain(error):
            folder.write_exit(lost.code, lost.message)
            leave(lost)
        told = workers.explain(error) or (Refusal(INTERNAL, relieved(recipe)) if out_of_memory(error) else None)
        end = told or verdict(error)
        if accelerator.is_main_process or not end.shared:
            folder.write_exit(end.code, end.message)
        if not end.shared:
            watchdog.fail(end)
        if told:
            raise told from error
        raise
    finally:
        watchdog.close()
        folder.release()
        accelerator.end_training()
    return 0


def arm_faults() -> None:
    """Where a drill asks for faults, say so first."""
    if asked := os.environ.get(fault_injection.VARIABLE, ""):
        print(f"{fault_injection.VARIABLE}={asked}: faults will be injected", flush=True)
    fault_injection.arm(asked)


def everything(session: Session, recipe: Recipe, folder: Run) -> None:
    """The one training of a recipe, or all that a fine-tuning is made of."""
    if not isinstance(recipe, Finetune):
        train(session, recipe, folder)
    elif recipe.tasks:
        of_tasks = from_main(session.accelerator, lambda: tasks(recipe))
        made_ready = lambda: {name: ready(one) for name, one in of_tasks.items()}  # noqa: E731
        of_tasks = from_main(session.accelerator, made_ready, session.watchdog.beat)
        results = {name: member(session, made, tuned) for name, made in of_tasks.items()}
        from_main(session.accelerator, lambda: write_suite(recipe, folder, results))
    else:
        tuned(session, from_main(session.accelerator, lambda: ready(recipe), session.watchdog.beat), folder)
