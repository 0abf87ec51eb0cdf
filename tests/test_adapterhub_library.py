"""AdapterHub's library itself, in processes of their own: it needs an older transformers."""

import os
import subprocess
import sys
from pathlib import Path

import adapterhub_exchange as exchange
import pytest
import torch
from adapterhub_exchange import close
from safetensors.torch import load_file

import pemt_fast

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "build" / "adapterhub"
HELPER = Path(exchange.__file__)

pytestmark = pytest.mark.skipif(
    not (LIBRARY / ".ready").is_file(),
    reason="build/adapterhub, where the library adapters is installed, is made by "
    "`make test-adapterhub`",
)

# Forms and options of ours that no case of `exchange` has.
OURS = {
    "ours_sequential": {"bottleneck": 5, "scale": 3, "attention": True, "activation": "silu"},
    "ours_double": {"form": "double_sequential", "bottleneck": 3, "activation": "identity"},
    "ours_parallel": {"form": "parallel", "cross_attention": True, "feed_forward": False},
}


def run_with_library(*command):
    """A program that must succeed, with the library before the packages of this environment."""
    path = [str(LIBRARY), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        # -P: the root's folder kernels/ is not the package of that name.
        [sys.executable, "-P", *map(str, command)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_its_models_are_fused():
    """`tests/adapterhub`, which holds many tests."""
    summary = run_with_library("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/adapterhub")
    assert " passed" in summary and "skipped" not in summary.splitlines()[-1], summary


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    run_with_library(HELPER, "write", folder)
    return folder


def cases(folder):
    return sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))


def expected_logits(folder):
    return load_file(folder / "logits.safetensors")["logits"]


@pytest.mark.slow
def test_its_files_give_its_logits(written):
    base = written / "base.safetensors"
    assert len(cases(written)) == 8
    for case in cases(written):
        model = pemt_fast.load_adapterhub(exchange.tiny_t5(base), written / case)
        close(exchange.logits(model), expected_logits(written / case))


@pytest.mark.slow
def test_it_reads_our_files_and_gives_our_logits(written, tmp_path):
    base = written / "base.safetensors"
    (tmp_path / base.name).write_bytes(base.read_bytes())
    models = {
        case: pemt_fast.load_adapterhub(exchange.tiny_t5(base), written / case)
        for case in cases(written)
    }
    for name, options in OURS.items():
        config = pemt_fast.BottleneckConfig(**options)
        models[name] = pemt_fast.get_model(exchange.tiny_t5(base), config)
        for tensor in models[name].adapter_state_dict().values():
            torch.nn.init.normal_(tensor, std=0.3)
    for name, model in models.items():
        pemt_fast.export_adapterhub(model, tmp_path / name, name=name)
    run_with_library(HELPER, "read", tmp_path)
    for name, model in models.items():
        close(expected_logits(tmp_path / name), exchange.logits(model))
