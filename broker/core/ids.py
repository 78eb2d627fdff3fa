"""Names for the numbers and keys by which the core knows things."""

from collections.abc import Hashable
from typing import TypeAlias

SessionId: TypeAlias = int
RequestId: TypeAlias = int
AttemptId: TypeAlias = int

WireId: TypeAlias = Hashable
"""A request's id as its caller wrote it. The core only compares it; what it is belongs to the codec."""
