"""Typed configs (placeholder until the door lands)."""
import dataclasses


def config(cls):
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)
