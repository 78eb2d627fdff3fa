"""How every command ends: the table of exit codes, and the exception that carries one."""

import enum


class Exit(enum.IntEnum):
    """Exit codes; they are fixed, scripts rely on them."""

    OK = 0
    REMOTE_ERROR = 1
    USAGE = 2
    CANNOT_CONNECT = 3
    DENIED = 4
    NOT_SERVED = 5
    DEADLINE = 6
    COME_BACK = 7
    DEFECT = 70
    INTERRUPTED = 130
    PIPE_CLOSED = 141


MEANINGS: dict[Exit, str] = {
    Exit.OK: "it worked",
    Exit.REMOTE_ERROR: "the worker answered with an error of its own, or with a broken reply",
    Exit.USAGE: "wrong usage, bad input, or an error in the configuration",
    Exit.CANNOT_CONNECT: "no broker could be reached",
    Exit.DENIED: "not authorised, or not allowed with this credential",
    Exit.NOT_SERVED: "no such endpoint, method or live request, or no worker serves it now",
    Exit.DEADLINE: "the deadline passed",
    Exit.COME_BACK: "overloaded, shutting down, or the worker or the connection was lost: try again later",
    Exit.DEFECT: "a defect of this program; BROKER_TRACEBACK=1 shows where",
    Exit.INTERRUPTED: "interrupted or cancelled",
    Exit.PIPE_CLOSED: "whoever read the output went away",
}

_OUTCOMES: dict[str, Exit] = {
    "ok": Exit.OK,
    "worker_error": Exit.REMOTE_ERROR,
    "bad_reply": Exit.REMOTE_ERROR,
    "invalid": Exit.USAGE,
    "too_large": Exit.USAGE,
    "duplicate_id": Exit.USAGE,
    "key_conflict": Exit.USAGE,
    "denied": Exit.DENIED,
    "no_endpoint": Exit.NOT_SERVED,
    "no_method": Exit.NOT_SERVED,
    "no_worker": Exit.NOT_SERVED,
    "deadline": Exit.DEADLINE,
    "worker_lost": Exit.COME_BACK,
    "overloaded": Exit.COME_BACK,
    "shutting_down": Exit.COME_BACK,
    "slow_consumer": Exit.COME_BACK,
    "cancelled": Exit.INTERRUPTED,
}


class Failure(Exception):
    """Ends a command with one line on standard error and an exit code; `text` says what was wrong and what to do."""

    def __init__(self, code: Exit, text: str) -> None:
        super().__init__(text)
        self.code = code


def exit_for(outcome: str) -> Exit:
    """The exit code for an outcome's name, as in `error.data.outcome`; any unknown one is the worker's own error."""
    return _OUTCOMES.get(outcome, Exit.REMOTE_ERROR)


def markdown_table() -> str:
    """The table of exit codes for the documentation."""
    rows = [f"| {code.value} | {meaning} |" for code, meaning in MEANINGS.items()]
    return "\n".join(["| exit code | meaning |", "|---|---|", *rows]) + "\n"
