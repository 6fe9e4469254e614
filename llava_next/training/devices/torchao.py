"""torchao, by which matrices multiply in float8 and moments lie in 8 bits."""

from __future__ import annotations

import importlib
import logging

LEAST = (0, 18)  # see setup.cfg
DEPRECATED = "register_constant() on Enum subclasses is deprecated"


def torchao(module: str):
    """`torchao.MODULE`, imported without what torch 2.13 says to torchao's authors of its enums, in every process."""
    log = logging.getLogger("torch.utils._pytree")

    def for_users(record: logging.LogRecord) -> bool:
        return DEPRECATED not in record.getMessage()

    log.addFilter(for_users)
    try:
        return importlib.import_module(f"torchao.{module}")
    finally:
        log.removeFilter(for_users)
