"""Golden bytes of Jupyter's dialects, written by jupyter_client, jupyter_server and @jupyterlab/services themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "jupyter.json").read_text())


def of_format(name: str, where: str = "vectors") -> list[dict[str, Any]]:
    """The vectors in one of the layouts."""
    return [vector for vector in GOLDEN[where] if vector["format"] == name]
