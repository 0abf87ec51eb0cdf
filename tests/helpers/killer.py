"""Ends its own process with SIGKILL at a chosen moment of a command; see `test_kill.py`."""

import gc
import os
import shutil
import signal
from pathlib import Path

MOMENTS = {}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def moment(install):
    MOMENTS[install.__name__] = install
    return install


def replace(owner, name, make, count):
    """Put `make(original)` in the place of the `count`-th call of a function."""
    original, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return (make if calls == count else original)(*args, **kwargs)

    setattr(owner, name, counted)
    return original


@moment
def update(count):
    """Before an update."""
    from pemt_fast.training.trainer import AdapterTrainer

    replace(AdapterTrainer, "training_step", lambda *args, **kwargs: die(), count)


@moment
def weights(count):
    """With half a weights file written under its temporary name."""
    from pemt_fast import checkpoint

    def half(tensors, path, metadata):
        original(tensors, path, metadata)
        os.truncate(path, Path(path).stat().st_size // 2)
        die()

    original = replace(checkpoint, "save_file", half, count)


@moment
def between(count):
    """With new weights beside the old config, or none."""
    from pemt_fast import checkpoint

    replace(checkpoint, "replace_file", lambda path, write: die(), 2 * count)


@moment
def optimizer(count):
    """With half an optimizer's state written."""
    from pemt_fast.training.trainer import AdapterTrainer

    def half(self, folder):
        original(self, folder)
        path = Path(folder) / "optimizer.pt"
        os.truncate(path, path.stat().st_size // 2)
        (Path(folder) / "scheduler.pt").unlink()
        die()

    original = replace(AdapterTrainer, "_save_optimizer_and_scheduler", half, count)


@moment
def state(count):
    """With half a state written: the last file of a checkpoint."""
    from transformers import TrainerState

    def half(self, path):
        original(self, path)
        os.truncate(path, Path(path).stat().st_size // 2)
        die()

    original = replace(TrainerState, "save_to_json", half, count)


@moment
def removal(count):
    """With all of a checkpoint removed but what makes it look complete."""

    def some(path, *args, **kwargs):
        for file in Path(path).iterdir():
            if file.name not in ("trainer_state.json", "pemt_fast_config.json"):
                file.unlink()
        die()

    replace(shutil, "rmtree", some, count)


@moment
def results(count):
    """With everything of a run written but its results."""
    from pemt_fast.training import stages

    replace(stages, "finish", lambda *args: die(), count)


@moment
def tidying(count):
    """With the results written and the checkpoints still there."""
    from pemt_fast.training import fit

    replace(fit, "tidy", lambda *args: die(), count)


def judge_by_loss():
    """Let the best checkpoint be that of the lowest loss: all scores of a tiny T5 are the same."""
    from pemt_fast.training.options import TrainOptions

    original = TrainOptions.arguments

    def arguments(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        found.metric_for_best_model, found.greater_is_better = "loss", False
        return found

    TrainOptions.arguments = arguments


def run(arguments, when=None, count=1):
    """The command of a process of its own."""
    import torch

    from pemt_fast import cli

    torch.set_num_threads(1)
    judge_by_loss()
    gc.freeze()  # accelerate collects what everything imported has left, at each start of a run
    if when is not None:
        MOMENTS[when](count)
    cli.main([str(a) for a in arguments])
