"""The configuration as types: one struct per section, each key with its default, its bounds and one sentence.

`configs/default.toml` and `docs/configuration.md` are generated from here, so the sentences are the documentation.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

KIB = 1024
MIB = 1024 * KIB
DAY_S = 86_400

SECRET = {"secret": True}
"""Marks a key whose value is never shown."""
PATH = {"path": True}
"""Marks a key that names a file: `~` is expanded, a relative path in a file starts at that file's folder."""

_HOST_NAME = Annotated[
    str, Meta(pattern=r"\A[^\s/@,]{1,255}\Z", extra={"expects": "host names, each with or without a port"})
]
_ORIGIN = Annotated[
    str,
    Meta(
        pattern=r"\Ahttps?://[^\s/?#@,*]{1,255}\Z",
        extra={"expects": "origins such as https://lab.example:8443, without a path"},
    ),
]
_ADDRESS = Annotated[str, Meta(extra={"expects": "IP addresses or networks such as 10.0.0.0/8"})]
_Count = Annotated[int, Meta(ge=0, le=10_000_000)]
_Deadline = Annotated[float, Meta(gt=0, le=366 * DAY_S)]


_Segment = Annotated[str, Meta(pattern=r"\A[A-Za-z][A-Za-z0-9_-]{0,63}\Z")]
_Classes = Annotated[
    tuple[Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_-]{0,127}\Z")], ...],
    Meta(min_length=1, max_length=1000),
]
_Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")]


