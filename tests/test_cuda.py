"""The CUDA engine's kernels, run on the CPU thread by thread, beside the reference engine."""

import functools

import pytest
from cuda_on_cpu import build

from skiprnn.model.engines import contact, trial
from skiprnn.model.engines.cuda import nvrtc, operator

VARIANTS = [one for one in contact.VARIANTS if one.policy in operator.POLICIES and one.layers == 1]


@pytest.fixture
def emulated(tmp_path_factory, monkeypatch):
    """Launches go to the CPU."""
    folder = tmp_path_factory.mktemp("cuda")

    @functools.cache
    def library(defines):
        return build(operator.SOURCE, dict(defines), folder)

    def load(source, defines, names):
        kernels = library(tuple(sorted(defines.items())))
        return {name: functools.partial(kernels.launch, name) for name in names}

    monkeypatch.setattr(nvrtc, "load", load)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_results_and_gradients_are_the_references(emulated, variant):
    for lengths in (False, True):
        assert trial.error("cuda", "cpu", variant, lengths) < contact.TOLERANCE
