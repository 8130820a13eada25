"""Traced graphs of random models, each traced once for all parity tests."""

from __future__ import annotations

import pytest

from model.config import FULL, SLIDING, ExaoneConfig
from tests.parity.onnx_graphs import (
    Session,
    dense_config,
    hybrid_config,
    multimodal_config,
    session_of,
    text_config,
)


@pytest.fixture(scope="session")
def hybrid() -> Session:
    return session_of(hybrid_config(), "decoder")


@pytest.fixture(scope="session")
def narrow() -> Session:
    """Heads of 8, which the attention kernel does not rotate itself."""
    text = text_config(head_dim=8, num_layers=2, layer_types=(SLIDING, FULL))
    return session_of(ExaoneConfig("exaone4", text, None, None, 1, (2,), 0), "decoder")


@pytest.fixture(scope="session")
def dense() -> Session:
    return session_of(dense_config(), "decoder")


@pytest.fixture(scope="session")
def embedded() -> Session:
    return session_of(multimodal_config(), "decoder", draft=True)


@pytest.fixture(scope="session")
def draft() -> Session:
    return session_of(multimodal_config(), "mtp", draft=True)