class Server(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the broker listens, and which hosts, pages and proxies it believes."""

    host: Annotated[
        str,
        Meta(
            pattern=r"\A[^\s/@]{1,255}\Z",
            description="Address to listen on; one that other machines can reach needs TLS, or `insecure`.",
            extra={"expects": "an IP address or a host name"},
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535, description="TCP port to listen on; 0 lets the system choose one.")] = (
        8787
    )
    insecure: Annotated[
        bool,
        Meta(description="Listen on an address other machines can reach without TLS; tokens then travel in the open."),
    ] = False
    tls_certificate: Annotated[
        str, Meta(description="PEM file with the certificate and its chain; empty: no TLS.", extra=PATH)
    ] = ""
    tls_key: Annotated[
        str, Meta(description="PEM file with the certificate's private key, not encrypted.", extra=PATH)
    ] = ""
    allowed_hosts: Annotated[
        tuple[_HOST_NAME, ...],
        Meta(
            max_length=1000,
            description="Names beside its own by which clients may address the broker in the Host header.",
        ),
    ] = ()
    allowed_origins: Annotated[
        tuple[_ORIGIN, ...],
        Meta(max_length=1000, description="Origins beside its own whose web pages may connect; compared exactly."),
    ] = ()
    trusted_proxies: Annotated[
        tuple[_ADDRESS, ...],
        Meta(max_length=1000, description="Proxies whose X-Forwarded-For and X-Forwarded-Proto are believed."),
    ] = ()
    drain_s: Annotated[
        float,
        Meta(ge=0, le=3600, description="Seconds that requests in flight may still take after SIGTERM."),
    ] = 25
    uvloop: Annotated[
        Literal["auto", "on", "off"],
        Meta(description="Event loop: `auto` takes uvloop where it is installed, `on` insists on it."),
    ] = "auto"


class Auth(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens, users, tickets, sign-ins and how often somebody may guess."""

    tokens_file: Annotated[
        str,
        Meta(description="File with the digests of the tokens; empty: in the user's state folder.", extra=PATH),
    ] = ""
    users_file: Annotated[
        str,
        Meta(
            description="File with the users and the hashes of their passwords; empty: in the user's state folder.",
            extra=PATH,
        ),
    ] = ""
    admin_token: Annotated[
        str,
        Meta(
            pattern=r"\A(?:[\x21-\x7e]{32,512})?\Z",
            description="A token that may do everything; give it as BROKER_AUTH__ADMIN_TOKEN rather than in a file.",
            extra={**SECRET, "expects": "32 to 512 visible ASCII characters, or nothing"},
        ),
    ] = ""
    ticket_s: Annotated[
        float, Meta(gt=0, le=3600, description="Seconds within which a browser's one-time ticket must be used.")
    ] = 30
    session_s: Annotated[
        float, Meta(gt=0, le=366 * DAY_S, description="Seconds for which signing in to a web page is good.")
    ] = 12 * 3600
    passwords_per_minute: Annotated[
        int,
        Meta(
            ge=1,
            le=100_000,
            description="Wrong passwords for one user in a minute, from all addresses together that are new to them.",
        ),
    ] = 10
    guesses_per_minute: Annotated[
        int, Meta(ge=1, le=100_000, description="Wrong credentials that one address may send in a minute.")
    ] = 30


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every bound of the broker; reaching one is answered with `overloaded`, `too_large` or a close code."""

    deadline_s: Annotated[
        _Deadline, Meta(description="Seconds a request may take when its caller names no timeout.")
    ] = 30
    deadline_max_s: Annotated[
        _Deadline, Meta(description="The longest timeout in seconds that a caller may ask for.")
    ] = 3600
    deadline_served_max_s: Annotated[
        _Deadline,
        Meta(description="The longest deadline in seconds that a worker may set for its endpoint, as kernels do."),
    ] = 604_800
    slot_ms: Annotated[
        int, Meta(ge=1, le=200, description="Milliseconds to which deadlines are gathered and so may be late.")
    ] = 50
    capacity: Annotated[
        int,
        Meta(ge=1, le=1_000_000, description="Requests at once for a worker that names no capacity of its own."),
    ] = 1024
    queue_max: Annotated[_Count, Meta(description="Requests that may wait for a worker, per endpoint.")] = 1000
    in_flight_max: Annotated[
        int, Meta(ge=1, le=10_000_000, description="Unfinished requests that one session may have.")
    ] = 10_000
    requests_per_s: Annotated[
        float,
        Meta(ge=0, le=1e9, description="Requests per second of one principal, over all its links; 0: any number."),
    ] = 0
    batch_max: Annotated[int, Meta(ge=1, le=100_000, description="Members of one JSON-RPC batch.")] = 1000
    endpoints_known_max: Annotated[
        int,
        Meta(ge=1, le=10_000_000, description="Endpoints that are remembered after their last worker has left."),
    ] = 10_000
    names_per_session_max: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Endpoints served plus topics subscribed, per session.")
    ] = 1000
    topics_per_endpoint_max: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Topics that are remembered per endpoint.")
    ] = 1000
    sessions_max: Annotated[
        int, Meta(ge=1, le=10_000_000, description="Peers that may be attached at the same time.")
    ] = 100_000
    methods_declared_max: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Methods that one worker may declare for an endpoint.")
    ] = 1000
    fanouts_max: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Broadcasts that may be on their way at the same time.")
    ] = 1000
    start_grace_s: Annotated[
        float,
        Meta(ge=0, le=3600, description="Seconds after the start in which an unknown endpoint counts as retryable."),
    ] = 10
    message_max_bytes: Annotated[
        int, Meta(ge=4 * KIB, le=1024 * MIB, description="Bytes of one message, after all expansion.")
    ] = 16 * MIB
    unauthenticated_max_bytes: Annotated[
        int, Meta(ge=4 * KIB, le=16 * MIB, description="Bytes of a request before its sender is known.")
    ] = 64 * KIB
    fragments_max: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Frames into which one WebSocket message may be cut.")
    ] = 131_072
    outbox_soft_bytes: Annotated[
        int,
        Meta(
            ge=4 * KIB,
            le=1024 * MIB,
            description="Bytes waiting for a slow reader from which broadcasts are dropped.",
        ),
    ] = MIB
    outbox_hard_bytes: Annotated[
        int,
        Meta(ge=4 * KIB, le=4096 * MIB, description="Bytes waiting for a slow reader from which it is closed (4408)."),
    ] = 8 * MIB
    outbox_reading_bytes: Annotated[
        int,
        Meta(
            ge=4 * KIB,
            le=4096 * MIB,
            description="The same for a reader that has taken something within the last second.",
        ),
    ] = 64 * MIB
    stall_s: Annotated[
        float, Meta(gt=0, le=3600, description="Seconds a reader may take nothing at all before it is closed (4408).")
    ] = 10
    write_turn_bytes: Annotated[
        int, Meta(ge=4 * KIB, le=64 * MIB, description="Bytes written to one connection before the next has its turn.")
    ] = 256 * KIB
    close_timeout_s: Annotated[
        float, Meta(gt=0, le=60, description="Seconds to wait for the other side's part of a close handshake.")
    ] = 2
    ping_interval_s: Annotated[
        float, Meta(ge=0, le=3600, description="Seconds of silence after which a connection is pinged; 0: never.")
    ] = 20
    ping_timeout_s: Annotated[
        float, Meta(gt=0, le=3600, description="Seconds without an answer to a ping until a connection is dead.")
    ] = 20
    pings_per_s: Annotated[int, Meta(ge=1, le=1_000_000, description="Pings a peer may send in a second.")] = 100
    idle_s: Annotated[
        _Deadline,
        Meta(description="Seconds a stream may stand still when its caller names no `idle`."),
    ] = 30
    part_max_bytes: Annotated[int, Meta(ge=256 * KIB, le=16 * MIB, description="Bytes of one part of a stream.")] = (
        256 * KIB
    )
    parts_ahead_max: Annotated[
        int, Meta(ge=4, le=10_000, description="Parts that may be on their way to a reader who asks for so many.")
    ] = 64
    grace_max_s: Annotated[
        float,
        Meta(ge=0, le=DAY_S, description="The longest time in seconds that a session may outlive its connection."),
    ] = 300
    kept_max_bytes: Annotated[
        int,
        Meta(ge=0, le=4096 * MIB, description="Bytes kept for a session with grace until it acknowledges them."),
    ] = 8 * MIB
    kept_max: Annotated[
        int, Meta(ge=0, le=10_000_000, description="Messages kept for a session with grace until it acknowledges them.")
    ] = 10_000
    keys_kept_max: Annotated[
        int, Meta(ge=0, le=10_000_000, description="Finished replies kept for repeats of their idempotency keys.")
    ] = 10_000
    keys_kept_max_bytes: Annotated[
        int, Meta(ge=0, le=4096 * MIB, description="Bytes of finished replies kept for repeats.")
    ] = 64 * MIB
    keys_kept_s: Annotated[
        float, Meta(ge=0, le=7 * DAY_S, description="Seconds for which a finished reply is kept for repeats.")
    ] = 600
    principal_share: Annotated[
        float,
        Meta(
            ge=0.001,
            le=1,
            description="Part of the memory, the sessions and the kept replies that what is kept for one principal "
            "may take.",
        ),
    ] = 0.25
    memory_soft_bytes: Annotated[
        int,
        Meta(
            ge=MIB,
            le=1 << 50,
            description="Bytes of payloads and outboxes held in all from which new requests are refused.",
        ),
    ] = 1024 * MIB
    memory_hard_bytes: Annotated[
        int,
        Meta(
            ge=MIB,
            le=1 << 50,
            description="Bytes of payloads and outboxes held in all from which broadcasts are dropped.",
        ),
    ] = 1536 * MIB
    strikes_max: Annotated[
        int, Meta(ge=1, le=1000, description="Malformed messages within a minute that close a connection (4400).")
    ] = 3
    accepts_per_s: Annotated[
        int, Meta(ge=1, le=1_000_000, description="New TCP connections accepted in a second; the rest wait.")
    ] = 2000
    unauthenticated_max: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Connections whose sender is not known yet, over all addresses.")
    ] = 1000
    unauthenticated_per_address_max: Annotated[
        int,
        Meta(
            ge=1, le=1_000_000, description="The same from one address; this machine's own may reach the overall one."
        ),
    ] = 100
    header_timeout_s: Annotated[
        float, Meta(gt=0, le=3600, description="Seconds for TLS and the header of the first request on a connection.")
    ] = 10
    body_timeout_s: Annotated[float, Meta(gt=0, le=3600, description="Seconds for the body of an HTTP request.")] = 30
    prune_slice: Annotated[
        int, Meta(ge=1, le=100_000, description="Expired requests ended before the event loop has its turn.")
    ] = 500
    fanout_slice: Annotated[
        int,
        Meta(ge=1, le=100_000, description="Listeners that a broadcast reaches before the event loop has its turn."),
    ] = 200


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What holds for one endpoint alone. An endpoint named here is known before a worker has served it."""

    policy: Annotated[
        Literal["least_pending", "round_robin", "newest", "sticky"],
        Meta(description="Which of several workers is asked; `sticky`: always the same one for one `group`."),
    ] = "least_pending"
    queue_max: Annotated[_Count | None, Meta(description="Requests that may wait; otherwise `limits.queue_max`.")] = (
        None
    )
    deadline_s: Annotated[
        _Deadline | None,
        Meta(description="Seconds when the caller names no timeout; otherwise `limits.deadline_s`."),
    ] = None
    deadline_max_s: Annotated[
        _Deadline | None, Meta(description="The longest timeout in seconds; otherwise `limits.deadline_max_s`.")
    ] = None
    idle_s: Annotated[
        _Deadline | None, Meta(description="Seconds a stream may stand still; otherwise `limits.idle_s`.")
    ] = None
    newest_wins: Annotated[
        bool,
        Meta(
            description="A request takes the place of the waiting one of its method and group "
            "(without a group: of its method and connection)."
        ),
    ] = False
    history: Annotated[
        _Count, Meta(description="Broadcasts kept per topic for who subscribes with `since`; 0: none.")
    ] = 0
    history_s: Annotated[float, Meta(gt=0, le=366 * DAY_S, description="Seconds for which they are kept.")] = 3600
    history_max_bytes: Annotated[int, Meta(ge=0, le=4096 * MIB, description="Bytes of them kept per topic.")] = 8 * MIB
    closed: Annotated[
        str,
        Meta(
            description="A reason closes the endpoint: who attaches is told it with close code 4404; empty: open.",
            extra={"expects": "a text of at most 123 bytes"},
        ),
    ] = ""


class RtCloud(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """rt-cloud's dialect, by which its unmodified daemons are workers here."""

    enabled: Annotated[
        bool, Meta(description="Take rt-cloud's daemons at the paths below, and give them their cookie at /login.")
    ] = False
    test_user: Annotated[
        bool,
        Meta(description="Let user `test` with password `test` in as a daemon, from this machine alone, to try out."),
    ] = False
    endpoints: Annotated[
        dict[_Segment, _Name],
        Meta(
            min_length=1,
            max_length=100,
            description="Which endpoint a daemon serves that connects to a path, such as /wsData.",
            extra={"expects": 'names of paths, each with the name of an endpoint, as in {wsData="data"}'},
        ),
    ] = msgspec.field(default_factory=lambda: {"wsData": "data", "wsSubject": "subject"})
    classes: Annotated[
        dict[_Segment, _Classes],
        Meta(
            max_length=100,
            description="Which classes every daemon at a path has, where that is known; otherwise its answers tell.",
            extra={"expects": 'names of paths, each with names of classes, as in {wsData=["DataInterface"]}'},
        ),
    ] = {}
    pass_over_s: Annotated[
        float,
        Meta(
            ge=0,
            le=DAY_S,
            description="Seconds for which a daemon is passed over for a class it answered with an error, never well, "
            "while another daemon has that class; 0: not at all.",
        ),
    ] = 60


_Port = Annotated[int, Meta(ge=0, le=65_535)]


class ZeroMQ(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ZeroMQ door: signed multipart messages as in Jupyter, on five sockets that a connection file names."""

    enabled: Annotated[bool, Meta(description="Open it.")] = False
    transport: Annotated[
        Literal["tcp", "ipc"],
        Meta(description="With `ipc` the sockets are in the file system, and there is no network."),
    ] = "tcp"
    host: Annotated[
        str,
        Meta(
            pattern=r"\A[^\s@]{1,100}\Z",
            description="IP address to listen on; one that other machines can reach needs `curve`. "
            "Over ipc the path that the sockets' names begin with.",
            extra={"expects": "an IP address, or a path"},
        ),
    ] = "127.0.0.1"
    shell_port: Annotated[_Port, Meta(description="Port for requests; 0 lets the system choose one.")] = 0
    iopub_port: Annotated[_Port, Meta(description="Port for plain SUB sockets; 0: any.")] = 0
    stdin_port: Annotated[_Port, Meta(description="Port that connection files name, and nobody uses here; 0: any.")] = 0
    control_port: Annotated[_Port, Meta(description="Port for what overtakes requests; 0: any.")] = 0
    hb_port: Annotated[_Port, Meta(description="Port of the heartbeat, which echoes; 0: any.")] = 0
    connection_file: Annotated[
        str,
        Meta(description="Where to write the connection file; empty: beside the access file of this user.", extra=PATH),
    ] = ""
    key_file: Annotated[
        str, Meta(description="File with the key that signs messages; empty: a new one at every start.", extra=PATH)
    ] = ""
    signature_scheme: Annotated[
        str,
        Meta(
            pattern=r"\Ahmac-[a-z0-9_]{1,32}\Z",
            description="How messages are signed: hmac- and a hash.",
            extra={"expects": "hmac- and a hash of hashlib, such as hmac-sha256"},
        ),
    ] = "hmac-sha256"
    roles: Annotated[
        tuple[Literal["caller", "worker", "listener", "admin"], ...],
        Meta(min_length=1, description="What whoever has the connection file may do, without a token or CURVE."),
    ] = ("caller", "worker")
    endpoints: Annotated[
        tuple[Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_*][A-Za-z0-9_.*-]{0,127}\Z")], ...],
        Meta(
            min_length=1,
            max_length=100,
            description="Where they may.",
            extra={"expects": "names of endpoints, in which * may stand for anything"},
        ),
    ] = ("*",)
    curve: Annotated[
        bool, Meta(description="Encrypt, and let in only whose key `broker curve` has allowed; needed beyond loopback.")
    ] = False
    curve_key_file: Annotated[
        str,
        Meta(
            description="File with the broker's own secret key, made if missing; empty: in the user's state folder.",
            extra=PATH,
        ),
    ] = ""
    peers_max: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Connections, and peers behind them, per socket.")
    ] = 10_000


class Kernels(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Jupyter's front ends: the paths below `/api/kernels`, by which JupyterLab uses the kernels that workers serve."""

    enabled: Annotated[
        bool, Meta(description="Serve `/api/kernels` and `/api/kernelspecs` to who may call `kernels.*`.")
    ] = True
    away_s: Annotated[
        float,
        Meta(ge=0, le=7 * DAY_S, description="Seconds for which a front end that lost its link may be away: what its "
             "kernel says meanwhile waits for it."),
    ] = 300  # fmt: skip
    waiting_max_bytes: Annotated[
        int,
        Meta(ge=65_536, le=1024 * MIB, description="Bytes that wait for one front end that is away, or reads slowly; "
             "text is left out above half of it, everything above it, and the front end is told."),
    ] = 4 * MIB  # fmt: skip
    nudge_s: Annotated[
        float,
        Meta(gt=0, le=600, description="Seconds for which a kernel may take to answer before a new front end is let "
             "through to it all the same."),
    ] = 10  # fmt: skip


class Log(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the daemon writes to its standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="The least important lines to write.")
    ] = "info"
    format: Annotated[
        Literal["auto", "human", "json"],
        Meta(description="Form of the lines; `auto` writes for people on a terminal, JSON elsewhere."),
    ] = "auto"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration of one broker. All of it has defaults; `Config()` is a working broker on loopback."""

    server: Server = Server()
    auth: Auth = Auth()
    limits: Limits = Limits()
    endpoints: dict[str, Endpoint] = {}
    rtcloud: RtCloud = RtCloud()
    zeromq: ZeroMQ = ZeroMQ()
    kernels: Kernels = Kernels()
    log: Log = Log()
