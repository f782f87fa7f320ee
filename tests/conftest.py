"""What holds for every test: one thread per process, known random state, packed codes times floats, no chatter."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import settings
from transformers import PreTrainedModel

from kvloom.kernels import native

if TYPE_CHECKING:
    from kvloom.lab.tasks import Kit

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="module")
def _floats() -> Iterator[None]:
    """Tests compare with plain torch to the last digits. What 8-bit whole numbers change is tested in test_kernels.py."""
    before, native.DOT = native.DOT, "float"
    yield
    native.DOT = before


@pytest.fixture(autouse=True)
def _known_random_state() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="module")
def no_data() -> Iterator[None]:
    """Examples are the same on every machine: nothing is taken from a data folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KVLOOM_DATA", raising=False)
        yield


@pytest.fixture(scope="session")
def kit() -> Kit:
    """What the lab's tasks build examples with: the bundled model's tokenizer and the shipped text."""
    from tests import examples

    return examples.nano_kit()


@pytest.fixture(scope="module")
def nano() -> tuple[PreTrainedModel, Any]:
    """The bundled model and its tokenizer."""
    from kvloom.lab.measure import load_model

    return load_model("nano")


settings.register_profile("kvloom", deadline=None)  # a busy machine is no failure
settings.load_profile("kvloom")
